# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     module: arena
# ---

# %% [markdown]
# # Lay out one block of memory
#
# > One allocation holds every tensor of the model as a named view, so the
# > footprint is known before training begins and never grows.

# %% [markdown]
# ## Where we are

# %% where we are
from llmnb.diagram import gpt2_diagram

gpt2_diagram(lit="all")

# %% [markdown]
# *Figure 2.1. Every box of the model reads arrays and writes arrays. This
# chapter decides, for all of them at once, where those arrays are.*
#
# A framework creates an array whenever a layer produces one, and frees it when
# nobody needs it any more. How much memory that takes is known only when it
# has run, and it may run out in the middle of the night. We know all shapes
# beforehand, so we can do better: add up the sizes, ask the system for memory
# *once*, and give every tensor its place. Such a block is called an *arena*.
# At the end of this chapter you can
#
# - say what a view is, and what a shape and strides do to plain bytes;
# - compute a model's footprint to the byte before it exists;
# - write a model to a file in llm.c's format, and read one without trusting
#   it.
#
# You need the sixteen tensors of [chapter 0](00_gpt2.ipynb).

# %% [markdown]
# ## Setup

# %% setup
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

from llmnb.config import parameter_shapes
from llmnb.diagram import PALETTE
from llmnb.verify import compare, verdict

# %% [markdown]
# ## By hand
#
# Memory is a row of bytes. A NumPy array is a note that says how to read some
# of them: where to begin, of which type the numbers are (*dtype*), how many
# there are along each axis (*shape*), and how many bytes to go forward for the
# next index of each axis (*strides*). Two such notes may point at the same
# bytes. The second is then a *view* of the first.
#
# Take 24 zeroed bytes and read them as six float32, then as a 2 x 3 matrix.
# An element $(i, j)$ of the matrix begins at byte $12 i + 4 j$.

# %% imports of the arena tags=["export"]
import math

import numpy as np

# %% three notes on the same bytes
block = np.zeros(24, np.uint8)
six = block.view(np.float32)
matrix = six.reshape(2, 3)
matrix[1, 0] = 1.0
print(matrix.strides)
print(six)
print(block)

# %% [markdown]
# We wrote through the matrix, and the other two saw it. In the bytes stands
# `0 0 128 63`: the float32 number 1.0 is the bit pattern `0x3f800000`, lowest
# byte first. The new values went to byte $12 \cdot 1 + 4 \cdot 0 = 12$, as
# computed.
#
# An array whose last index moves by one element, the one before by a whole
# row, and so on, is called *C-contiguous*. All arrays that layers read and
# write are, and that is why a (B, T, C) array can be read as (B·T, C) rows
# for free.

# %% [markdown]
# ## The arena
#
# So a table of names and shapes is enough to lay out a block: each tensor
# begins where the one before it ends,
#
# $$ \text{offset}_{k+1} = \text{offset}_k
#    + \text{itemsize}_k \prod_a \text{shape}_{k,a} . \tag{2.1} $$
#
# Two refinements. Tensors come in *groups*, such as all parameters, and a
# group leaves no gaps: AdamW then updates all parameters as one long flat
# array, and a file of them is one write. And a group begins at a multiple of
# 64 bytes. A processor moves memory in *cache lines*, which on most machines
# are that long, and so are the widest registers with which one instruction
# works on several numbers. A group that begins at such a border keeps loads
# from straddling two lines.

# %% a view tags=["exporti"]
ALIGN = 64  # bytes in a cache line, and in the widest vector register


