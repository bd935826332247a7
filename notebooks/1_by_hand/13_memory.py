# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       arena: "One block of memory that holds named groups of named tensors."
#       model.layout: "The groups of tensors in which a GPT-2 trains."
#       formats.checkpoint: "Models on disk, in every format that is known."
#       formats.safetensors: "Any named arrays in one file, by the safetensors library."
# ---

# %% [markdown]
# # Memory: one block for everything
#
# > One allocation holds every tensor of the model as a named view, so the
# > footprint is known before training begins and never grows.
#
# *Reading time: 22 minutes. You need: the block of
# [chapter 1.30](30_block.ipynb).*

# %% [markdown]
# ## Where we are

# %% where we are
from llmnb.book.diagram import gpt2_diagram

gpt2_diagram(lit="all")

# %% [markdown]
# *Figure 1.13.1. Every box of the model reads arrays and writes arrays. This
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
# - say which arrays must be kept, and which may share their bytes.

# %% [markdown]
# ## Setup

# %% setup
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

from llmnb.model.tensors import parameter_shapes
from llmnb.book.diagram import PALETTE
from llmnb.book.verify import compare, verdict

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
#    + \text{itemsize}_k \prod_a \text{shape}_{k,a} . \tag{1.13.1} $$
#
# Two refinements. Tensors come in *groups*, such as all parameters, and a
# group leaves no gaps: AdamW then updates all parameters as one long flat
# array, and a file of them is one write. And a group begins at a multiple of
# 64 bytes. A processor moves memory in *cache lines*, which on most machines
# are that long, and so are the widest registers with which one instruction
# works on several numbers. A group that begins at such a border keeps loads
# from straddling two lines.
#
# A third refinement saves memory: two groups of which only one is in use at
# any time can have the same bytes. The second then begins where the first
# begins, and what follows begins after the longer one.

# %% a view tags=["exporti"]
ALIGN = 64  # bytes in a cache line, and in the widest vector register


