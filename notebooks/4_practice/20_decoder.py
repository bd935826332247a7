# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       model.decode: "GPT-2 for writing, with its keys and values kept."
# ---

# %% [markdown]
# # Decoder: write with a cache, to the last bit
#
# > A model without gradients that keeps what it has computed, behind one pure
# > function: the same logits as a whole window would give.
#
# *Reading time: 26 minutes. You need: [chapter 4.19](19_cache.ipynb) and the block
# ([chapter 1.13](../1_by_hand/13_block.ipynb)).*

# %% [markdown]
# ## Where we are
#
# The layers of writing are there. At the end of this chapter you can
#
# - say how a cache is used so that a mistake cannot give wrong text unseen;
# - compute a prompt in parts, and several samples of it at once;
# - say how long a token takes, and what that time is made of.

# %% [markdown]
# ## Setup

# %% setup
import matplotlib.pyplot as plt

from llmnb.book.diagram import PALETTE
from llmnb.book.verify import verdict
from llmnb.config import GPT2Config
from llmnb.model.gpt2 import GPT2
from llmnb.model.tensors import parameter_count
from llmnb.timing import fastest, machine

# %% [markdown]
# ## The decoder
#
# `Decoder` is GPT-2 for writing. It has no gradients and no optimiser. Its
# arena holds the packed weights, the cache, and the activations of one block,
# since nothing goes backward. A long prompt is computed in parts of `POSITIONS`
# positions, so these stay small; each part is one pass through the blocks, in
# which a weight serves all its positions. That is called **prefill**. Logits
# are computed for the last position only.

# %% imports of the decoder tags=["export"] module="model.decode"
from functools import partial
from types import SimpleNamespace

import numpy as np
from numba import get_num_threads, set_num_threads

from llmnb import cpu

from llmnb.arena import Arena, footprint
from llmnb.cpu.decode import cache_shapes, panels_shape, ring_size
from llmnb.formats.checkpoint import open_model
from llmnb.checks import FLOATS, check_fit, check_tokens
from llmnb.model.layout import block_activations, block_shapes
from llmnb.model.parts import block_forward, block_of
from llmnb.model.tensors import parameter_shapes, tensor_table
from llmnb.checks import check_room


# %% its memory tags=["export"] module="model.decode"
POSITIONS = 256  # positions, of all texts, that are computed at once
FEWER = "fewer or shorter texts, or a smaller model, take less"
LIGHT = 1 << 14  # numbers that one thread finishes before a second wakes


def decoder_layout(cfg, batch_size, seq_len, dtype=np.float32):
    """The groups of the arena in which a Decoder works.

    vectors: parameters as they are; panels: weights, packed with their
    biases; cache: keys and values of every block; acts: what one block
    computes for at most max(batch_size, POSITIONS) positions, and the logits
    of the last; tables: what the parts of a block look up.
    """
    L, shapes = cfg.num_layers, parameter_shapes(cfg)
    panels = {x.name: (L, *panels_shape(*x.shape)) for x in _packed(cfg)}
    panels[_head(cfg)] = panels_shape(cfg.padded_vocab_size, cfg.channels)
    vectors = {n: shape for n, shape in shapes.items() if n not in panels}
    tables = block_of(cfg).tables(cfg, seq_len)
    return {
        "vectors": (dtype, vectors),
        "panels": (dtype, panels),
        "cache": (dtype, _caches(cfg, batch_size, seq_len)),
        "acts": (dtype, _activations(cfg, batch_size)),
        "tables": (dtype, {n: x.shape for n, x in tables.items()}),
        "batch": (np.int32, {"tokens": (batch_size, seq_len)}),
    }


# %% which weights are packed tags=["exporti"] module="model.decode"
def _packed(cfg):
    """The linear layers' weights, rows of the table of tensors."""
    return [x for x in tensor_table(cfg) if x.stacked and x.decays]


def _head(cfg):
    """The name of the table that makes the logits."""
    return "head" if "head" in parameter_shapes(cfg) else "wte"


# %% [markdown]
# A block keeps what its queries may still see: all positions, or, in some of
# the models of Part 5, a window of them. The activations are those of
# training, less what only the backward pass reads.


# %% caches and activations tags=["exporti"] module="model.decode"
# what training keeps and writing has no use for
_UNUSED = ("att_lse", "residual3")