def _round_up(n, to):
    return -(-n // to) * to


# %% allocate tags=["exporti"]
def _allocate(nbytes):
    try:
        block = np.zeros(nbytes + ALIGN, np.uint8)
    except MemoryError:
        raise MemoryError(
            f"the model needs one block of {nbytes:,} bytes, more than this "
            f"system gives; lower batch_size or seq_len, or the model's size"
        ) from None
    skip = -block.ctypes.data % ALIGN
    return block[skip : skip + nbytes]


# %% the arena tags=["export"]
class Arena:
    """One zeroed block of memory that holds named groups of named tensors.

    groups: a mapping from group name to (dtype, shapes), where shapes maps
    tensor names to shapes. The tensors of a group lie one after the other
    without a gap, so that a group is also one flat array; each group begins
    at a multiple of 64 bytes. The block is allocated once, here: the system
    hands out its pages, zeroed, when they are first written. Raises
    MemoryError, which says how many bytes were asked for.

    arena[group][tensor] is the view of a tensor; .nbytes the block's size.

    Derived in chapter 2.
    """

    def __init__(self, groups):
        self._rows, self._spans, offset = [], {}, 0
        for group, (dtype, shapes) in groups.items():
            dtype = np.dtype(dtype)
            start = offset = _round_up(offset, ALIGN)
            for name, shape in shapes.items():
                row = (group, name, tuple(shape), dtype, offset)
                self._rows.append(row)
                offset += math.prod(shape) * dtype.itemsize
            self._spans[group] = start, offset, dtype
        self.nbytes = _round_up(offset, ALIGN)
        self._block = _allocate(self.nbytes)
        self._views = {group: {} for group in groups}
        for group, name, shape, dtype, offset in self._rows:
            size = math.prod(shape) * dtype.itemsize
            flat = self._block[offset : offset + size].view(dtype)
            self._views[group][name] = flat.reshape(shape)

    def __getitem__(self, group):
        """The tensors of a group: a mapping from name to view."""
        return self._views[group]

    def flat(self, group):
        """A whole group as one 1-D view."""
        start, stop, dtype = self._spans[group]
        return self._block[start:stop].view(dtype)

    def table(self):
        """Rows (group, tensor, shape, dtype name, offset, bytes) in order."""
        return [
            (g, name, shape, d.name, at, math.prod(shape) * d.itemsize)
            for g, name, shape, d, at in self._rows
        ]

    def sizes(self):
        """Bytes of each group, padding left out."""
        return {g: stop - start for g, (start, stop, _) in self._spans.items()}


# %% a small arena
arena = Arena(
    {
        "params": (np.float32, {"weight": (2, 3), "bias": (2,)}),
        "batch": (np.int32, {"tokens": (2, 4)}),
    }
)
for row in arena.table():
    print(row)
print(arena.nbytes, "bytes")

# %% [markdown]
# The group `params` ends at byte 32, and `batch` begins at 64. A name gives a
# view, and a group is also one flat view:

# %% views of it
arena["params"]["weight"][...] = [[1, 2, 3], [4, 5, 6]]
arena["params"]["bias"][...] = [7, 8]
print(arena.flat("params"))

# %% [markdown]
# `np.zeros` does not write zeros. It asks the system for pages, and the
# system promises zeroed ones, each handed out when it is first written. So
# parts of the arena that a program never touches, the optimiser's averages
# when a model only generates text, cost address space and no memory.

# %% [markdown]
# ## The layout of GPT-2
#
# What must be in the arena? Four groups with the parameters' shapes
# (parameters, gradients and AdamW's two averages), and the activations:
# everything the forward pass computes and the backward pass needs. Each
# layer's chapter derives what its backward pass reads; here is the sum. In the
# code, a leading $L$ means that each of the model's blocks keeps its own.
#
# | tensors | shape | kept because |
# |---|---|---|
# | `encoded`, `residual2`, `residual3` | (B, T, C) | LayerNorm's backward reads its input |
# | `ln1`, `ln2`, `lnf` | (B, T, C) | the product that follows reads its input |
# | `ln1_mean`, `ln1_rstd` and so on | (B, T) | two numbers a row, [chapter 4](04_layernorm.ipynb) |
# | `qkv`, `atty`, `att_lse` | (B, T, 3C), (B, T, C), (B, NH, T) | attention, [chapter 6](06_attention.ipynb) |
# | `fch`, `fch_gelu` | (B, T, 4C) | GELU reads its input, the product its output |
# | `logits`, `lse`, `losses`, `dlosses` | (B, T, Vp), (B, T) | [chapter 9](09_crossentropy.ipynb) |

# %% imports of the layout tags=["export"] module="layout"
import numpy as np

from llmnb.config import parameter_shapes


# %% activations tags=["export"] module="layout"
def activation_shapes(cfg, batch_size, seq_len):
    """Shapes of what the forward pass leaves for the backward pass.

    A leading L marks what every block keeps for itself. By llm.c's names
    where it has one.

    Derived in chapter 2.
    """
    B, T, L = batch_size, seq_len, cfg.num_layers
    C, NH, Vp = cfg.channels, cfg.num_heads, cfg.padded_vocab_size
    return {
        "encoded": (B, T, C),
        "ln1": (L, B, T, C),
        "ln1_mean": (L, B, T),
        "ln1_rstd": (L, B, T),
        "qkv": (L, B, T, 3 * C),
        "atty": (L, B, T, C),
        "att_lse": (L, B, NH, T),
        "residual2": (L, B, T, C),
        "ln2": (L, B, T, C),
        "ln2_mean": (L, B, T),
        "ln2_rstd": (L, B, T),
        "fch": (L, B, T, 4 * C),
        "fch_gelu": (L, B, T, 4 * C),
        "residual3": (L, B, T, C),
        "lnf": (B, T, C),
        "lnf_mean": (B, T),
        "lnf_rstd": (B, T),
        "logits": (B, T, Vp),
        "lse": (B, T),
        "losses": (B, T),
        "dlosses": (B, T),
    }


# %% [markdown]
# The gradients of activations need less. When the backward pass is done with a
# block, it has no more use for the gradients inside it. One block's worth of
# arrays is enough, and the blocks take turns. The *residual stream*, the
# vector to which every half block adds, runs through all of them, and its
# gradient is one array, `dstream`, to which every half block adds in turn.
# GELU's gradient is written over the gradient that came in, and the logits'
# gradient over the logits.


# %% gradients of activations tags=["export"] module="layout"
def gradient_shapes(cfg, batch_size, seq_len):
    """Shapes of the gradients of activations: one block's worth.

    The blocks take turns with them. Gradients of the logits stand where the
    logits stood, and those of fch_gelu give their place to those of fch.

    Derived in chapter 2.
    """
    B, T, C = batch_size, seq_len, cfg.channels
    return {
        "dstream": (B, T, C),
        "dln": (B, T, C),
        "datty": (B, T, C),
        "dqkv": (B, T, 3 * C),
        "dfch": (B, T, 4 * C),
    }


# %% the whole layout tags=["export"] module="layout"
def gpt2_layout(cfg, batch_size, seq_len, dtype=np.float32):
    """The groups of the arena in which a GPT-2 trains.

    Four of the groups, params, grads, m and v, have the parameters' shapes;
    acts and block hold activations and their gradients, batch the tokens
    and targets (int32). A backend may add scratch memory of its own.

    Derived in chapter 2.
    """
    shapes = parameter_shapes(cfg)
    B, T = batch_size, seq_len
    return {
        "params": (dtype, shapes),
        "grads": (dtype, shapes),
        "m": (dtype, shapes),
        "v": (dtype, shapes),
        "acts": (dtype, activation_shapes(cfg, B, T)),
        "block": (dtype, gradient_shapes(cfg, B, T)),
        "batch": (np.int32, {"tokens": (B, T), "targets": (B, T)}),
    }


# %% the footprint of GPT-2 124M
from llmnb.config import GPT2Config


def footprint(cfg, B, T):
    sizes = {}
    for group, (dtype, shapes) in gpt2_layout(cfg, B, T).items():
        count = sum(math.prod(s) for s in shapes.values())
        sizes[group] = count * np.dtype(dtype).itemsize
    return sizes


for group, size in footprint(GPT2Config(), 4, 64).items():
    print(f"{group:<7} {size:>13,} bytes")

# %% [markdown]
# Nothing was allocated to find that out. It is a sum over shapes, and the
# arena takes exactly this, up to the padding between groups:

# %% predicted and real
small = GPT2Config(64, 1000, 2, 4, 64)
arena = Arena(gpt2_layout(small, 4, 64))
predicted = sum(footprint(small, 4, 64).values())
extra = arena.nbytes - predicted
verdict("footprint", 0 <= extra < 64 * 8, "as predicted, plus padding")
verdict(
    "one block", arena.flat("m").base is arena.flat("acts").base, "for all"
)

# %% [markdown]
# ## See it
#
# Parameters and their three companions are fixed. Activations grow with
# $B \cdot T$. At which length of four rows does the second part overtake the
# first?

# %% the footprint against the length
lengths = 2 ** np.arange(4, 11)
rows = [footprint(GPT2Config(), 4, int(T)) for T in lengths]
still = np.array([4 * r["params"] for r in rows]) / 1e9
moving = np.array([r["acts"] + r["block"] for r in rows]) / 1e9
fig, ax = plt.subplots(figsize=(7, 3.4), dpi=100)
at = np.arange(len(lengths))
top = ax.bar(at, moving, 0.6, still, color=PALETTE["orange"])
foot = ax.bar(at, still, 0.6, color=PALETTE["blue"])
names = "activations and their gradients", "parameters, gradients, m and v"
ax.legend((top, foot), names, loc="upper left", frameon=False, fontsize=11)
ax.set_xticks(at, [f"{T}" for T in lengths])
ax.set(xlabel="tokens in a row, T (B = 4)", ylabel="GB")
ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 2.2. GPT-2 124M in float32 with four rows. Up to T = 512 the
# parameters and their companions take most of the memory; at T = 1024 the
# activations and their gradients take nearly two thirds.*

# %% [markdown]
# ## Why the footprint is constant
#
# After the arena is made, a training step writes into views. No layer
# allocates its result, because the caller hands it the array to fill. That is
# why every layer of this book lists its outputs first and returns nothing.
# It is also checked: a test runs 200 training steps in a process and compares
# its peak memory after the first step and after the last.
#
# The fast layers are loops that the package numba compiles to machine code
# ([chapter 3](03_encoder.ipynb)), and such loops do not check bounds. A shape
# that does not fit would read or write some neighbour's bytes in the arena,
# and nobody would notice. So every compiled layer checks its arguments before
# it starts, with the functions below, and says in a sentence what is wrong.

# %% imports of the checks tags=["export"] module="checks"
import numpy as np


# %% check an array tags=["export"] module="checks"
def check_array(name, array, shape, dtype):
    """Raise unless `array` is a C-contiguous ndarray of this shape and dtype.

    name: what the message calls it, such as "layernorm_forward: out".
    Raises TypeError (not an array, wrong dtype) or ValueError (wrong shape,
    not contiguous).

    Derived in chapter 2.
    """
    if not isinstance(array, np.ndarray):
        kind = type(array).__name__
        raise TypeError(f"{name} must be a NumPy array, got {kind}")
    if array.dtype != dtype:
        want = np.dtype(dtype)
        raise TypeError(f"{name} must be {want}, got {array.dtype}")
    if array.shape != tuple(shape):
        raise ValueError(
            f"{name} must have shape {tuple(shape)}, got {array.shape}"
        )
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} must be C-contiguous")