def _round_up(n, to):
    return -(-n // to) * to


# %% allocate tags=["exporti"]
def _zeros(nbytes):
    block = np.zeros(nbytes + ALIGN, np.uint8)
    skip = -block.ctypes.data % ALIGN
    return block[skip : skip + nbytes]


def _allocate(nbytes, zeros):
    try:
        return zeros(nbytes)
    except MemoryError:
        raise MemoryError(
            f"the model needs one block of {nbytes:,} bytes, more than this "
            f"system gives; lower batch_size or seq_len, or the model's size"
        ) from None


# %% the arena tags=["export"]
class Arena:
    """One zeroed block of memory that holds named groups of named tensors.

    groups: a mapping from group name to (dtype, shapes), where shapes maps
    tensor names to shapes. The tensors of a group lie one after the other
    without a gap, so that a group is also one flat array; each group begins
    at a multiple of 64 bytes. (dtype, shapes, True) lays a group over the
    one before it: both begin at the same byte. The block is allocated once,
    here: the system hands out its pages, zeroed, when they are first
    written. zeros: a function from a number of bytes to such a block, a 1-D
    uint8 array, where memory is not the host's. Raises MemoryError, which
    says how many bytes were asked for.

    arena[group][tensor] is the view of a tensor; .nbytes the block's size.
    """

    def __init__(self, groups, zeros=_zeros):
        self._rows, self._spans, start, end = [], {}, 0, 0
        for group, (dtype, shapes, *over) in groups.items():
            dtype = np.dtype(dtype)
            offset = start = start if over else _round_up(end, ALIGN)
            for name, shape in shapes.items():
                row = (group, name, tuple(shape), dtype, offset)
                self._rows.append(row)
                offset += math.prod(shape) * dtype.itemsize
            self._spans[group] = start, offset, dtype
            end = max(end, offset)
        self.nbytes = _round_up(end, ALIGN)
        self._block = _allocate(self.nbytes, zeros)
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


# %% overwrite a tensor tags=["export"]
def put(array, values):
    """Overwrite an array, on the host or on a device, with a host's values.

    values: an array of the same shape, of any dtype that can be converted.
    """
    if isinstance(array, np.ndarray):
        np.copyto(array, values, casting="unsafe")
    else:
        array.copy_to_device(np.ascontiguousarray(values, array.dtype))


# %% [markdown]
# `zeros` and `put` are for a block that is not in the processor's own
# memory. That of a GPU can be cut and viewed like any other, and NumPy
# cannot write into it: [chapter 1.15](15_model.ipynb) trains there.

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
#
# And here are two groups in one place. What is written to one is seen, as
# other bits, in the other:

# %% one group over another
both = {"a": (np.float32, {"x": (2,)}), "b": (np.int32, {"y": (3,)}, True)}
shared = Arena(both)
shared["a"]["x"][...] = 1.0
print(shared.table())
print(shared["b"]["y"], "in", shared.nbytes, "bytes")
verdict("the bits", hex(shared["b"]["y"][0]) == "0x3f800000", "are 1.0's")

# %% [markdown]
# So an overlay asks for care, and this book has one, below.

# %% [markdown]
# ## The layout of GPT-2
#
# What must be in the arena? Four groups with the parameters' shapes
# (parameters, gradients and AdamW's two averages), and the activations:
# what the forward pass computes and the backward pass needs. Each
# layer's chapter derives what its backward pass reads; here is the sum. In the
# code, a leading $L$ means that each of the model's blocks keeps its own.
#
# | tensors | shape | kept because |
# |---|---|---|
# | `encoded`, `residual2`, `residual3` | (B, T, C) | LayerNorm's backward reads its input |
# | `lnf` | (B, T, C) | the product that follows reads its input |
# | `ln1_mean`, `ln1_rstd` and so on | (B, T) | two numbers a row, [chapter 1.6](06_layernorm.ipynb) |
# | `qkv`, `atty`, `att_lse` | (B, T, 3C), (B, T, C), (B, NH, T) | attention, [chapter 1.8](08_attention.ipynb) |
# | `fch` | (B, T, 4C) | GELU reads its input |
# | `logits`, `lse`, `losses`, `dlosses` | (B, T, Vp), (B, T) | [chapter 1.11](11_crossentropy.ipynb) |
#
# Three arrays of a block are missing there, and the products that follow
# them do read them in the backward pass: the outputs of the two LayerNorms
# and of GELU. They take $6C$ numbers a token and block, and their inputs are
# kept anyway. So the backward pass computes them again, one block's at a
# time, which costs about one part in a hundred of a step.

# %% imports of the layout tags=["export"] module="model.layout"
import math

import numpy as np

from llmnb.model.parts import block_of
from llmnb.model.tensors import full_shape, tensor_table


# %% activations tags=["export"] module="model.layout"
def block_activations(cfg, batch_size, seq_len):
    """Shapes of what each block's forward pass leaves for its backward pass."""
    B, T = batch_size, seq_len
    norm, attention, feedforward = block_of(cfg)
    stream = dict.fromkeys(("residual2", "residual3"), (B, T, cfg.channels))
    kept = stream | attention.keeps(cfg, B, T) | feedforward.keeps(cfg, B, T)
    for name in ("ln1", "ln2"):
        kept |= norm.keeps(cfg, B, T, name)
    return kept


def activation_shapes(cfg, batch_size, seq_len):
    """Shapes of what the forward pass leaves for the backward pass.

    A leading L marks what every block keeps for itself. By llm.c's names
    where it has one. What has rows of channels comes first: where C is a
    multiple of 4, each such row then begins at one of 16 bytes. The logits
    are a group by themselves.
    """
    B, T, C = batch_size, seq_len, cfg.channels
    own = block_activations(cfg, B, T)
    shapes = dict.fromkeys(("encoded", "lnf"), (B, T, C))
    shapes |= {name: (cfg.num_layers, *own[name]) for name in own}
    shapes |= block_of(cfg).norm.keeps(cfg, B, T, "lnf")
    shapes |= dict.fromkeys(("lse", "losses", "dlosses"), (B, T))
    return dict(sorted(shapes.items(), key=lambda x: x[1][-2:][:1] != (T,)))


# %% [markdown]
# The gradients of activations need less. When the backward pass is done with a
# block, it has no more use for the gradients inside it. One block's worth of
# arrays is enough, and the blocks take turns; so they do with what is
# computed again. The *residual stream*, the vector to which every half block
# adds, runs through all of them, and its gradient is one array, `dstream`,
# to which every half block adds in turn. GELU's gradient is written over the
# gradient that came in, and the logits' gradient over the logits.
#
# When are the logits in use? From the end of the forward pass, when all
# blocks are done, to the beginning of the backward pass, before any block's
# turn. So the group that the blocks take turns with lies over the logits.
# `dstream` and `dln` stay outside: they receive the gradient that comes from
# the logits.
#
# ```text
#           forward                     backward
#           blocks ...      head        head          blocks ...
#           block           logits      the gradient  block
#                                       of logits
# ```


# %% gradients of activations tags=["export"] module="model.layout"
def gradient_shapes(cfg, batch_size, seq_len):
    """Shapes of the gradients that run through all blocks.

    dln is that of any LayerNorm's output, dstream that of the stream.
    """
    B, T, C = batch_size, seq_len, cfg.channels
    return {"dstream": (B, T, C), "dln": (B, T, C)}


# %% what blocks take turns with tags=["export"] module="model.layout"
def block_shapes(cfg, batch_size, seq_len):
    """Shapes of what one block needs at a time, in either direction.

    ln is the output of ln1, then of ln2.
    """
    B, T = batch_size, seq_len
    _, attention, feedforward = block_of(cfg)
    turns = attention.turns(cfg, B, T) | feedforward.turns(cfg, B, T)
    return {"ln": (B, T, cfg.channels)} | turns


# %% [markdown]
# In the four groups with the parameters' shapes, those that weight decay applies
# to come first ([chapter 1.12](12_adamw.ipynb)): then each of the two sorts is
# one range of memory, and an update of all parameters is two calls.


# %% the whole layout tags=["export"] module="model.layout"
def parameter_layout(cfg):
    """Shapes of all parameters as they lie in memory: who decays first."""
    rows = sorted(tensor_table(cfg), key=lambda x: not x.decays)
    return {x.name: full_shape(x, cfg) for x in rows}


def gpt2_layout(cfg, batch_size, seq_len, dtype=np.float32):
    """The groups of the arena in which a model trains.

    Four of the groups, params, grads, m and v, have the parameters' shapes;
    acts and dacts hold activations and their gradients, batch the tokens
    and targets (int32). block, what the blocks take turns with, lies over
    the logits. A backend may add scratch memory of its own.
    """
    B, T = batch_size, seq_len
    shapes = parameter_layout(cfg)
    groups = dict.fromkeys(("params", "grads", "m", "v"), (dtype, shapes))
    return groups | {
        "acts": (dtype, activation_shapes(cfg, B, T)),
        "dacts": (dtype, gradient_shapes(cfg, B, T)),
        "logits": (dtype, {"logits": (B, T, cfg.padded_vocab_size)}),
        "block": (dtype, block_shapes(cfg, B, T), True),
        "batch": (np.int32, {"tokens": (B, T), "targets": (B, T)}),
    }


# %% bytes of each group tags=["export"]
def footprint(layout):
    """Bytes of each group of an arena, as a dict, before there is one.

    layout: as Arena takes it. A group that lies over another counts for
    what it is longer, so that the sum is what the arena takes, up to the
    padding between groups.
    """
    sizes, before = {}, 0
    for group, (dtype, shapes, *over) in layout.items():
        count = sum(math.prod(shape) for shape in shapes.values())
        size = count * np.dtype(dtype).itemsize
        sizes[group] = max(0, size - before) if over else size
        before = size
    return sizes


# %% the footprint of GPT-2 124M
from llmnb.config import GPT2Config


for group, size in footprint(gpt2_layout(GPT2Config(), 4, 64)).items():
    print(f"{group:<7} {size:>13,} bytes")

# %% [markdown]
# Nothing was allocated to find that out. It is a sum over shapes, and the
# arena takes exactly this, up to the padding between groups:

# %% predicted and real
small = GPT2Config(64, 1000, 2, 4, 64)
arena = Arena(gpt2_layout(small, 4, 64))
predicted = sum(footprint(gpt2_layout(small, 4, 64)).values())
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
rows = [footprint(gpt2_layout(GPT2Config(), 4, int(T))) for T in lengths]
still = np.array([4 * r["params"] for r in rows]) / 1e9
moving = np.array([sum(r.values()) for r in rows]) / 1e9 - still
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
# *Figure 1.13.2. GPT-2 124M in float32 with four rows. Up to T = 512 the
# parameters and their companions take most of the memory; at T = 1024 the
# activations and their gradients take more than half.*

# %% [markdown]
# ## Why the footprint is constant
#
# After the arena is made, a training step writes into views. No layer
# allocates its result, because the caller hands it the array to fill. That is
# why every layer of this book lists its outputs first and returns nothing.
# It is also checked: a test runs 200 training steps in a process and compares
# its peak memory after the first step and after the last. Before a layer runs
# it looks at what it is given ([appendix A.9](../appendix/09_checks.ipynb)).

# %% [markdown]
# ## To a file and back
#
# A model on disk is its configuration and its parameters. llm.c's format is
# the plainest there is: a header of 256 int32 numbers, 1,024 bytes, and then
# the group `params`, number for number.
#
# | number | meaning |
# |---|---|
# | 0 | 20240326, which marks the file as a model |
# | 1 | the version: 3 for float32, 5 for bfloat16 |
# | 2 to 7 | `max_seq_len`, `vocab_size`, `num_layers`, `num_heads`, `channels`, padded vocabulary |
# | 8 to 253 | zero |
# | 254 | 1 if a checksum follows, else zero |
# | 255 | the checksum, CRC-32, of the numbers and then of the header without it |
#
# llm.c writes zeros behind number 7 and does not look at them, so the last
# two are ours: a weight with a flipped bit is still a number, and only a sum
# tells. It stands in the file itself, since a sum in a file of its own could
# be of another day when the machine stops between the two. Files without one
# are read as ever.
#
# *bfloat16* is the upper half of a float32: the sign, all eight bits of the
# exponent, and seven of the 23 bits behind the point. It reads back by putting
# 16 zero bits below. To write it we must round. Let $u$ be a float32's 32
# bits, taken as a whole number. The bits of positive floats count upwards as
# the floats do, so rounding the number is rounding $u / 2^{16}$ to a whole
# number. Adding half, $2^{15}$, and dropping 16 bits rounds to the nearest,
# and a tie upwards. IEEE sends a tie to the even neighbour, that is, down
# when bit 16 of $u$ is 0. So add one less in that case:
#
# $$ \text{bf16}(u) = \Big\lfloor \frac{u + 2^{15} - 1 + b_{16}(u)}{2^{16}}
#    \Big\rfloor , \tag{1.13.2} $$
#
# where $b_{16}(u)$ is bit 16. A carry runs from the fraction into the exponent,
# which is right: above the largest fraction comes the next power of two, and
# above the largest number infinity. What (1.13.2) spoils is NaN, whose fraction
# is not zero but may be in its upper half, or overflow. So a NaN is cut
# off instead, with one bit set.

# %% imports of the checkpoint tags=["export"] module="formats.checkpoint"
import os
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llmnb.checks import check_array
from llmnb.config import GPT2Config
from llmnb.files import make_folder, read_small, replacing, what_is
from llmnb.model.tensors import (
    parameter_count,
    parameter_shapes,
    tensor_table,
)


# %% to bfloat16 and back tags=["export"] module="formats.checkpoint"
def to_bfloat16(x):
    """The 16 bits of the bfloat16 nearest to each number, equation (1.13.2).

    x: float32, of any shape. Returns uint16 of the same shape. A tie goes
    to the even neighbour, what is too large to infinity; NaN stays NaN.
    """
    bits = x.view(np.uint32)
    nearest = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    cut = bits >> 16 | 0x40
    return np.where(np.isnan(x), cut, nearest).astype(np.uint16)


def from_bfloat16(bits):
    """The float32 numbers that bfloat16 bits (uint16) stand for, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


# %% four numbers, rounded
numbers = [1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, np.nan]
halves = to_bfloat16(np.array(numbers, np.float32))
print([f"{h:04x}" for h in halves])

# %% [markdown]
# The first two lie halfway between neighbours and went to the even one, one
# down and one up; the third lies above the largest bfloat16 by more than half a
# step, and became infinity; NaN stayed NaN. [Chapter 4.4](../4_practice/04_published.ipynb) proves the rounding for every
# bfloat16 and measures what it does to a model.
#
# Writing goes through `replacing` from [chapter 1.4](04_gpt2.ipynb), in pieces
# of 4 Mi numbers, so that no second copy of the model is made.

# %% the header tags=["export"] module="formats.checkpoint"
MAGIC = 20240326
BODIES = {3: "<f4", 5: "<u2"}  # a version and how its numbers are stored
HEADER = 256  # int32 numbers, 1,024 bytes
SUMMED = 1  # in a header with a checksum, the last number but one
CHUNK = 1 << 22  # numbers read or written at a time: 16 MiB of float32


# %% write a checkpoint tags=["export"] module="formats.checkpoint"
def write_checkpoint(path, cfg, params, version=3):
    """Write a model in llm.c's .bin format.

    params: a mapping from llm.c's names to arrays, as `GPT2.params`. version: 3 for float32, 5 for bfloat16, rounded
    from float32 to nearest; ValueError for another. The file appears whole
    or not at all.
    """
    if version not in BODIES:
        raise ValueError(
            f"write_checkpoint: version must be 3 (float32) or 5 (bfloat16), "
            f"got {version!r}"
        )
    header = np.zeros(HEADER, "<u4")
    header[:8] = MAGIC, version, *_sizes(cfg)
    header[-2], total = SUMMED, 0
    with replacing(path) as file:
        file.write(header.data)
        for part in _pieces(params[x] for x in parameter_shapes(cfg)):
            part = part.astype(np.float32, copy=False)
            body = to_bfloat16(part) if version == 5 else part
            body = body.astype(BODIES[version], copy=False).data
            total = zlib.crc32(body, total)
            file.write(body)
        header[-1] = zlib.crc32(header, total)
        file.seek(0)
        file.write(header.data)


# %% pieces, and the six sizes tags=["exporti"] module="formats.checkpoint"
def _pieces(arrays):
    """Some arrays, flat, as views of at most CHUNK numbers."""
    for array in arrays:
        flat = np.asarray(array).reshape(-1)
        for first in range(0, flat.size, CHUNK):
            yield flat[first : first + CHUNK]


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


# %% read a header tags=["exporti"] module="formats.checkpoint"
def _bin_header(path):
    """Version and configuration of a .bin, checked against its length."""
    with open(path, "rb") as file:
        raw = file.read(4 * HEADER)
    if what := what_is(path, MAGIC):
        raise ValueError(f"{path}: {what}")
    if len(raw) < 4 * HEADER:
        raise ValueError(
            f"{path}: {len(raw)} bytes are too few for a header of 1024"
        )
    magic, version, *sizes = np.frombuffer(raw, "<i4")[:8].tolist()
    if magic != MAGIC or version not in BODIES:
        raise ValueError(
            f"{path}: magic {magic} and version {version}, where a model "
            f"has {MAGIC} and 3 or 5"
        )
    cfg = _config(path, sizes[:5])
    if cfg.padded_vocab_size != sizes[5]:
        raise ValueError(
            f"{path}: padded vocabulary {sizes[5]}, where "
            f"{cfg.vocab_size} tokens make {cfg.padded_vocab_size}"
        )
    _check_length(path, version, cfg)
    return version, cfg


# %% check the sizes and the length tags=["exporti"] module="formats.checkpoint"
def _config(path, sizes):
    try:
        return GPT2Config(*sizes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _check_length(path, version, cfg):
    width = np.dtype(BODIES[version]).itemsize
    want = 4 * HEADER + width * parameter_count(cfg)
    got = os.path.getsize(path)
    if got != want:
        raise ValueError(
            f"{path}: {got:,} bytes, where the header's model takes {want:,}"
        )


# %% read a .bin tags=["exporti"] module="formats.checkpoint"
def _read_bin(path, version, params):
    """Fill params, checked before, from the numbers behind the header."""
    with open(path, "rb") as file:
        header, total = np.fromfile(file, "<u4", HEADER), 0
        for name, array in params.items():
            for part in _pieces([array]):
                body = np.fromfile(file, BODIES[version], part.size)
                if body.size != part.size:
                    raise ValueError(f"{path}: ends within {name}")
                total = zlib.crc32(body, total)
                part[...] = from_bfloat16(body) if version == 5 else body
    _check_sum(path, header, total)


def _check_sum(path, header, total):
    """Raise unless a .bin has the sum that its header keeps, if any."""
    marked, kept = header[-2:].tolist()
    header[-1] = 0
    if marked == SUMMED and kept != zlib.crc32(header, total):
        raise ValueError(
            f"{path} is damaged, its checksum is not the one in its header: "
            "take another copy, or write it anew, as `llmnb train --resume` "
            "does for a run"
        )


# %% three bad files
folder = Path(tempfile.mkdtemp())
params = arena.flat("params")
params[...] = np.random.default_rng(2).normal(size=params.size)
write_checkpoint(folder / "model.bin", small, arena["params"])
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
        _bin_header(folder / name)
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

# %% [markdown]
# A disk, a memory or a copy may flip a bit, and a weight with a flipped bit is
# still a number. So a sum is kept of each array, CRC-32, in the metadata,
# which other programs pass over. It covers the array's bytes and whatever says
# how to read them: its name, type and shape, and the other metadata.
# The sums are known when the arrays are written, so the table, whose length
# they do not change, is written twice. CRC-32 finds accidents, not intent: who
# wants to deceive computes it anew.

# %% imports of the container tags=["export"] module="formats.safetensors"
import json
import zlib

import numpy as np

from llmnb.files import replacing, what_is

# %% types by their names tags=["export"] module="formats.safetensors"
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
LONGEST_TABLE = 1 << 23  # bytes; a GPT-2 of 48 blocks takes 64 thousand
_SUMS = "llmnb.crc32"  # where the metadata keep the sums, as JSON


# %% write tensors tags=["export"] module="formats.safetensors"
def write_tensors(path, tensors, metadata=None):
    """Write named arrays as one safetensors file.

    tensors: a mapping from name to array, of any shape and a dtype in
    `DTYPES`, or TypeError is raised. metadata: a mapping from str to str.
    A checksum of each array goes with them; ValueError when all that takes
    more than `LONGEST_TABLE` bytes. No more than one array is copied at a
    time. The file appears whole or not at all.
    """
    note, table, at = dict(metadata or {}), {}, 0
    # the widest numbers first, so that each array begins at a multiple of
    # its numbers' size
    order = sorted(tensors, key=lambda name: -tensors[name].itemsize)
    for name in order:
        x = tensors[name]
        table[name] = _entry(name, x, at)
        at += x.nbytes
    sums = dict.fromkeys(order, 0)
    head = _head(table, note, sums)
    with replacing(path) as file:
        file.write(head)
        for name in order:
            body = np.ascontiguousarray(tensors[name]).reshape(-1).data
            sums[name] = zlib.crc32(body, _told(table, note, name))
            file.write(body)
        file.seek(0)
        file.write(_head(table, note, sums))


# %% a row of the table tags=["exporti"] module="formats.safetensors"
def _entry(name, x, at):
    kind = NAMES.get(x.dtype)
    if kind is None:
        known = ", ".join(d.name for d in NAMES)
        raise TypeError(
            f"write_tensors: {name} must be one of {known}, got {x.dtype}"
        )
    places = [at, at + x.nbytes]
    return {"dtype": kind, "shape": list(x.shape), "data_offsets": places}


# %% the table and its sums tags=["exporti"] module="formats.safetensors"
def _head(table, note, sums):
    """The file up to its arrays, of one length for any sums."""
    kept = json.dumps({name: f"{x:08x}" for name, x in sums.items()})
    table = {"__metadata__": note | {_SUMS: kept}} | table
    head = json.dumps(table).encode()
    if len(head) > LONGEST_TABLE:
        raise ValueError(
            f"write_tensors: names and metadata must take at most "
            f"{LONGEST_TABLE:,} bytes, got {len(head):,}"
        )
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head


def _told(table, note, name):
    """The sum of all that says how to read an array; its bytes go on."""
    row = table[name]["dtype"], table[name]["shape"]
    return zlib.crc32(json.dumps([note, name, row], sort_keys=True).encode())


# %% [markdown]
# Reading is the library's job: it knows how a table can lie. Names that
# overlap, offsets beyond the end, a shape that does not match its bytes, a
# table of a gigabyte: it refuses them all before a number is read. What it
# cannot give to NumPy is bfloat16, a type that NumPy does not have: the
# upper half of a float32. So after the library has checked the table we read
# the bytes ourselves, and put 16 zero bits below each bfloat16. What the
# library allows is a table of 100 MB, which grows to twenty times that when
# Python parses it: we allow eight.


# %% read tensors tags=["export"] module="formats.safetensors"
class TensorFile:
    """The arrays of a safetensors file, each read when it is asked for.

    Raises ValueError, naming the file, when it is not a whole safetensors
    file, and OSError when it cannot be read. metadata: a dict of str. names:
    a list. file[name] is a new array; bfloat16 becomes float32. ValueError
    for a dtype that is not in `DTYPES` and for an array that does not match
    the checksum it was written with, KeyError for an unknown name.
    """

    def __init__(self, path):
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            with open(path, "rb") as file:
                size = int.from_bytes(file.read(8), "little")
                if size > LONGEST_TABLE:
                    raise ValueError(f"a table of {size:,} bytes is too long")
                with safe_open(path, framework="numpy"):
                    self._table = json.loads(file.read(size))
            self.metadata = self._table.pop("__metadata__", {})
            self._sums = dict(json.loads(self.metadata.pop(_SUMS, "{}")))
        except (SafetensorError, ValueError, TypeError, RecursionError) as e:
            raise ValueError(
                f"{path}: not a whole safetensors file ({what_is(path) or e})"
            ) from None
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
        self._check(name, x)
        if kind == "BF16":
            x = (x.astype(np.uint32) << 16).view(np.float32)
        return x.reshape(self.shape(name))

    def _check(self, name, x):
        """Raise unless an array has the sum it was written with, if any."""
        found = zlib.crc32(x, _told(self._table, self.metadata, name))
        if self._sums.get(name, f"{found:08x}") != f"{found:08x}":
            raise ValueError(
                f"{self.path}: {name} is damaged, its checksum is not the one "
                "it was written with: take another copy, or write it anew"
            )

    def _span(self, name):
        return self._table[name]["data_offsets"]


# %% any arrays, there and back
from llmnb.formats.safetensors import TensorFile, write_tensors

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

# %% a bit that flips
flipped = bytearray(whole)
flipped[-1] ^= 1
(folder / "flipped.safetensors").write_bytes(flipped)
try:
    file = TensorFile(folder / "flipped.safetensors")
    _ = file["step"], file["weights"]
except ValueError as error:
    print(str(error).replace(f"{folder}{os.sep}", ""))

# %% [markdown]
# ## From and for other programs
#
# Most programs that read GPT-2 expect Hugging Face's layout: safetensors with
# other names, each block's tensors by themselves, no padding, and the four
# matrices of a block transposed, (inputs, outputs). GPT-2 was first written
# with a one-wide convolution in the place of a linear layer, and the layout
# has kept its order. Ours, (outputs, inputs), is that of llm.c and PyTorch.
#
# `_places` below says of each tensor there which of our sixteen it belongs
# to, and at which index. Reading, writing and checking all go by it.

# %% imports for the hub's layout tags=["export"] module="formats.checkpoint"
import json
import re

from llmnb.formats.safetensors import TensorFile, write_tensors


# %% where each tensor belongs tags=["exporti"] module="formats.checkpoint"
class _Place(NamedTuple):
    """Where one tensor of a published file belongs in our arrays."""

    name: str
    index: object  # a block's number, or a slice of rows
    turned: bool

    def of(self, params):
        """The part of our array: a view, as it stands there."""
        part = params[self.name][self.index]
        return part.T if self.turned else part


def _places(cfg):
    """Name in published files -> _Place."""
    places = {}
    for x in tensor_table(cfg):
        rows = slice(cfg.vocab_size if x.name == "wte" else None)
        for i in range(cfg.num_layers) if x.stacked else [rows]:
            turned = x.turned and x.stacked
            places[x.there.format(i)] = _Place(x.name, i, turned)
    return places


# %% write safetensors tags=["export"] module="formats.checkpoint"
def write_safetensors(path, cfg, params):
    """Write a model as safetensors, in Hugging Face's layout of GPT-2.

    params: a mapping from llm.c's names to arrays, as `GPT2.params`. The
    tensors are float32, without padding; the number of heads, which no
    shape shows, stands in the metadata. The file appears whole or not at
    all.
    """
    tensors = {
        name: place.of(params).astype(np.float32, copy=False)
        for name, place in _places(cfg).items()
    }
    # the library transformers wants the format named
    metadata = {"format": "pt", "n_head": str(cfg.num_heads)}
    write_tensors(path, tensors, metadata)


# %% what is in the file
write_safetensors(folder / "model.safetensors", small, arena["params"])
file = TensorFile(folder / "model.safetensors")
for name in file.names[:4]:
    print(name, file.shape(name))
qkvw = arena["params"]["qkvw"]
compare("qkvw", file["h.1.attn.c_attn.weight"].T, qkvw[1], tol=1e-30)

# %% [markdown]
# A *model folder* holds such a file as `model.safetensors`, and the numbers
# of the configuration in `config.json`. With the two, `transformers` loads
# the model by the folder's name.

# %% the model's description tags=["exporti"] module="formats.checkpoint"
# settings that change what a GPT-2 computes, and the values we compute with
FIXED = {
    "model_type": ["gpt2"],
    "activation_function": ["gelu_new", "gelu_pytorch_tanh"],
    "layer_norm_epsilon": [1e-5],
    "scale_attn_weights": [True],
    "scale_attn_by_inverse_layer_idx": [False],
    "add_cross_attention": [False],
    "tie_word_embeddings": [True],
}


def _described(cfg):
    """The sizes of a model by the names of config.json."""
    return {
        "n_positions": cfg.max_seq_len,
        "vocab_size": cfg.vocab_size,
        "n_layer": cfg.num_layers,
        "n_head": cfg.num_heads,
        "n_embd": cfg.channels,
    }


# %% write a folder tags=["export"] module="formats.checkpoint"
def write_folder(folder, cfg, params):
    """Write a model folder that `transformers` reads: GPT2LMHeadModel.

    The folder is made if it is not there; in it config.json and
    model.safetensors are replaced. params: as for write_safetensors. Raises
    ValueError when there is a config.json that describes no GPT-2.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if path.exists() and _read_json(path).get("model_type") != "gpt2":
        raise ValueError(f"{path}: describes no GPT-2, and is left alone")
    make_folder(folder)
    config = {name: values[0] for name, values in FIXED.items()}
    config |= _described(cfg)
    config["architectures"] = ["GPT2LMHeadModel"]
    # our encodings end with the token that ends a text
    config["bos_token_id"] = config["eos_token_id"] = cfg.vocab_size - 1
    write_safetensors(folder / "model.safetensors", cfg, params)
    with replacing(path) as file:
        file.write(json.dumps(config, indent=1).encode() + b"\n")


# %% read JSON tags=["exporti"] module="formats.checkpoint"
def _read_json(path, most=1 << 20):
    """The object in a JSON file of at most so many bytes, as a dict."""
    raw = read_small(path, most)
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:
        what = what_is(path) or f"not JSON ({error})"
        raise ValueError(f"{path}: {what}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must hold a JSON object")
    return found


# %% [markdown]
# Files by others vary. Some names begin with `transformer.`; some files hold
# the causal masks, `attn.bias` and `attn.masked_bias`, which are no parameters;
# some hold the output matrix once more as `lm_head.weight`, which must then
# equal `wte`. Others hold it *only* under that name: it and `wte` are one
# tensor with two names, of which safetensors' `save_model` keeps one. And a
# large model lies in several files, with an *index* that
# names the file of each tensor. A name from a file is used as a path here, and
# must not lead out of the folder.

# %% files and their index tags=["exporti"] module="formats.checkpoint"
INDEX = "model.safetensors.index.json"


def _indexed(path):
    """Tensor name -> TensorFile, for the files that an index names."""
    table = _read_json(path).get("weight_map")
    names = table.values() if isinstance(table, dict) else [None]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: weight_map must map tensors to files")
    files = {name: _neighbour(path, name) for name in set(names)}
    held = {name: set(file.names) for name, file in files.items()}
    for tensor, name in table.items():
        if tensor not in held[name]:
            raise ValueError(f"{path}: {name} has no tensor {tensor}")
    return {tensor: files[name] for tensor, name in table.items()}


def _neighbour(path, name):
    """The TensorFile of that name in the folder of `path`."""
    if name in ("", ".", "..") or set(name) & set("/\\:\0"):
        raise ValueError(
            f"{path}: {name!r:.80} must name a file in the same folder"
        )
    return TensorFile(path.parent / name)


# %% tensors by their short names tags=["exporti"] module="formats.checkpoint"
def _tensors(path):
    """Name without prefix -> (TensorFile, name in it)."""
    if path.suffix == ".json":
        found = _indexed(path)
    else:
        file = TensorFile(path)
        found = dict.fromkeys(file.names, file)
    tensors = {}
    for name, file in found.items():
        short = name.removeprefix("transformer.")
        if short in tensors:
            raise ValueError(f"{path}: {short} comes twice")
        tensors[short] = file, name
    if "lm_head.weight" in tensors:
        tensors.setdefault("wte.weight", tensors["lm_head.weight"])
    return tensors


# %% [markdown]
# The shapes tell the configuration, all but the number of heads: our own
# files name it, and a `config.json` beside the file does. Without either it is
# known for the four shapes that OpenAI published. A wrong guess would give a
# model that writes nonsense without a word, so of any other we ask for it. A
# `config.json` that contradicts the shapes is an error, and so is one that asks
# for another computation than ours.


# %% the configuration of a set of tensors tags=["exporti"] module="formats.checkpoint"
def _hub_config(path, tensors):
    """The configuration that the shapes give, checked tensor by tensor."""
    described = path.parent / "config.json"
    config = _read_json(described) if described.exists() else {}
    for name, known in FIXED.items():
        if config.get(name, known[0]) not in known:
            raise ValueError(
                f"{described}: {name} is {config[name]!r:.80}, where a GPT-2 "
                f"has {known[0]!r}"
            )
    sizes = _sizes_of(path, tensors)
    heads = _heads(path, tensors, config, sizes[2:])
    cfg = _config(path, [*sizes[:3], heads, sizes[-1]])
    for name, value in _described(cfg).items():
        if config.get(name, value) != value:
            raise ValueError(
                f"{described}: {name} is {config[name]!r:.80}, where "
                f"{path.name} has {value}"
            )
    _check_shapes(path, cfg, tensors)
    return cfg


# %% sizes from shapes tags=["exporti"] module="formats.checkpoint"
def _sizes_of(path, tensors):
    """max_T, V, L and C from the embeddings and the number of blocks."""
    for name in ("wte.weight", "wpe.weight"):
        if name not in tensors:
            raise ValueError(f"{path}: no GPT-2, it has no tensor {name}")
        file, full = tensors[name]
        if len(file.shape(full)) != 2:
            raise ValueError(
                f"{path}: {full} must be a matrix, got {file.shape(full)}"
            )
    (wte, long), (wpe, full) = tensors["wte.weight"], tensors["wpe.weight"]
    layers = 0
    while f"h.{layers}.ln_1.weight" in tensors:
        layers += 1
    vocab_size, channels = wte.shape(long)
    return wpe.shape(full)[0], vocab_size, layers, channels


# heads of the published models, by their blocks and channels
PUBLISHED = {(12, 768): 12, (24, 1024): 16, (36, 1280): 20, (48, 1600): 25}


def _heads(path, tensors, config, shape):
    """The number of heads: written down, or that of a published model."""
    file, _ = tensors["wte.weight"]
    written = file.metadata.get("n_head", "")
    if written.isdecimal() and len(written) < 10:
        return int(written)
    heads = config.get("n_head", PUBLISHED.get(shape))
    if heads is None:
        raise ValueError(
            f"{path}: how many heads? No tensor shows it: put the model's "
            'config.json beside it, or one that holds {"n_head": 12}, if it '
            "is 12"
        )
    return heads


# %% check all shapes tags=["exporti"] module="formats.checkpoint"
# masks, and the output matrix that is wte once more
IGNORED = re.compile(r"h\.\d+\.attn\.(masked_)?bias|lm_head\.weight")


def _check_shapes(path, cfg, tensors):
    """Raise unless there is each tensor of the model, and no other."""
    shapes = parameter_shapes(cfg)
    empty = {x: np.broadcast_to(np.float32(0), shapes[x]) for x in shapes}
    places = _places(cfg)
    for name, place in places.items():
        if name not in tensors:
            raise ValueError(f"{path}: has no tensor {name}")
        file, full = tensors[name]
        want = place.of(empty).shape
        if file.shape(full) != want:
            raise ValueError(
                f"{path}: {full} must be {want}, got {file.shape(full)}"
            )
        if file.dtype(full) not in ("F64", "F32", "F16", "BF16"):
            raise ValueError(
                f"{path}: {full} must be a float, got {file.dtype(full)}"
            )
    for name in sorted(set(tensors) - set(places)):
        if not IGNORED.fullmatch(name):
            raise ValueError(f"{path}: GPT-2 has no tensor {name}")


# %% read tensors into place tags=["exporti"] module="formats.checkpoint"
def _read_hub(path, cfg, tensors, params):
    """Fill params, checked before, one tensor at a time."""
    file, wte = tensors["wte.weight"]
    head, name = tensors.get("lm_head.weight", (file, wte))
    if name != wte and not np.array_equal(head[name], file[wte], True):
        raise ValueError(f"{path}: lm_head.weight must equal {wte}")
    for name, place in _places(cfg).items():
        file, full = tensors[name]
        place.of(params)[...] = file[full]
    params["wte"][cfg.vocab_size :] = 0


# %% [markdown]
# A run in progress ([chapter 1.16](16_training.ipynb)) keeps its state in the
# same container: the weights under their own names, with `params.` before
# them, and beside them what only training needs. Its metadata holds a page
# of JSON, the **record**, with the configuration and a checksum of every
# array. Whoever wants the model reads a third of the file.


# %% a training state tags=["export"] module="formats.checkpoint"
import zlib

STATE = "llmnb training state 1"


def state_record(file):
    """The record of a training state: a dict.

    file: its TensorFile. Raises ValueError or KeyError when it is no state,
    or a damaged one.
    """
    note = file.metadata
    if note.get("format") != STATE:
        raise ValueError(f"its format must be {STATE!r}")
    if str(zlib.crc32(note["record"].encode())) != note["sum"]:
        raise ValueError("its record is damaged")
    return json.loads(note["record"])


# %% its weights tags=["exporti"] module="formats.checkpoint"
def _open_state(path, file):
    """A state's configuration, and the function that fills its params."""
    try:
        record = state_record(file)
        cfg, sums = GPT2Config(**record["model"]), record["sums"]
        for name, shape in parameter_shapes(cfg).items():
            got = file.shape(f"params.{name}")
            if got != shape:
                raise ValueError(f"params.{name} must be {shape}, got {got}")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a whole state: {error}") from None
    return cfg, partial(_read_state, path, file, sums)


def _read_state(path, file, sums, params):
    """Fill params, checked before, and check their sums."""
    for name, array in params.items():
        x = file[f"params.{name}"]
        if zlib.crc32(x) != sums.get(f"params.{name}"):
            raise ValueError(
                f"{path} is not a whole state: params.{name} is damaged"
            )
        array[...] = x


# %% [markdown]
# ## One door for every format
#
# A caller should not need to know which format it has. A folder is looked
# into; otherwise the name's ending decides. A folder with a model in another
# format says which.
#
# A model may have more rows in `wte` than its tokenizer has tokens: 50,304 for
# GPT-2's 50,257, which makes a product faster, or 50,258 where somebody has
# added a token to pad with. No text contains them, and none may be written.
# We have rows without a token already, those up to the next multiple of 128,
# which every layer leaves out. So whoever knows the number of tokens says it,
# and the rows beyond become padding like the others; if there are more than
# those, the tokenizer is probably another.
#
# Through this door also comes every weight that is ever read, so here is the
# place to ask whether it is a number at all. A single NaN spreads to all
# logits, and what is computed from them can look like a result. A sum of
# squares is infinite or NaN if one of its terms is, and takes one pass; only
# when it is are the terms looked at.


# %% is it a number tags=["export"] module="formats.checkpoint"
def first_not_finite(arrays):
    """Which of some arrays holds an infinity or a NaN, and where; or None.

    arrays: a mapping from name to array. Returns a text.
    """
    for name, x in arrays.items():
        with np.errstate(all="ignore"):
            total = np.vdot(x, x)
        if not np.isfinite(total) and not np.isfinite(x).all():
            where = tuple(int(i) for i in np.argwhere(~np.isfinite(x))[0])
            return f"{name} is {x[where]} at {where}"
    return None


# %% which file it is tags=["exporti"] module="formats.checkpoint"
# endings of models that we do not read, which is to be said
OTHERS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".gguf", ".npz")


