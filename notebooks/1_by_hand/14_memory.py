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
# ---

# %% [markdown]
# # Memory: one block for everything
#
# > One allocation holds every tensor of the model as a named view, so the
# > footprint is known before training begins and never grows.
#
# *Reading time: 22 minutes. You need: the block of
# [chapter 1.13](13_block.ipynb).*

# %% [markdown]
# ## Where we are

# %% where we are
from llmnb.book.diagram import gpt2_diagram

gpt2_diagram(lit="all")

# %% [markdown]
# *Figure 1.14.1. Every box of the model reads arrays and writes arrays. This
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

import matplotlib.pyplot as plt

from llmnb.model.tensors import parameter_shapes
from llmnb.book.diagram import PALETTE
from llmnb.book.verify import verdict

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
#    + \text{itemsize}_k \prod_a \text{shape}_{k,a} . \tag{1.14.1} $$
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
# cannot write into it: [chapter 1.16](16_model.ipynb) trains there.

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
    """Shapes of what a block's forward pass leaves for its backward pass."""
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
# *Figure 1.14.2. GPT-2 124M in float32 with four rows. Up to T = 512 the
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
# ## Count it
#
# The memory of a model that trains is, in numbers of four bytes,
#
# $$ M = 4 N + B T \left( L \cdot 10 C + 4 C + \max(V_p, 13 C) \right)
#    + \dots \tag{1.14.2} $$
#
# with $10 C$ numbers kept for each token by each block (three arrays of width
# $C$, one of $3C$, one of $4C$) and, once for all blocks, $4 C$ more:
# `encoded`, `lnf`, `dstream` and `dln`. Then the logits, or the $13 C$ that
# the blocks take turns with, if that is more. $N$ counts the parameters with
# the padding here, and the dots stand for the narrow arrays.

# %% equation (1.14.2) against the table
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

gained("1.14")