# %% check a dtype tags=["export"] module="checks"
def check_float(name, array):
    """Raise TypeError unless `array` is a float32 or float64 ndarray.

    Derived in chapter 2.
    """
    kind = getattr(array, "dtype", type(array).__name__)
    if kind not in (np.float32, np.float64):
        raise TypeError(f"{name} must be float32 or float64, got {kind}")


# %% check tokens tags=["export"] module="checks"
def check_tokens(name, tokens, vocab_size):
    """Raise unless `tokens` are integers in [0, vocab_size).

    Raises TypeError (not integers) or ValueError, which names the first
    token that is out of range and where it stands.

    Derived in chapter 2.
    """
    kind = getattr(tokens, "dtype", type(tokens).__name__)
    if not np.issubdtype(kind, np.integer):
        raise TypeError(f"{name} must hold integers, got {kind}")
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        bad = (tokens < 0) | (tokens >= vocab_size)
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{name} must lie in [0, {vocab_size}), "
            f"got {tokens[where]} at {where}"
        )


# %% four complaints
good = np.zeros((2, 3), np.float32)
for bad in ([1.0], good.astype(np.float64), good[:1], good.T.copy().T):
    try:
        check_array("layer: out", bad, (2, 3), np.float32)
    except (TypeError, ValueError) as error:
        print(error)