def _find(path):
    """The file to read: the path itself, or what a folder holds."""
    path = Path(path)
    if not path.is_dir():
        return path
    names = "model.safetensors", INDEX, "model.bin"
    for name in names:
        if (path / name).exists():
            return path / name
    for other in sorted(path.glob("*.*")):
        if other.suffix in OTHERS and (what := what_is(other)):
            raise ValueError(f"{other}: {what}")
    raise FileNotFoundError(f"{path}: holds none of {', '.join(names)}")


def _open(path):
    """A model's configuration, and the function that fills its params."""
    path = _find(path)
    if path.suffix in (".safetensors", ".json"):
        file = TensorFile(path) if path.suffix == ".safetensors" else None
        if file and file.metadata.get("format") == STATE:
            return _open_state(path, file)
        tensors = _tensors(path)
        cfg = _hub_config(path, tensors)
        return cfg, partial(_read_hub, path, cfg, tensors)
    version, cfg = _bin_header(path)
    return cfg, partial(_read_bin, path, version)


# %% read any model tags=["export"] module="formats.checkpoint"
def read_config(path, tokens=None):
    """The configuration of a model on disk, checked against its files.

    path: llm.c's .bin (float32 or bfloat16), a .safetensors file or the
    index of several in Hugging Face's layout, or a folder that holds one
    of these as model.bin, model.safetensors or model.safetensors.index.json;
    or a state of a run, see llmnb.train.run. tokens: how many its tokenizer has;
    rows beyond, up to the next multiple of 128, are not counted as tokens.
    Raises ValueError, naming the file, when it is no GPT-2, or when its
    sizes, its shapes or its length do not fit, or the tokens; OSError when
    it cannot be read. Nothing is allocated before that is known.
    """
    cfg = _open(path)[0]
    return cfg if tokens is None else without_padding(path, cfg, tokens)