def _window(cfg, i):
    """How many positions a query of block i sees; None for all."""
    return cfg.window if cfg.family != "gpt2" and cfg.is_local(i) else None


def _caches(cfg, B, T):
    """The shapes of the keys and values of all blocks, by name and block."""
    heads, hs, found = cfg.num_kv_heads, cfg.head_size, {}
    for i in range(cfg.num_layers):
        own = cache_shapes(B, heads, T, hs, _window(cfg, i))
        found |= {f"{name}{i}": shape for name, shape in own.items()}
    return found


def _activations(cfg, batch_size):
    B, C, R = batch_size, cfg.channels, max(batch_size, POSITIONS)
    kept = block_activations(cfg, 1, R) | block_shapes(cfg, 1, R)
    rows = [x for x in kept if x[0] != "d" and x not in _UNUSED]
    last = dict.fromkeys(("last", "lnf"), (1, B, C))
    last |= {"logits": (1, B, cfg.padded_vocab_size)}
    last |= block_of(cfg).norm.keeps(cfg, 1, B, "lnf")
    acts = {"x": (R, C)} | {name: kept[name][1:] for name in rows}
    return acts | {name: shape[1:] for name, shape in last.items()}


# %% [markdown]
# The block itself is that of [chapter 1.13](../1_by_hand/13_block.ipynb), called
# with other layers: products that read packed weights, and attention that
# looks into the cache. A detail of speed: LayerNorm, GELU and others of one
# row are done before a second thread has woken up, so one thread does them.
# Their results do not depend on the number of threads. The table of tokens is
# looked up where it is: in panels, if it makes the logits too.


# %% the layers of writing tags=["exporti"] module="model.decode"
def _light(function, out, *args):
    """Call a layer with one thread, where out is only a few rows."""
    threads = get_num_threads()
    set_num_threads(1 if out.size < LIGHT else threads)
    try:
        function(out, *args)
    finally:
        set_num_threads(threads)


def _attend(out, lse, qkv, keys, values, first, **rule):
    """Attention, by way of the cache; nobody asks for lse."""
    cpu.cache_attention(out, keys, values, qkv, first, **rule)


def _multiply(out, inp, panels, bias, residual=None, **cache):
    """A linear layer; its bias is packed with its weights."""
    cpu.panels_forward(out, inp, panels, residual)


def _embed(out, tokens, wte, scale):
    """Token vectors without positions, from a table or its panels."""
    if wte.ndim == 2:
        cpu.embedding_forward(out, tokens, wte, scale)
    else:
        cpu.embed_forward(out, tokens, wte, scale=scale)


_NAMES = [name for name in cpu.__all__ if name.endswith("_forward")]
_OWN = {
    "encoder_forward": cpu.embed_forward,
    "embedding_forward": _embed,
    "matmul_forward": _multiply,
    "attention_forward": _attend,
    "local_attention_forward": _attend,
}
_ROWS = {name: partial(_light, getattr(cpu, name)) for name in _NAMES}
LAYERS = SimpleNamespace(**_ROWS | _OWN)


# %% [markdown]
# How should a cache be used? It is tempting to hand it to the caller, with
# methods to append a token and to go back. Then the caller must know what the
# cache holds, and a mistake gives wrong text without an error. We hide it.
# `following` takes whole texts and gives the logits after them; it is a pure
# function, and its values are those of `window_logits` in chapter 1.19.
# Inside, it compares the texts with those of the last call and computes what
# is new. When a text slides to its next window nothing matches, and all is
# computed. So it is where a block has kept a window only and the texts part
# before it. When a prompt is continued twice, its positions are still there.
# When several texts are the same, as prompts of several samples are, one row
# is computed and copied.