# %% and one about tokens
try:
    check_tokens("tokens", np.array([[3, 1], [4, -1]]), 5)
except ValueError as error:
    print(error)

# %% [markdown]
# ## To a file and back
#
# A model on disk is its configuration and its parameters. llm.c's format is
# the plainest there is: a header of 256 int32 numbers, 1,024 bytes, and then
# the group `params`, byte for byte.
#
# | number | meaning |
# |---|---|
# | 0 | 20240326, which marks the file as a model |
# | 1 | 3, the version: float32 |
# | 2 to 7 | `max_seq_len`, `vocab_size`, `num_layers`, `num_heads`, `channels`, padded vocabulary |
# | 8 to 255 | zero |
#
# Writing goes through `replacing` from [chapter 0](00_gpt2.ipynb), in pieces
# of 16 MiB, so that no second copy of the model is made.

# %% imports of the checkpoint tags=["export"] module="checkpoint"
import os

import numpy as np

from llmnb.config import GPT2Config, parameter_count
from llmnb.files import replacing

# %% the header tags=["export"] module="checkpoint"
MAGIC, VERSION = 20240326, 3
HEADER = 256  # int32 numbers, 1,024 bytes
CHUNK = 1 << 22  # numbers read or written at a time: 16 MiB of float32


# %% write a checkpoint tags=["export"] module="checkpoint"
def write_checkpoint(path, cfg, params):
    """Write a model in llm.c's .bin format, version 3 (float32).

    params: the flat 1-D array of all parameters in the order of
    parameter_shapes(cfg). The file appears whole or not at all.

    Derived in chapter 2.
    """
    header = np.zeros(HEADER, "<i4")
    header[:8] = MAGIC, VERSION, *_sizes(cfg)
    with replacing(path) as file:
        file.write(header.tobytes())
        for first in range(0, params.size, CHUNK):
            part = params[first : first + CHUNK]
            file.write(part.astype("<f4", copy=False).data)