def without_padding(path, cfg, tokens, tokenizer=""):
    """The configuration of a model on disk for a tokenizer's tokens.

    path, cfg, tokens: as for read_config. Raises ValueError, which names
    the path and the tokenizer, when it must be another model's.
    """
    few = replace(cfg, vocab_size=tokens)
    if not tokens <= cfg.vocab_size <= few.padded_vocab_size:
        named = "the tokenizer" + (tokenizer and f" {tokenizer}")
        raise ValueError(
            f"{path} has {cfg.vocab_size} tokens, {named} has {tokens}"
        )
    return few


def read_checkpoint(path, cfg, params):
    """Read a model's parameters into arrays, in place.

    path: as for read_config, and cfg what that returned. params: a mapping
    from llm.c's names to arrays in the shapes of parameter_shapes(cfg),
    float32 or float64, as `GPT2.params`. Raises ValueError or TypeError when
    they do not fit the file, before any is written to, and ValueError when
    the file ends early after all, does not match its checksum, or when a
    weight is not finite.
    """
    found, fill = _open(path)
    if without_padding(path, found, cfg.vocab_size) != cfg:
        raise ValueError(f"{path}: holds {found}, not {cfg}")
    ours = {}
    for name, shape in parameter_shapes(cfg).items():
        ours[name] = params[name]
        label = f"read_checkpoint: {name}"
        check_array(label, params[name], shape, written=True)
    fill(ours)
    if cfg != found:
        ours["wte"][cfg.vocab_size :] = 0
    wrong = first_not_finite(ours)
    if wrong:
        raise ValueError(f"{path}: {wrong}, where weights must be finite")


