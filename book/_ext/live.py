"""The model of chapter 1.18, small enough for a page: one byte a weight.

`render_model` makes of the checkpoint in book/hour a script that a browser
can load from the disk, and `round_params` says what its rounding leaves, so
that a test can compare the page with NumPy on the same weights. The directive
`live` puts the page's own part, live.html, where it stands.

A matrix is cut into its rows. A row is a power of two to an eighth, its
scale, as one character, and a whole number from -45 to 45 for each weight,
as one character too. LayerNorms and biases are few and get two characters a
number, from -4140 to 4140, with one scale for all of an array.
"""

import html
import json
from pathlib import Path

import numpy as np
from docutils import nodes
from sphinx.util.docutils import SphinxDirective

HERE = Path(__file__).parent
HOUR = HERE.parent / "hour"
# 91 characters that a string in a script may hold as they are; the middle
# one stands for 0
DIGITS = "".join(c for c in map(chr, range(33, 127)) if c not in '"\\<')
BASE, ZERO = len(DIGITS), len(DIGITS) // 2
CODES = np.frombuffer(DIGITS.encode(), np.uint8)
MATRICES = ("wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw")


def to_text(numbers):
    """Whole numbers from -45 to 45 as characters."""
    return CODES[np.asarray(numbers).reshape(-1) + ZERO].tobytes().decode()


def round_rows(matrix):
    """Of each row its scale, 2**(n/8 - 10), as n, and its whole numbers."""
    rows = matrix.reshape(-1, matrix.shape[-1])
    largest = np.abs(rows).max(1, keepdims=True)
    scale = np.ceil(8 * (np.log2(largest / ZERO) + 10)).astype(int)
    return scale, np.rint(rows / 2 ** (scale / 8 - 10)).astype(int)


def round_fine(array):
    """A scale for all of an array, and whole numbers up to 4140."""
    scale = float(f"{np.abs(array).max() / (ZERO * BASE + ZERO - 1):.5g}")
    return scale, np.rint(array.reshape(-1) / scale).astype(int)


def pack_rows(matrix):
    """A matrix as the length of its rows and one text."""
    return [matrix.shape[-1], to_text(np.hstack(round_rows(matrix)))]


def pack_fine(array):
    """An array as its scale and one text, two characters a number."""
    scale, whole = round_fine(array)
    high, low = np.divmod(whole + ZERO, BASE)
    return [scale, to_text(np.stack([high, low - ZERO], -1))]


def round_params(params):
    """The parameters as the page has them, a dict of float64 arrays."""
    rounded = {}
    for name, array in params.items():
        if name in MATRICES:
            scale, whole = round_rows(array)
            rows = whole * 2.0 ** (scale / 8 - 10)
        else:
            scale, whole = round_fine(array)
            rows = whole * scale
        rounded[name] = rows.reshape(array.shape)
    return rounded


def load_hour():
    """The model that trained for an hour, and its encoding."""
    from llmnb.model.gpt2 import GPT2
    from llmnb.text import tokenizer

    model = GPT2.from_checkpoint(
        HOUR / "model.bin", batch_size=1, seq_len=256, backend="reference"
    )
    return model, tokenizer.load(HOUR / "tokenizer.tiktoken")


def render_model():
    """The text of live-model.js: config, tokens and weights."""
    model, encoding = load_hour()
    cfg, vocab = model.cfg, encoding.n_vocab
    params = {n: np.array(x, np.float64) for n, x in model.params.items()}
    tokens = range(256, encoding.eot_token)
    raw = [encoding.decode_single_token_bytes(i) for i in tokens]
    packed = {
        "config": {
            "T": cfg.max_seq_len, "C": cfg.channels, "L": cfg.num_layers,
            "NH": cfg.num_heads, "V": vocab,
        },
        "parameters": sum(x.size for x in params.values()),
        "digits": DIGITS,
        "tokens": [token.decode("latin-1") for token in raw],
        "matrices": {n: pack_rows(params[n]) for n in MATRICES},
        "vectors": {
            n: pack_fine(x) for n, x in params.items() if n not in MATRICES
        },
    }  # fmt: skip
    text = json.dumps(packed, separators=(",", ":"))
    return f"window.llmnbModel={text};\n"


# The demo on the page

FIRST_TEXT = '''\
class Account:
    """An account with a balance."""

    def __init__(self, balance=0):
        self.balance = balance

    def deposit(self,'''
NEXT = """<li><button type="button" disabled><code>…</code><i></i>\
<b></b></button></li>"""
HEAD = """<label title="block {l}, head {h}"><input type="radio" \
name="live-head" aria-label="block {l}, head {h}"{on}>\
<canvas width="40" height="40"></canvas></label>"""


def render_heads(layers, heads):
    """A small map for each head; chosen is the one that looks back."""
    rows = []
    for layer in range(layers):
        row = [f"<span>block {layer}</span>"]
        for h in range(heads):
            on = " checked" if (layer, h) == (4, 0) else ""
            row.append(HEAD.format(l=layer, h=h, on=on))
        rows.append("".join(row))
    return "\n".join(rows)


class Live(SphinxDirective):
    """Where the live model stands; the content is said beside it."""

    has_content = True

    def run(self):
        text = (HERE / "live.html").read_text("utf-8")
        before, after = text.split("{about}")
        config = json.loads((HOUR / "config.json").read_text())["config"]
        before = before.replace("{text}", html.escape(FIRST_TEXT))
        before = before.replace("{rows}", 10 * NEXT)
        grid = render_heads(config["num_layers"], config["num_heads"])
        before = before.replace("{heads}", grid)
        up = "../" * self.env.docname.count("/")
        before = before.replace("{static}", f"{up}_static")
        said = nodes.container()
        self.state.nested_parse(self.content, self.content_offset, said)
        raw = [nodes.raw("", x, format="html") for x in (before, after)]
        return [raw[0], *said.children, raw[1]]


def write_model(app, exception):
    """Write the weights beside the scripts, where the page finds them."""
    folder = Path(app.outdir) / "_static"
    if exception is None and app.builder.name == "html":
        (folder / "live-model.js").write_text(render_model(), "utf-8")


def setup(app):
    app.add_directive("live", Live)
    app.connect("build-finished", write_model)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