# %% the six sizes tags=["exporti"] module="checkpoint"
def _sizes(cfg):
    return (
        cfg.max_seq_len,
        cfg.vocab_size,
        cfg.num_layers,
        cfg.num_heads,
        cfg.channels,
        cfg.padded_vocab_size,
    )


# %% [markdown]
# A file comes from outside, and what comes from outside is not to be trusted.
# A download may have broken off; a file may be of another kind. The header's
# six numbers decide how much memory we ask for, so they are compared with the
# length of the file *before* anything is allocated.


# %% read a header tags=["export"] module="checkpoint"
def read_config(path):
    """The configuration in a checkpoint's header, checked against the file.

    Raises ValueError, naming the file, when it is not llm.c's .bin of
    version 3, when its sizes make no model, or when its length is not what
    these sizes require. Nothing is allocated before that is known.

    Derived in chapter 2.
    """
    with open(path, "rb") as file:
        raw = file.read(4 * HEADER)
    if len(raw) < 4 * HEADER:
        raise ValueError(
            f"{path}: {len(raw)} bytes are too few for a header of 1024"
        )
    magic, version, *sizes = np.frombuffer(raw, "<i4")[:8].tolist()
    if (magic, version) != (MAGIC, VERSION):
        raise ValueError(
            f"{path}: magic {magic} and version {version}, where a float32 "
            f"model has {MAGIC} and {VERSION}"
        )
    try:
        cfg = GPT2Config(*sizes[:5])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if cfg.padded_vocab_size != sizes[5]:
        raise ValueError(
            f"{path}: padded vocabulary {sizes[5]}, where "
            f"{cfg.vocab_size} tokens make {cfg.padded_vocab_size}"
        )
    _check_length(path, cfg)
    return cfg


# %% check the length tags=["exporti"] module="checkpoint"
def _check_length(path, cfg):
    count = parameter_count(cfg)
    want, got = 4 * HEADER + 4 * count, os.path.getsize(path)
    if got != want:
        raise ValueError(
            f"{path}: {got:,} bytes, where the header's model takes {want:,}"
        )


# %% read a checkpoint tags=["export"] module="checkpoint"
def read_checkpoint(path, params):
    """Read a checkpoint's parameters into a flat array, in place.

    params: 1-D, float32 or float64, as long as the file's model, whose
    header read_config has checked. Raises ValueError when the file is
    shorter.

    Derived in chapter 2.
    """
    with open(path, "rb") as file:
        file.seek(4 * HEADER)
        for first in range(0, params.size, CHUNK):
            part = params[first : first + CHUNK]
            body = np.fromfile(file, "<f4", count=part.size)
            if body.size != part.size:
                raise ValueError(
                    f"{path}: ends after {first + body.size:,} numbers, "
                    f"where the model has {params.size:,}"
                )
            part[...] = body


# %% there and back
folder = Path(tempfile.mkdtemp())
params = arena.flat("params")
params[...] = np.random.default_rng(2).normal(size=params.size)
write_checkpoint(folder / "model.bin", small, params)
again = np.zeros_like(params)
read_checkpoint(folder / "model.bin", again)
print(read_config(folder / "model.bin"))
compare("parameters", again, params, tol=1e-30)

# %% three bad files
whole = (folder / "model.bin").read_bytes()
header = np.frombuffer(whole[:1024], np.int32).copy()
header[4] = 12  # claims twelve blocks
bad_files = {
    "short.bin": whole[:-100],
    "other.bin": b"GGUF" + whole[4:],
    "liar.bin": header.tobytes() + whole[1024:],
}
for name, raw in bad_files.items():
    (folder / name).write_bytes(raw)
    try:
        read_config(folder / name)
    except ValueError as error:
        print(str(error).replace(f"{folder}{os.sep}", ""))