# %% there and back
write_folder(folder / "elsewhere", small, arena["params"])
write_checkpoint(folder / "half.bin", small, arena["params"], version=5)
again = Arena({"params": (np.float32, parameter_shapes(small))})
arena["params"]["wte"][small.vocab_size :] = 0  # the padding is not kept
for name, tol in (
    ("model.bin", 1e-30),
    ("elsewhere", 1e-30),
    ("half.bin", 2**-8),
):
    cfg = read_config(folder / name)
    read_checkpoint(folder / name, cfg, again["params"])
    compare(name, again["params"]["fcw"], arena["params"]["fcw"], tol)

# %% a folder that leads elsewhere
index = {"weight_map": {"wte.weight": "../model.safetensors"}}
(folder / "index.json").write_text(json.dumps(index))
try:
    read_config(folder / "index.json")
except ValueError as error:
    print(str(error).replace(f"{folder}{os.sep}", ""))

# %% [markdown]
# ## Count it
#
# The memory of a model that trains is, in numbers of four bytes,
#
# $$ M = 4 N + B T \left( L \cdot 10 C + 4 C + \max(V_p, 13 C) \right)
#    + \dots \tag{1.13.3} $$
#
# with $10 C$ numbers kept for each token by each block (three arrays of width
# $C$, one of $3C$, one of $4C$) and, once for all blocks, $4 C$ more:
# `encoded`, `lnf`, `dstream` and `dln`. Then the logits, or the $13 C$ that
# the blocks take turns with, if that is more. $N$ counts the parameters with
# the padding here, and the dots stand for the narrow arrays.

