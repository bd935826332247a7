# Written by `make export` from notebooks/appendix/12_poster.py: edit that file.

"""The sheet that holds the whole model: its code, its wiring."""

__all__ = ["is_stale", "main", "source_hash", "write_poster"]


# imports of the poster
import ast
import hashlib
import keyword
import re
import sys

from matplotlib.figure import Figure

from llmnb.book.diagram import PALETTE
from llmnb.book.export import ROOT
from llmnb.book.wiring import draw_wiring


# the page's text
PAGE = ROOT / "llmnb" / "reference" / "gpt2.py"
POSTER = ROOT / "book" / "poster.pdf"


def page_code(text):
    """The code of a module: no docstrings, no `__all__`.

    Returns lines; functions are parted by one blank line. A comment stays if
    it is within a function, or ends a line.
    """
    lines = text.splitlines()
    kept = []
    for node in ast.parse(text).body:
        if isinstance(node, ast.Expr) or "__all__" in lines[node.lineno - 1]:
            continue
        first, doc = node.lineno, range(0)
        if isinstance(node, (ast.FunctionDef, ast.Assign)):
            kept.append("")
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
            doc = node.body[0]
            doc = range(doc.lineno, doc.end_lineno + 1)
        numbers = range(first, node.end_lineno + 1)
        kept += [lines[n - 1] for n in numbers if n not in doc]
    return kept


# words and their colours
# a comment, a string, a number, a name, or another sign
WORD = re.compile(r"""#.*|"[^"]*"|\d+(?:\.\d+)?(?:e-?\d+)?|\w+|[^\w\s]""")


def coloured_words(line):
    """The words of a line of Python: (column, word, name of a colour)."""
    for x in WORD.finditer(line):
        colour = "blue" if x[0][0].isdigit() else "ink"
        colour = "green" if x[0][0] == '"' else colour
        colour = "purple" if keyword.iskeyword(x[0]) else colour
        yield x.start(), x[0], colour


# a column of code
SHEET = 420.0, 297.0  # A3
LETTER = 8.0  # points, of the code
STEP = 4.1  # from a line to the next
POINT = 25.4 / 72
WIDTH = 0.602 * LETTER * POINT  # of a letter of DejaVu Sans Mono


def _column(ax, x, y, lines):
    """Set lines of code one under the other, from (x, y) on."""
    style = {"family": "DejaVu Sans Mono", "size": LETTER, "va": "baseline"}
    for k, line in enumerate(lines):
        bold = line.startswith("def ")
        for at, word, colour in coloured_words(line):
            where = x + at * WIDTH, y + k * STEP
            weight = "bold" if bold and word != "def" else "normal"
            ax.text(
                *where, word, color=PALETTE[colour], weight=weight, **style
            )


# the sheet
TITLE = "GPT-2, forward and backward"
LEGEND = """\
Dark: the forward pass. Orange: gradients, flowing back.
A circle: arrays add up.
p, g: parameters and gradients, by name; i: the block.

(B, T)         tokens, targets
(B, T, C)      x, ln1, atty, residual2, ln2, lnf
(B, T, 3C)     qkv
(B, T, 4C)     fch, fch_gelu
(B, T, V)      logits

Proved in chapter 1.14 of llmnb."""


def draw_poster(text):
    """The sheet as a matplotlib Figure; text: of the page's module."""
    fig = Figure(figsize=[x / 25.4 for x in SHEET])
    ax = fig.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, SHEET[0]), ylim=(SHEET[1], 0))
    ax.axis("off")
    ink, lines = PALETTE["ink"], page_code(text)
    ax.text(12, 19, TITLE, size=24, weight="bold", color=ink)
    cut = lines.index("", len(lines) // 2)
    _column(ax, 12, 31, lines[:cut])
    _column(ax, 131, 31, lines[cut + 1 :])
    style = {"family": "DejaVu Sans Mono", "size": 7, "linespacing": 1.5}
    ax.text(262, 228, LEGEND, color=ink, va="top", **style)
    inset = fig.add_axes((257 / 420, 78 / 297, 157 / 420, 195 / 297))
    draw_wiring(inset, size=6.8)
    return fig


# write and check
def source_hash(text):
    """A hash of what the sheet prints of the page.

    Derived in chapter A.12.
    """
    code = "\n".join(page_code(text))
    return f"page-{hashlib.sha256(code.encode()).hexdigest()[:32]}"


def is_stale(poster, text):
    """Whether a PDF, its bytes, was drawn from another page than this.

    Derived in chapter A.12.
    """
    found = re.search(rb"page-[0-9a-f]{32}", poster)
    return found is None or found[0].decode() != source_hash(text)


def write_poster(path, text):
    """Draw the sheet and write it as a PDF.

    Derived in chapter A.12.
    """
    facts = {"Title": TITLE, "Keywords": source_hash(text)}
    facts |= {"CreationDate": None}
    draw_poster(text).savefig(path, format="pdf", metadata=facts)


def main(argv=None):
    """Draw the poster; with --check only say whether it is stale.

    Derived in chapter A.12.
    """
    argv = sys.argv[1:] if argv is None else argv
    text = PAGE.read_text("utf-8")
    if "--check" not in argv:
        write_poster(POSTER, text)
        return
    if not POSTER.exists() or is_stale(POSTER.read_bytes(), text):
        sys.exit(f"{POSTER} is stale: run python -m llmnb.book.poster")


if __name__ == "__main__":
    main()