# %% [markdown]
# ## Any arrays in one file
#
# The header of a `.bin` has room for one kind of model. For anything else we
# use *safetensors*, the format of the Hugging Face hub, and it is much like
# our arena: a table of names, types, shapes and places, then the numbers.
#
# | bytes | meaning |
# |---|---|
# | 0 to 7 | $n$, the length of the table |
# | 8 to $8 + n$ | the table, as JSON: for each name its `dtype`, `shape` and `data_offsets`, counted from the table's end; under `__metadata__` pairs of strings |
# | the rest | the arrays one after the other, without a gap |
#
# The library `safetensors` writes such a file from a copy of all arrays in
# memory. Our models fill half of a machine's memory, so we write ourselves,
# one array after the other.

# %% imports of the container tags=["export"] module="tensors"
import json

import numpy as np

from llmnb.files import replacing

# %% types by their names tags=["export"] module="tensors"
DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "U64": "<u8",
    "I32": "<i4",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "|u1",
    "BF16": "<u2",  # read as float32; we write none
}
NAMES = {np.dtype(v): k for k, v in DTYPES.items() if k != "BF16"}


# %% write tensors tags=["export"] module="tensors"
def write_tensors(path, tensors, metadata=None):
    """Write named arrays as one safetensors file.

    tensors: a mapping from name to array, of any shape and a dtype in
    `DTYPES`, or TypeError is raised. metadata: a mapping from str to str.
    No more than one array is copied at a time. The file appears whole or
    not at all.

    Derived in chapter 2.
    """
    table, at = {"__metadata__": dict(metadata or {})}, 0
    # the widest numbers first, so that each array begins at a multiple of
    # its numbers' size
    order = sorted(tensors, key=lambda name: -tensors[name].itemsize)
    for name in order:
        x = tensors[name]
        table[name] = _entry(name, x, at)
        at += x.nbytes
    head = json.dumps(table).encode()
    head += b" " * (-len(head) % 8)
    with replacing(path) as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name in order:
            file.write(np.ascontiguousarray(tensors[name]).reshape(-1).data)


# %% a row of the table tags=["exporti"] module="tensors"
def _entry(name, x, at):
    kind = NAMES.get(x.dtype)
    if kind is None:
        known = ", ".join(d.name for d in NAMES)
        raise TypeError(
            f"write_tensors: {name} must be one of {known}, got {x.dtype}"
        )
    places = [at, at + x.nbytes]
    return {"dtype": kind, "shape": list(x.shape), "data_offsets": places}


# %% [markdown]
# Reading is the library's job: it knows how a table can lie. Names that
# overlap, offsets beyond the end, a shape that does not match its bytes, a
# table of a gigabyte: it refuses them all before a number is read. What it
# cannot give to NumPy is bfloat16, a type that NumPy does not have: the
# upper half of a float32. So after the library has checked the table we read
# the bytes ourselves, and put 16 zero bits below each bfloat16.


# %% read tensors tags=["export"] module="tensors"
class TensorFile:
    """The arrays of a safetensors file, each read when it is asked for.

    Raises ValueError, naming the file, when it is not a whole safetensors
    file, and OSError when it cannot be read. metadata: a dict of str. names:
    a list. file[name] is a new array; bfloat16 becomes float32. ValueError
    for a dtype that is not in `DTYPES`, KeyError for an unknown name.

    Derived in chapter 2.
    """

    def __init__(self, path):
        from safetensors import SafetensorError, safe_open

        self.path = path
        with open(path, "rb") as file:
            try:
                with safe_open(path, framework="numpy") as checked:
                    self.metadata = dict(checked.metadata() or {})
            except SafetensorError as error:
                raise ValueError(
                    f"{path}: not a whole safetensors file ({error})"
                ) from None
            size = int.from_bytes(file.read(8), "little")
            self._table = json.loads(file.read(size))
        self._table.pop("__metadata__", None)
        self._start = 8 + size
        self.names = list(self._table)

    def shape(self, name):
        """The shape of an array, a tuple; nothing is read."""
        return tuple(self._table[name]["shape"])

    def dtype(self, name):
        """The format's name for an array's type, such as "F32"."""
        return self._table[name]["dtype"]

    def __getitem__(self, name):
        kind, (start, stop) = self.dtype(name), self._span(name)
        if kind not in DTYPES:
            raise ValueError(f"{self.path}: {name} is {kind}, not a number")
        offset, dtype = self._start + start, np.dtype(DTYPES[kind])
        count = (stop - start) // dtype.itemsize
        x = np.fromfile(self.path, dtype, count, offset=offset)
        if x.size != count:
            raise ValueError(f"{self.path}: ends within {name}")
        if kind == "BF16":
            x = (x.astype(np.uint32) << 16).view(np.float32)
        return x.reshape(self.shape(name))

    def _span(self, name):
        return self._table[name]["data_offsets"]