# %% equation (1.13.3) against the table
cfg, B, T = GPT2Config(), 4, 1024
L, C, Vp = cfg.num_layers, cfg.channels, cfg.padded_vocab_size
N = sum(math.prod(s) for s in parameter_shapes(cfg).values())
formula = 4 * (4 * N + B * T * (L * 10 * C + 4 * C + max(Vp, 13 * C)))
exact = sum(footprint(gpt2_layout(cfg, B, T)).values())
print(f"{exact / 1e9:.3f} GB, by the formula {formula / 1e9:.3f} GB")
verdict("narrow arrays", 0 < exact - formula < 0.01 * exact, "take below 1 %")

# %% [markdown]
# ## Take away
#
# - An array is bytes and a note on how to read them; a view is a second note.
# - All shapes are known before the first step, so all memory can be laid out
#   in one block; its size is a sum you can do beforehand.
# - Forward activations are kept for every block, gradients of activations for
#   one. What is cheap to compute again need not be kept.
# - Groups that are never in use at the same time can have the same bytes.

# %% [markdown]
# ## Design note
#
# The arena keeps what is dear to compute again, and no more. One can keep
# less still: only each block's input, and run its forward pass again, which
# costs a third more arithmetic. On a CPU time is scarcer than memory, so we
# stop where an array costs a sweep over memory and no product.
#
# Another way to save is to let every array take the place of one that is no
# longer needed, as compilers do with registers. It would make the table hard
# to read and save little beyond our one overlay: nearly all activations live
# until the backward pass comes by.

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
def total(rows):
    return sum(footprint(gpt2_layout(GPT2Config(), rows, 1024)).values())


one, two = total(1), total(2)
most = int((8e9 - (2 * one - two)) // (two - one))

# %% exercise 2, checked
fits = total(most) <= 8e9 < total(most + 1)
verdict(f"{most} rows", fits, "fit, one more does not")

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
from llmnb.book.index import gained

gained("1.13")