# %% the decoder tags=["export"] module="model.decode"
class Decoder:
    """A model for writing: no gradients, and keys and values are kept.

    cfg: a GPT2Config or a relative. batch_size: the most texts at once.
    seq_len: the longest text, by default cfg.max_seq_len. dtype: float32 or
    float64.
    Its weights are zero until `adopt`. Raises ValueError for a value out of
    range and MemoryError when its block of memory cannot be had.
    """

    def __init__(self, cfg, batch_size=1, seq_len=None, dtype=np.float32):
        seq_len = cfg.max_seq_len if seq_len is None else seq_len
        if batch_size < 1 or not 1 <= seq_len <= cfg.max_seq_len:
            raise ValueError(
                f"Decoder: batch_size must be at least 1 and seq_len 1 to "
                f"{cfg.max_seq_len}, got {batch_size} and {seq_len}"
            )
        self.cfg, self.batch_size, self.seq_len = cfg, batch_size, seq_len
        layout = decoder_layout(cfg, batch_size, seq_len, dtype)
        check_room(sum(footprint(layout).values()), FEWER)
        self.memory = Arena(layout)
        self._acts, self._tokens = self.memory["acts"], self.memory["batch"]
        self._weights = self.memory["vectors"] | self.memory["panels"]
        self._ends = block_of(cfg)
        for name, values in self._ends.tables(cfg, seq_len).items():
            self.memory["tables"][name][...] = values
        self._layers = [self._layer(i) for i in range(cfg.num_layers)]
        self._held = 0, 0  # rows and positions whose keys are kept
        self._longest = 0  # how far the keys went since position 0 was new

    def _layer(self, i):
        """Block i: its parts, its weights, and its part of the cache."""
        own = [x.name for x in tensor_table(self.cfg) if x.stacked]
        weights = {name: self._weights[name][i] for name in own}
        cache = self.memory["cache"]
        cache = {name: cache[f"{name}{i}"] for name in ("keys", "values")}
        return block_of(self.cfg, i), weights, cache

    def adopt(self, params):
        """Take the weights of a mapping such as `GPT2.params`.

        They are copied, from a GPU too: after another step of training,
        set them again. Raises TypeError or ValueError before it copies any,
        where one does not fit.
        """
        for name, shape in parameter_shapes(self.cfg).items():
            check_fit(f"Decoder.adopt: {name}", params[name], shape, FLOATS)
        self._held = 0, 0  # first: half of what follows makes keys stale too
        panels, head = self.memory["panels"], _head(self.cfg)
        for name, array in self.memory["vectors"].items():
            array[...] = params[name]
        cpu.pack_weight(panels[head], np.asarray(params[head]))
        for x in _packed(self.cfg):
            weight, bias = np.asarray(params[x.name]), x.name[:-1] + "b"
            for i, panel in enumerate(panels[x.name]):
                own = np.asarray(params[bias])[i] if bias in params else None
                cpu.pack_weight(panel, weight[i], own)
        return self

    @classmethod
    def of(cls, model, batch_size=1, seq_len=None):
        """A Decoder with the weights of a GPT2, as they are now."""
        seq_len = model.seq_len if seq_len is None else seq_len
        dtype = model.params["wte"].dtype
        return cls(model.cfg, batch_size, seq_len, dtype).adopt(model.params)

    @classmethod
    def from_checkpoint(cls, path, batch_size=1, seq_len=None, tokens=None):
        """A Decoder with weights from disk; path, tokens: see open_model.

        For a while it holds them twice: as they are read, and packed.
        """
        found = open_model(path, tokens)
        cfg = found.cfg
        layout = {"params": (np.float32, parameter_shapes(cfg))}
        check_room(2 * sum(footprint(layout).values()), FEWER)
        decoder, arena = cls(cfg, batch_size, seq_len), Arena(layout)
        found.read(arena["params"])
        return decoder.adopt(arena["params"])

    def following(self, texts):
        """The logits (N, V) of the token that follows each of N texts.

        texts: N lists of tokens, of one length from 1 to seq_len; N is at
        most batch_size. What the texts share with those of the last call,
        from the first token on, is not computed again; the logits are the
        same to the last bit. Raises TypeError or ValueError before it
        computes anything.
        """
        texts = self._checked(texts)
        rows, length = texts.shape
        first = self._shared(texts)
        alone = first == 0 and (texts == texts[0]).all()
        self._held = 0, 0
        self._tokens["tokens"][:rows, :length] = texts
        some = texts[:1] if alone else texts
        size = max(1, POSITIONS // len(some))
        for start in range(first, length, size):
            self._extend(some[:, start : start + size], start)
        if alone:
            self._copy_first_row(rows, length)
        self._held = rows, length
        self._longest = max(length, self._longest if first else 0)
        return self._logits(rows)

    def _checked(self, texts):
        """The texts as an array, if they can be one."""
        texts = np.asarray(texts)
        rows, length = texts.shape if texts.ndim == 2 else (0, 0)
        if not (1 <= rows <= self.batch_size and 1 <= length <= self.seq_len):
            raise ValueError(
                f"Decoder.following: texts must have shape (N, T), N at most "
                f"{self.batch_size} and T at most {self.seq_len}, got "
                f"{texts.shape}"
            )
        name = "Decoder.following: texts"
        check_tokens(name, texts, self.cfg.vocab_size)
        return texts.astype(np.int32)

    def _shared(self, texts):
        """How many positions are kept already; never the last."""
        rows, length = self._held
        if len(texts) > rows:
            return 0
        length = min(length, texts.shape[1] - 1)
        held = self._tokens["tokens"][: len(texts), :length]
        differs = (held != texts[:, :length]).any(axis=0)
        shared = int(differs.argmax()) if differs.any() else length
        return shared if self._still_sees(shared) else 0

    def _still_sees(self, position):
        """Whether all that a position sees is kept, in every block."""
        blocks, hs = range(self.cfg.num_layers), self.cfg.head_size
        windows = {_window(self.cfg, i) for i in blocks} - {None}
        return all(
            max(0, position + 1 - x) >= self._longest - ring_size(hs, x)
            for x in windows
        )

    def _extend(self, tokens, first):
        """Run some positions (B, T) through all blocks."""
        tokens = np.ascontiguousarray(tokens)
        rows, new = tokens.shape
        a = {
            name: x[: tokens.size].reshape(rows, new, *x.shape[1:])
            for name, x in self._acts.items()
            if len(x) >= tokens.size
        }
        w = dict(self._weights)
        if "wpe" in w:
            w["wpe"] = w["wpe"][first:]
        self._ends.encoder.forward(LAYERS, a["x"], tokens, w)
        a |= {"att_lse": None} | self.memory["tables"]
        for block, w, cache in self._layers:
            kept = {name: x[:rows] for name, x in cache.items()}
            how = block, LAYERS, a["x"], a["x"], w, a
            block_forward(*how, first=first, **kept)
        self._acts["last"][:rows] = a["x"][:, -1]

    def _copy_first_row(self, rows, length):
        """Texts that are the same share what the first has computed."""
        for _, _, cache in self._layers:
            keys, values = cache["keys"], cache["values"]
            panels = -(-length // keys.shape[-1])
            keys[1:rows, :, :panels] = keys[:1, :, :panels]
            values[1:rows, :, :length] = values[:1, :, :length]
        self._acts["last"][1:rows] = self._acts["last"][:1]

    def _logits(self, rows):
        """The head of the model, for the last position of each text."""
        w, ends = self._weights, self._ends
        names = ends.norm.keeps(self.cfg, 1, rows, "lnf")
        names = "last", "lnf", "logits", *names
        a = {x: self._acts[x][:rows, None] for x in names}
        ends.norm.forward(LAYERS, "lnf", a["lnf"], a["last"], w, a)
        ends.head.forward(LAYERS, a["logits"], a["lnf"], w, {})
        return a["logits"][:, 0, : self.cfg.vocab_size].copy()


# %% a small model, and a text
rng = np.random.RandomState(15)
cfg = GPT2Config(64, 500, 3, 4, 48)
T, vocabulary = cfg.max_seq_len, cfg.vocab_size
text = rng.randint(0, vocabulary, T)

# %% a Decoder writes tags=["nbval-ignore-output"]
from llmnb.model.decode import Decoder
from llmnb.model.generate import generate, generate_samples, window_logits

model = GPT2(cfg, 1, T, "cpu", seed=15)
for weight in model.params.values():
    weight *= 4
decoder = Decoder.of(model, batch_size=3)
print(*generate(decoder, [1, 2, 3], 12, seed=1))
for group, size in decoder.memory.sizes().items():
    print(f"{group:<8} {size:9,} bytes")

# %% [markdown]
# ## Proof
#
# First the logits, against a forward pass over the whole window, at every
# length. Then whole texts, at several temperatures and cuts, 100 tokens each
# in a window of 64: it slides on the way.

# %% logits, bit by bit
model.forward(text[None])
same = [
    np.array_equal(decoder.following([text[:n]])[0], model.logits[0, n - 1])
    for n in range(1, T + 1)
]
verdict("logits", all(same), f"{T} lengths equal to the last bit")
same = [
    np.array_equal(decoder.following([text[:n]])[0], model.logits[0, n - 1])
    for n in rng.randint(1, T + 1, 40)
]
verdict("logits", all(same), "40 lengths in any order")

# %% texts, token by token
ways = {
    "greedy": {"temperature": 0},
    "as it says": {},
    "hot": {"temperature": 2},
    "top_k": {"top_k": 20},
    "top_p": {"top_p": 0.8, "temperature": 0.9},
}
for name, way in ways.items():
    same = 0
    for seed in range(4):
        prompt = rng.randint(0, vocabulary, 5 + 30 * seed).tolist()
        ask = {"tokens": prompt, "count": 100, "seed": seed, **way}
        same += [*generate(decoder, **ask)] == [*generate(model, **ask)]
    verdict(name, same == 4, "4 texts of 100 tokens, the same")

# %% three samples at once
ask = {"tokens": [7], "count": 100}
steps = [*generate_samples(decoder, **ask, samples=3, seed=20)]
for i in range(3):
    alone = [*generate(model, **ask, seed=20 + i)]
    got = [step[i] for step in steps]
    verdict(f"sample {i}", got == alone, f"the text of seed {20 + i}")

# %% [markdown]
# Would these checks notice a mistake? Two that are easily made. One decoder
# places each new token one position too low. Another trusts that a text only
# grows, and does not look whether its beginning is the same, so it goes on
# with **stale** keys.


# %% two mistakes, caught
class Shifted(Decoder):
    def _extend(self, tokens, first):
        super()._extend(tokens, max(0, first - 1))


class Trusting(Decoder):
    def _shared(self, texts):
        return min(self._held[1], texts.shape[1] - 1)


def agrees(kind):
    wrong = kind.of(model)
    texts = [[5, 6, 7], [5, 6, 7, 8], [5, 9, 7, 8, 1]]
    pairs = [(wrong.following([x]), window_logits(model, [x])) for x in texts]
    return [bool(np.array_equal(a, b)) for a, b in pairs]


print("Decoder ", agrees(Decoder))
verdict("off by one", agrees(Shifted) == [True, False, False], "is seen")
verdict("stale", agrees(Trusting) == [True, True, False], "is seen")

# %% [markdown]
# What has been proved holds for one machine. On another the vectors have
# another length, and a number may come from another order; there cached and
# recomputed agree with each other again, not with this machine. And it holds
# for float32 and float64. A model that was trained with products in bfloat16
# is read by a Decoder in float32: its texts are those of `GPT2` in float32.
#
# ## Measure it
#
# A model that is larger than the processor's cache: 6 blocks, 512 channels.
# Its weights are random; time does not depend on them. For each length $n$ we
# take the time of one more token with the cache, and of computing all $n$
# positions, with the same kernels. The prediction is (4.19.4) over the speed at
# which a copy moves memory.

# %% with and without tags=["nbval-ignore-output"]
import time

from llmnb.arena import Arena
from llmnb.model.tensors import parameter_shapes
from llmnb.model.init import init_params

mid = GPT2Config(512, 8192, 6, 8, 512)
arena = Arena({"params": (np.float32, parameter_shapes(mid))})
init_params(arena["params"], mid, 15)
writer = Decoder(mid, batch_size=8).adopt(arena["params"])
ids = rng.randint(0, mid.vocab_size, (8, 512))


def seconds(texts):
    start = time.perf_counter()
    writer.following(texts)
    return time.perf_counter() - start


lengths, cached, recomputed = (8, 32, 64, 128, 256, 504), [], []
seconds(ids[:1, 1:])  # what is compiled and touched for the first time
for n in lengths:
    recomputed.append(seconds(ids[:1, :n]))  # another text: nothing is kept
    cached.append(min(seconds(ids[:1, : n + i]) for i in range(1, 8)))
    writer.following([[1]])

# %% predicted and measured tags=["nbval-ignore-output"]
N = parameter_count(mid) - mid.max_seq_len * mid.channels
LC = mid.num_layers * mid.channels
block = np.ones((2, 1 << 25), np.float32)
speed = block.nbytes / fastest(np.copyto, *block, runs=5)
bound = [(4 * N + 8 * LC * n) / speed for n in lengths]
print(machine())
print("   n   cached  predicted   recomputed")
for n, a, p, b in zip(lengths, cached, bound, recomputed, strict=True):
    print(f"{n:4} {a * 1e3:5.1f} ms {p * 1e3:7.1f} ms {b * 1e3:9.1f} ms")
print("rows at once: ms a step, tokens a second")
for rows in (1, 2, 4, 8):
    writer.following(ids[:rows, :32])
    step = min(seconds(ids[:rows, : 32 + i]) for i in range(1, 8))
    print(f"{rows:4} {step * 1e3:8.1f} {rows / step:8.0f}")

# %% draw it
fig, ax = plt.subplots(figsize=(8, 3.8), dpi=100)
curves = {
    "recomputed": (recomputed, "o-", PALETTE["orange"]),
    "cached": (cached, "o-", PALETTE["blue"]),
    "memory's limit": (bound, "--", PALETTE["ink"]),
}
for name, (values, style, colour) in curves.items():
    ax.loglog(lengths, np.array(values) * 1e3, style, color=colour, label=name)
ax.set(xlabel="tokens so far", ylabel="ms for the next token")
ax.set_xticks(lengths, lengths)
ax.minorticks_off()
ax.legend(frameon=False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 4.20.1. The time of the next token against the length of the text, on
# logarithmic axes. Recomputed it grows with the length, as soon as there are
# more rows than memory leaves time for. Cached it hardly grows, and stays
# within some two times of reading the weights once, the dashed line.*
#
# How does that compare? [Chapter A.8](../appendix/08_racing.ipynb) races the decoder
# against `generate` of Hugging Face's transformers, which keeps keys and
# values as well, and checks that both write the same tokens. Where
# transformers is installed, the next cell does it with the same model;
# `llmnb bench --write` takes GPT-2 124M.

# %% against transformers tags=["nbval-ignore-output"]
from llmnb.bench.bench import bench_writers
from llmnb.bench.race import Settings
from llmnb.bench.report import report

try:
    print(report(bench_writers(mid, 32, 32, Settings(steps=3))))
except ChildProcessError as error:
    print("not installed here:", str(error).partition(" in ")[0])

# %% [markdown]
# ## Take away
#
# - `following` takes whole texts and gives the logits after them; what it keeps
#   is its own affair.
# - Weights that do not change are packed once, in the order in which they are
#   read; several texts at once cost little more than one.
#
# ## Design note
#
# The weights could be used where the model has them, unpacked: a decoder would
# share them with the model that trains. Then each call must turn a piece of
# the weight into columns, in registers or through the first cache. We measured
# that at two thirds of the speed. A copy costs memory and a moment of packing,
# and buys the last third for every token.
#
# Two other ways to read less are left aside. Weights in bfloat16 are half as
# many bytes, and would make a token nearly twice as fast; but the tokens would
# be those of a rounded model, and no longer equal to what the trained one
# says. And a **draft** model can guess several tokens that the large one then
# checks in one pass, like a prefill: faster, with a second model to train.
#
# ## Exercises
#
# **1** (★★). Cut one text into a prefill of $a$ tokens and single steps for
# the rest, for every $a$. Check that the last logits do not depend on $a$, to
# the last bit. Which property of (4.19.5) is it that you test?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# A fresh decoder is given the first $a$ tokens, then one more at a time. That
# a number does not depend on how many rows are computed with it.
# :::

# %% exercise 1, checked tags=["hide-cell"]
found, fresh = set(), Decoder.of(model)
for a in range(1, 20):
    fresh.following([[499]])  # another text: forget
    for n in range(a, 20):
        last = fresh.following([text[:n]])
    found.add(last.tobytes())
verdict("any cut", len(found) == 1, "19 ways, the same logits")

# %% [markdown]
# ## Further reading
#
# - Shazeer (2019),
#   [Fast Transformer Decoding: One Write-Head is All You Need](https://arxiv.org/abs/1911.02150):
#   section 2.4, the same count of bytes and operations, and keys shared by all
#   heads.
# - Pope et al. (2022),
#   [Efficiently Scaling Transformer Inference](https://arxiv.org/abs/2211.05102):
#   section 2, prefill and decoding as two different problems.
# - Kwon et al. (2023),
#   [Efficient Memory Management for Large Language Model Serving with
#   PagedAttention](https://arxiv.org/abs/2309.06180): what to do when many
#   texts of many lengths share one memory.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("4.20")