# %% any arrays, there and back
from llmnb.tensors import TensorFile, write_tensors

arrays = {
    "weights": np.random.default_rng(3).normal(size=(3, 5)).T,
    "step": np.array(17),
    "nothing": np.zeros((0, 4), np.float32),
}
write_tensors(folder / "any.safetensors", arrays, {"note": "hello"})
file = TensorFile(folder / "any.safetensors")
print(file.metadata, {x: file.shape(x) for x in file.names})
same = all(np.array_equal(file[x], arrays[x]) for x in arrays)
verdict("arrays", same, "come back to the last bit")

# %% a file that ends early
whole = (folder / "any.safetensors").read_bytes()
(folder / "short.safetensors").write_bytes(whole[:-8])
try:
    TensorFile(folder / "short.safetensors")
except ValueError as error:
    print(str(error).replace(f"{folder}{os.sep}", ""))

# %% [markdown]
# ## For other programs
#
# Most programs that read GPT-2 expect Hugging Face's layout: one file in the
# *safetensors* format, a table of names, shapes and offsets followed by the
# numbers, much like our arena. The names are others, each block's tensors
# stand by themselves, the four matrices of a block are stored transposed,
# (inputs, outputs), and there is no padding. The library `safetensors`
# writes the file; we give it the tensors under their names.


# %% names elsewhere tags=["export"] module="checkpoint"
OUTER = {
    "wte": "wte.weight",
    "wpe": "wpe.weight",
    "lnfw": "ln_f.weight",
    "lnfb": "ln_f.bias",
}
INNER = {
    "ln1": "ln_1",
    "qkv": "attn.c_attn",
    "attproj": "attn.c_proj",
    "ln2": "ln_2",
    "fc": "mlp.c_fc",
    "fcproj": "mlp.c_proj",
}


# %% write safetensors tags=["export"] module="checkpoint"
def write_safetensors(path, cfg, params):
    """Write a model as safetensors, in Hugging Face's layout of GPT-2.

    params: a mapping from llm.c's names to arrays, as `GPT2.params`. The
    tensors are float32, without padding. The file appears whole or not at
    all.

    Derived in chapter 2.
    """
    from safetensors.numpy import save

    tensors = {OUTER[n]: params[n] for n in OUTER}
    tensors["wte.weight"] = params["wte"][: cfg.vocab_size]
    for layer in range(cfg.num_layers):
        for ours, theirs in INNER.items():
            weight, bias = params[ours + "w"][layer], params[ours + "b"][layer]
            name = f"h.{layer}.{theirs}"
            tensors[f"{name}.weight"] = weight.T
            tensors[f"{name}.bias"] = bias
    tensors = {
        name: np.ascontiguousarray(x, np.float32)
        for name, x in tensors.items()
    }
    with replacing(path) as file:
        file.write(save(tensors, metadata={"format": "pt"}))


# %% what is in the file
from safetensors.numpy import load_file

write_safetensors(folder / "model.safetensors", small, arena["params"])
tensors = load_file(folder / "model.safetensors")
for name in list(tensors)[:4]:
    print(name, tensors[name].shape)
qkvw = arena["params"]["qkvw"]
compare("qkvw", tensors["h.1.attn.c_attn.weight"].T, qkvw[1], tol=1e-30)

# %% [markdown]
# ## Count it
#
# The memory of a model that trains is, in numbers of four bytes,
#
# $$ M = 4 N + B T \left( L \cdot 16 C + 12 C + V_p \right) + \dots \tag{2.2} $$
#
# with $16 C$ numbers kept for each token by each block (five arrays of width
# $C$, one of $3C$, two of $4C$) and, once for all blocks, $12 C$ more:
# `encoded`, `lnf`, and the $10 C$ of a block's gradients. $N$ counts the
# parameters with the padding here, and the dots stand for the narrow arrays.

# %% equation (2.2) against the table
cfg, B, T = GPT2Config(), 4, 1024
L, C, Vp = cfg.num_layers, cfg.channels, cfg.padded_vocab_size
N = sum(math.prod(s) for s in parameter_shapes(cfg).values())
formula = 4 * (4 * N + B * T * (L * 16 * C + 12 * C + Vp))
exact = sum(footprint(cfg, B, T).values())
print(f"{exact / 1e9:.3f} GB, by the formula {formula / 1e9:.3f} GB")
verdict("narrow arrays", 0 < exact - formula < 0.01 * exact, "take below 1 %")

# %% [markdown]
# ## Take away
#
# - An array is bytes and a note on how to read them; a view is a second note.
# - All shapes are known before the first step, so all memory can be laid out
#   in one block; its size is a sum you can do beforehand.
# - Forward activations are kept for every block, gradients of activations for
#   one.
# - Headers are checked against the file before they are believed.

# %% [markdown]
# ## Design note
#
# The arena keeps what the backward pass needs, and no more. One can keep less
# still: drop `ln1`, `ln2` and `fch_gelu` and recompute them on the way back,
# which saves $6 C$ of the $16 C$ numbers a block and costs two LayerNorms and
# a GELU more; or keep only each block's input and run its forward pass again,
# which costs a third more arithmetic. The plain layout is the one to
# understand first, and on a CPU time is scarcer than memory.
#
# Another way to save is to free arrays early and let later ones take their
# place, as compilers do with registers. It would make the table harder to
# read and save little: nearly all activations live until the backward pass
# comes by.

# %% [markdown]
# ## Exercises
#
# **1** (★). At which byte of a float32 array of shape (4, 8, 768) does the
# element (2, 5, 7) begin?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# $4 \cdot (2 \cdot 8 \cdot 768 + 5 \cdot 768 + 7) = 64540$.
# :::

# %% exercise 1 tags=["hide-cell"]
answer = 4 * (2 * 8 * 768 + 5 * 768 + 7)

# %% exercise 1, checked
strides = np.empty((4, 8, 768), np.float32).strides
verdict("byte", answer == np.dot((2, 5, 7), strides), f"is {answer}")

# %% [markdown]
# **2** (★★). You have 8 GB for GPT-2 124M and rows of 1,024 tokens. How many
# rows can a batch have?
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# Compute the footprint for one row and for two; it is linear in $B$.
# :::

# %% exercise 2 tags=["hide-cell"]
one, two = (sum(footprint(GPT2Config(), b, 1024).values()) for b in (1, 2))
most = int((8e9 - (2 * one - two)) // (two - one))

# %% exercise 2, checked
fits = [sum(footprint(GPT2Config(), most + k, 1024).values()) for k in (0, 1)]
verdict(f"{most} rows", fits[0] <= 8e9 < fits[1], "fit, one more does not")

# %% [markdown]
# **3** (★★★). Write a function that finds the tensor that holds a given byte
# of the arena. What can it say about the bytes between two groups?
#
# :::{admonition} Solution to exercise 3
# :class: dropdown
# The table is sorted by offset, so a bisection would do; a scan is short
# enough. Bytes between groups belong to nobody, and the function returns None.
# :::


# %% exercise 3 tags=["hide-cell"]
def owner(arena, byte):
    for group, name, _, _, offset, size in arena.table():
        if offset <= byte < offset + size:
            return group, name
    return None


# %% exercise 3, checked
tiny = Arena({g: (np.int32, {g: (3,)}) for g in "ab"})
found = [owner(tiny, byte) for byte in (0, 11, 12, 64)]
print(found)
verdict("owners", found == [("a", "a")] * 2 + [None, ("b", "b")], "are right")

# %% [markdown]
# ## Further reading
#
# - NumPy's manual on
#   [the internal organisation of arrays](https://numpy.org/doc/stable/dev/internals.html):
#   shape, strides and views, with more examples.
# - Hanson (1990),
#   [Fast allocation and deallocation of memory based on object lifetimes](https://doi.org/10.1002/spe.4380200104):
#   the arena as a general technique.
# - Chen et al. (2016),
#   [Training Deep Nets with Sublinear Memory Cost](https://arxiv.org/abs/1604.06174):
#   what the design note calls running the forward pass again.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.index import gained

gained("02_memory")
