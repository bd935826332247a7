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
# *Reading time: 30 minutes. You need: AdamW ([chapter 1.12](12_adamw.ipynb)), the
# block ([chapter 1.13](13_block.ipynb)) and the page ([chapter
# 1.14](14_page.ipynb)).*
#
# ## Where we are

# %% where we are tags=["hide-input"]
from llmnb.book.diagram import gpt2_diagram

gpt2_diagram(lit="arrays")

# %% [markdown]
# *Figure 1.16.1. Every box of the model reads arrays and writes arrays: each
# arrow is one. This chapter decides, for all of them at once, where they are.*
#
# The page of [chapter 1.14](14_page.ipynb) makes an array on each line, as a
# framework does whenever a layer produces one, and asks the system for memory again
# and again. We know all shapes beforehand, so we can do better: add up the sizes, ask
# for memory *once*, and give every tensor its place. Such a block is called an
# *arena*. At the end of this
# chapter you can
#
# - say what a view is, and what a shape and strides do to plain bytes;
# - compute a model's footprint before it exists, to the byte, save for the
#   padding between a few groups;
# - say which arrays must be kept, and which may share their bytes.
#
# ## Setup

# %% setup
from types import SimpleNamespace

import matplotlib.pyplot as plt

from llmnb import reference
from llmnb.book.diagram import PALETTE
from llmnb.book.moving import moving
from llmnb.book.verify import verdict
from llmnb.config import GPT2Config
from llmnb.model.gpt2 import GPT2
from llmnb.model.tensors import parameter_shapes

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
# We wrote through the matrix, and the other two saw it, at byte $12 \cdot 1 + 4
# \cdot 0 = 12$ and on: `0 0 128 63` is the float32 number 1.0, the bit pattern
# `0x3f800000`, lowest byte first.
#
# An array whose last index moves by one element, the one before by a whole
# row, and so on, is called *C-contiguous*. All arrays that layers read and
# write are, and that is why a (B, T, C) array can be read as (B·T, C) rows
# for free.
#
# ## The arena
#
# A table of names and shapes is enough to lay out a block: each tensor begins
# where the one before it ends. With $k$ for a tensor's place in the table, $a$ for
# its axes and itemsize for the bytes of one of its numbers,
#
# $$ \text{offset}_{k+1} = \text{offset}_k
#    + \text{itemsize}_k \prod_a \text{shape}_{k,a} . \tag{1.16.1} $$
#
# Three refinements. Tensors come in *groups*, such as all parameters. Those of a
# group have one dtype and no gaps between them, so a group can also be read as one
# long flat array, and AdamW does so with all parameters. A group begins at a
# multiple of 64 bytes, because machines move memory in pieces of that length. And
# two groups of which only one is in use at any time can have the same bytes: the
# second begins where the first begins, and what follows begins after the longer
# one.
#
# NumPy does not promise that its block begins at a multiple of 64. So `_zeros`
# asks for 64 bytes more, looks at the address (`ctypes.data`), and skips as many
# bytes as are missing to the next multiple: minus the address, modulo 64. To round
# a number up, `_round_up` divides its negative, since `//` rounds down.

# %% round up tags=["exporti"]
ALIGN = 64  # bytes


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
    except (MemoryError, ValueError):  # the latter from 2**63 bytes on
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
# `zeros` and `put` are for a block in the memory of another device, which NumPy
# cannot write.

# %% a small arena
arena = Arena(
    {
        "params": (np.float32, {"weight": (2, 3), "bias": (2,)}),
        "batch": (np.int32, {"tokens": (2, 4)}),
    }
)
for row in arena.table():
    print(row)
arena["params"]["bias"][...] = [7, 8]
print(arena.flat("params"), "in", arena.nbytes, "bytes")

# %% [markdown]
# The group `params` ends at byte 32, and `batch` begins at 64. A name gives a view,
# and a group is also one flat view.
#
# For a long array `np.zeros` does not write zeros. It asks the system for *pages*,
# pieces of memory of a few thousand bytes, each handed out, zeroed, when it is
# first written. So parts of the arena that a program never touches, such as
# AdamW's averages when a model only writes text, take no memory.
#
# And here are two groups in one place. What is written to one is seen in the
# other: the same bits, read as other numbers.


# %% one group over another
both = {"a": (np.float32, {"x": (2,)}), "b": (np.int32, {"y": (3,)}, True)}
shared = Arena(both)
shared["a"]["x"][...] = 1.0
print(shared.table())
print(shared["b"]["y"], "in", shared.nbytes, "bytes")
verdict("the bits", hex(shared["b"]["y"][0]) == "0x3f800000", "are 1.0's")

# %% [markdown]
# `y` is longer: its third number lies beyond the two of `x`. An overlay asks for
# care, and the layout of a GPT-2 has one only.
#
# ## The layout of GPT-2
#
# Four groups have the parameters' shapes (parameters, gradients and AdamW's two
# averages). Then there are the activations: what the forward pass computes and
# the backward pass needs. A leading $L$ means that each of the model's blocks
# keeps its own.
#
# | tensors | shape | kept because |
# |---|---|---|
# | `encoded` | (B, T, C) | the first block's first LayerNorm reads its input again |
# | `residual2`, `residual3` | (L, B, T, C) | so do a block's second LayerNorm and the norm after the block |
# | `lnf` | (B, T, C) | the product that makes the logits reads its input again |
# | `ln1_mean`, `ln1_rstd`, `ln2_mean`, `ln2_rstd` | (L, B, T) | two numbers a row, [chapter 1.6](06_layernorm.ipynb) |
# | `lnf_mean`, `lnf_rstd` | (B, T) | the same of the last LayerNorm |
# | `qkv`, `atty` | (L, B, T, 3C), (L, B, T, C) | attention, [chapter 1.8](08_attention.ipynb) |
# | `att_lse` | (L, B, NH, T) | the same |
# | `fch` | (L, B, T, 4C) | GELU reads its input |
# | `logits`, `lse` | (B, T, Vp), (B, T) | softmax and loss, [chapter 1.11](11_crossentropy.ipynb) |
# | `losses`, `dlosses` | (B, T) | the result, and the gradient with which the way back begins |
#
# Three arrays of a block are missing there, the outputs of the two LayerNorms and
# of GELU, although the products that read them forward need them again backward.
# They would take $C + C + 4C = 6C$ numbers a token and block, and their inputs are
# kept anyway. So the backward pass computes them again, one block's at a time,
# which costs no product. (`qkv` and `fch` would cost one each.) The page kept these
# too: its $16 C$ less these $6 C$ are our $10 C$.

# %% imports of the layout tags=["export"] module="model.layout"
import numpy as np

from llmnb.model.parts import block_of
from llmnb.model.tensors import full_shape, tensor_table


# %% activations tags=["export"] module="model.layout"
def block_activations(cfg, batch_size, seq_len):
    """Shapes of what a block's forward pass leaves for its backward pass."""
    B, T = batch_size, seq_len
    norm, attention, feedforward, *_ = block_of(cfg)
    stream = dict.fromkeys(("residual2", "residual3"), (B, T, cfg.channels))
    kept = stream | attention.keeps(cfg, B, T) | feedforward.keeps(cfg, B, T)
    for name in ("ln1", "ln2"):
        kept |= norm.keeps(cfg, B, T, name)
    return kept


def activation_shapes(cfg, batch_size, seq_len):
    """Shapes of what the forward pass leaves for the backward pass.

    A leading L marks what every block keeps for itself. By llm.c's names
    where it has one. What has rows of channels comes first: where C is a
    multiple of 4, each such row then begins at a multiple of 16 bytes. The
    logits are a group by themselves.
    """
    B, T, C = batch_size, seq_len, cfg.channels
    own = block_activations(cfg, B, T)
    shapes = dict.fromkeys(("encoded", "lnf"), (B, T, C))
    shapes |= {name: (cfg.num_layers, *own[name]) for name in own}
    shapes |= block_of(cfg).norm.keeps(cfg, B, T, "lnf")
    shapes |= dict.fromkeys(("lse", "losses", "dlosses"), (B, T))

    def narrow(named):
        rows, width = named[1][-2:]
        return rows != T or width % C != 0

    return dict(sorted(shapes.items(), key=narrow))


# %% [markdown]
# (The last lines sort: what has $T$ rows of $C$ numbers, or of a multiple, comes
# first.)
#
# The gradients of activations need less. When the backward pass is done with a
# block, it has no more use for the gradients inside it: one block's worth of
# arrays is enough, and the blocks take turns; so they do with what is computed
# again. The gradient of the residual stream is one array, `dstream`, to which
# every half block adds in turn. GELU's gradient is written over the gradient that
# came in, and the logits' gradient over the logits.
#
# The logits are in use from the end of the forward pass, when all blocks are done,
# to the beginning of the backward pass, before any block's turn. So the group that
# the blocks take turns with lies over the logits. Nothing in it has to outlast the
# logits: a block's way back computes `ln` and `fch_gelu` again before it reads them.
# `dln` stays outside, for it receives the gradient that comes from the logits while
# these are read, and so does `dstream`, which exercise 3 asks about. Figure 1.16.3
# will show their times.


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
    _, attention, feedforward, *_ = block_of(cfg)
    turns = attention.turns(cfg, B, T) | feedforward.turns(cfg, B, T)
    return {"ln": (B, T, cfg.channels)} | turns


# %% [markdown]
# Of the parameters, those that weight decay applies to come first ([chapter
# 1.12](12_adamw.ipynb)), so that each of the two sorts is one range of memory, and
# an update is two calls.


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
    the logits. A backend may add scratch memory of its own; tables holds
    what the parts of a block look up, if they do.
    """
    B, T = batch_size, seq_len
    shapes = parameter_layout(cfg)
    groups = dict.fromkeys(("params", "grads", "m", "v"), (dtype, shapes))
    tables = block_of(cfg).tables(cfg, T)
    if tables:
        groups["tables"] = dtype, {n: x.shape for n, x in tables.items()}
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
    sizes, longest = {}, 0
    for group, (dtype, shapes, *over) in layout.items():
        count = sum(math.prod(shape) for shape in shapes.values())
        size = count * np.dtype(dtype).itemsize
        before = longest if over else 0  # of the groups in this place
        sizes[group] = max(0, size - before)
        longest = max(before, size)
    return sizes


# %% the footprint of GPT-2 124M
# GPT2Config's defaults are GPT-2 124M; B = 4, T = 64
for group, size in footprint(gpt2_layout(GPT2Config(), 4, 64)).items():
    print(f"{group:<7} {size:>13,} bytes")

# %% [markdown]
# Nothing was allocated to find that out. (`block` counts 0: it lies over the
# longer logits.) The arena takes exactly this, up to the padding that brings each
# group's end to a multiple of 64. Nine groups have eight ends, because two lie in
# one place:

# %% predicted and real
small = GPT2Config(
    max_seq_len=64, vocab_size=1000, num_layers=2, num_heads=4, channels=64
)
arena = Arena(gpt2_layout(small, 4, 64))
predicted = sum(footprint(gpt2_layout(small, 4, 64)).values())
extra = arena.nbytes - predicted
verdict("footprint", 0 <= extra < 64 * 8, "as predicted, plus padding")
verdict(
    "one block", arena.flat("m").base is arena.flat("acts").base, "for all"
)

# %% [markdown]
# ## The map
#
# The arena of a GPT-2 124M that trains on four rows of 256 tokens, a line a group:

# %% the shapes in letters tags=["hide-input"]
LETTERS = {3: "L", 5: "B", 7: "T", 13: "maxT", 2: "NH", 22: "C", 66: "3C"}
LETTERS |= {88: "4C", 128: "Vp"}  # no two of these sizes are alike
odd = GPT2Config(
    max_seq_len=13, vocab_size=50, num_layers=3, num_heads=2, channels=22
)
table = [
    [group, np.dtype(dtype).itemsize, bool(over), [
        [name, [LETTERS[n] for n in shape]] for name, shape in shapes.items()
    ]]
    for group, (dtype, shapes, *over) in gpt2_layout(odd, 5, 7).items()
]  # fmt: skip

# %% the map of the arena tags=["hide-input"]
layout = gpt2_layout(GPT2Config(), 4, 256)
fig, ax = plt.subplots(figsize=(7.6, 4.6), dpi=100)
shades = [PALETTE[c] for c in ("blue", "green", "purple", "orange")]
sorts = {"acts": 1, "dacts": 3, "logits": 2, "block": 3}
groups = [g for g in layout if g != "batch"]
for y, group in enumerate(groups):
    dtype, shapes = layout[group][:2]
    at, colour = 0, shades[sorts.get(group, 0)]
    for name, shape in shapes.items():
        wide = math.prod(shape) * np.dtype(dtype).itemsize / 1e6
        kind = {"facecolor": colour, "edgecolor": "white", "linewidth": 0.8}
        ax.barh(y, wide, 0.72, at, alpha=0.85, **kind)
        if wide > 5.2 * len(name):
            style = {"color": "white", "size": 8, "family": "monospace"}
            ax.text(at + wide / 2, y, name, ha="center", va="center", **style)
        at += wide
ax.set_yticks(range(len(groups)), groups, family="monospace")
ax.set(xlabel="MB from the beginning of the group", ylim=(7.6, -0.6))
ax.text(60, 7, "over the logits: the same bytes", va="center", size=9)
ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()
start = {"B": 4, "T": 256, "L": 12, "C": 768, "Vp": 50304, "maxT": 1024}
moving("arena", "the map, for any B, T, L and C", groups=table, start=start)

# %% [markdown]
# *Figure 1.16.2. The arena of GPT-2 124M with 4 x 256 tokens, to scale, but
# for the few bytes of `batch`: a line is a group, a piece of it a tensor. The
# token table is almost a third of the parameters, and the logits are longer
# than any other activation. What the model's twelve blocks keep (nearly all of the
# line `acts`) is far more than what they take turns with (the group called
# `block`), which lies in the logits' bytes and adds none of its own. A tensor
# too narrow for its name has none.*
#
# ## A step, watched
#
# Two groups in one place are safe only if their times are apart. We can look. The
# layers of the model are exchanged for layers that note, at each call, which of the
# arena's tensors they were given and which of them have changed. Then one step of
# training is run, with the model of [chapter 1.17](17_model.ipynb). (Its vocabulary
# of 50 is padded to 128, and no other array has rows of 128 numbers: that tells the
# logits from what lies over them.)


# %% layers that take notes tags=["hide-input"]
def owner(arena, byte):
    """The group, the tensor and its place in it that hold a byte."""
    for group, name, shape, _, offset, size in arena.table():
        if offset <= byte < offset + size:
            part = (byte - offset) * shape[0] // size
            return group, name, part
    return None


def watched(name, layer, model, notes):
    """A layer that notes what it reads and what it writes."""
    start = model.memory.flat("params").ctypes.data  # the first group's

    def call(*args, **how):
        given = [*args, *how.values()]
        arrays = [x for x in given if isinstance(x, np.ndarray)]
        before = [x.copy() for x in arrays]
        result = layer(*args, **how)
        for old, x in zip(before, arrays, strict=True):
            where = owner(model.memory, x.ctypes.data - start)
            shared = "logits" if x.shape[-1] == 128 else "turns"
            changed = not np.array_equal(old, x)
            notes.append((notes.time, name, *where, shared, changed))
        notes.time += 1
        return result

    return call


# %% one step of a small model
class Notes(list):
    time = 0


notes = Notes()
cfg = GPT2Config(
    max_seq_len=8, vocab_size=50, num_layers=3, num_heads=2, channels=16
)
model = GPT2(cfg, 2, 8, "reference", "fp64")
names = [n for n in reference.__all__ if n.endswith(("ward", "update"))]
ops = {n: watched(n, getattr(reference, n), model, notes) for n in names}
model.ops = SimpleNamespace(**vars(reference) | ops)
batch = np.random.default_rng(3).integers(0, 50, (2, 9))
model.forward(batch[:, :-1], batch[:, 1:])
model.backward()
model.update(1e-3, step=1)
print(notes.time, "calls")

# %% [markdown]
# Forward, a block is eight calls, and encoder, last LayerNorm, logits and loss are
# four more: 28. Backward, a block has eight twins and computes three layers again:
# $3 \cdot 11 + 4 = 37$. AdamW is one call, since `update` was not told which
# parameters decay, and then all do.

# %% who lies over whom, and when tags=["hide-input"]
KEPT = [f"kept by block {i}" for i in range(3)]
ROWS = ["params", "grads", "m, v", "encoded, lnf", *KEPT, "dstream, dln"]
ROWS.append("shared bytes")


def row_of(group, name, part):
    if group in ("m", "v"):
        return "m, v"
    if group in ("logits", "block"):
        return "shared bytes"
    if group == "acts":
        outer = name in ("encoded", "losses", "dlosses", "lse")
        return "encoded, lnf" if outer or name[:3] == "lnf" else KEPT[part]
    return {"dacts": "dstream, dln"}.get(group, group)


fig, ax = plt.subplots(figsize=(7.6, 3.9), dpi=100)
for time, _, group, name, part, shared, changed in notes:
    if group == "batch":
        continue
    row = row_of(group, name, part)
    look = (0.2, 0.4, "orange") if changed else (-0.2, 0.4, "blue")
    if row == "shared bytes":
        look = 0, 0.8, "purple" if shared == "logits" else "green"
    rise, height, colour = look
    at = ROWS.index(row) + rise
    ax.barh(at, 1, height, time, color=PALETTE[colour])
calls = dict(reversed([(note[1], note[0]) for note in notes]))
turns = ["crossentropy_softmax_backward", "adamw_update"]
edges = [0, calls[turns[0]], calls[turns[1]], notes.time]
for left, right, word in zip(
    edges, edges[1:], ("forward", "backward", "AdamW"), strict=False
):
    ax.axvline(right, color=PALETTE["grey"], lw=0.8, ls="--")
    ax.text((left + right) / 2, -0.9, word, ha="center", size=9)
ax.set_yticks(range(len(ROWS)), ROWS)
ax.set(xlabel="call of a layer", xlim=(0, notes.time), ylim=(8.6, -1.4))
ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.16.3. One step of a model with three blocks, call by call. Blue: read,
# orange: changed, whether written anew or added to. What a block keeps is written
# on the way there, and read again on the way back; the first block's waits longest.
# (A norm that is computed again writes its means once more, with the same bits:
# blue.) With `encoded` and `lnf` stand the losses. In the last line lie two groups
# over each other: what the blocks take turns with (green), and the logits (purple),
# which have the bytes for themselves from the end of the forward pass to the
# beginning of the backward pass.*

# %% their times are apart
times = {"logits": [], "turns": []}
for time, _, group, _, _, shared, _ in notes:
    if group in ("logits", "block"):
        times[shared].append(time)
first, last = min(times["logits"]), max(times["logits"])
between = [t for t in times["turns"] if first <= t <= last]
verdict("the overlay", not between, "has one user at a time")
some = min(times["turns"]) < first and last < max(times["turns"])
verdict("both sides", some, "of the logits' time are used")

# %% [markdown]
# ## See it
#
# Parameters and their three companions are fixed. Activations grow with
# $B \cdot T$. At which length of four rows does the second part overtake the
# first?

# %% the footprint against the length tags=["hide-input"]
lengths = 2 ** np.arange(4, 11)
rows = [footprint(gpt2_layout(GPT2Config(), 4, int(T))) for T in lengths]
still = np.array([4 * r["params"] for r in rows]) / 1e9
grows = np.array([sum(r.values()) for r in rows]) / 1e9 - still
fig, ax = plt.subplots(figsize=(7, 3.4), dpi=100)
at = np.arange(len(lengths))
top = ax.bar(at, grows, 0.6, still, color=PALETTE["orange"])
foot = ax.bar(at, still, 0.6, color=PALETTE["blue"])
names = "activations and their gradients", "parameters, gradients, m and v"
ax.legend((top, foot), names, loc="upper left", frameon=False, fontsize=11)
ax.set_xticks(at, [f"{T}" for T in lengths])
ax.set(xlabel="tokens in a row, T (B = 4)", ylabel="GB")
ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.16.4. GPT-2 124M in float32 with four rows. Up to T = 512 the
# parameters and their companions take most of the memory; at T = 1024 the
# activations and their gradients take more than half.*
#
# ## Why the footprint is constant
#
# After the arena is made, a training step writes into views: every layer of this
# book is handed the arrays to fill, which is why it lists its outputs first and
# returns nothing. (What a line of NumPy makes on its way to a result is gone when
# the layer is done.) It is also checked: a test runs 200 training steps and
# compares the peak memory after the first and after the last.
#
# ## Count it
#
# The memory of a model that trains is, in numbers of four bytes,
#
# $$
# \begin{aligned}
# M &= 4 N + B T \bigl( L \cdot 10 C + 4 C \\
#   &\quad {} + \max(V_p, 13 C) \bigr) + \dots
# \end{aligned}
# \tag{1.16.2}
# $$
#
# with $10 C$ numbers kept for each token by each block (`residual2`, `residual3`
# and `atty` of width $C$, `qkv` of $3C$, `fch` of $4C$) and, once for all blocks,
# $4 C$ more: `encoded`, `lnf`, `dstream` and `dln`. Then the logits, or the $13 C$
# that the blocks take turns with, if that is more: `ln` and `datty` of width $C$,
# `dqkv` of $3C$, `fch_gelu` and `dfch` of $4C$ each. $N$ counts the padding too, and
# the dots stand for the narrow arrays: for each token the four numbers of two
# LayerNorms and one number a head in each block, two of the last LayerNorm, `lse`,
# `losses`, `dlosses`, the token and its target, $L\,(4 + NH) + 7$ in all.

# %% equation (1.16.2) against the table
cfg, B, T = GPT2Config(), 4, 1024
L, C, Vp = cfg.num_layers, cfg.channels, cfg.padded_vocab_size
N = sum(math.prod(s) for s in parameter_shapes(cfg).values())
formula = 4 * (4 * N + B * T * (L * 10 * C + 4 * C + max(Vp, 13 * C)))
exact = sum(footprint(gpt2_layout(cfg, B, T)).values())
print(f"{exact / 1e9:.3f} GB, by the formula {formula / 1e9:.3f} GB")
narrow = 4 * B * T * (L * (4 + cfg.num_heads) + 7)
verdict("narrow arrays", exact - formula == narrow, "are all that is left")

# %% [markdown]
# In figure 1.16.4 the second part overtakes the first where $B T\,(L \cdot 10 C + 4
# C + V_p) = 4 N$: with $B = 4$ at $T \approx N / 145{,}536 \approx 855$.
#
# ## Take away
#
# - An array is bytes and a note on how to read them; a view is a second note.
# - All shapes are known before the first step, so all memory can be laid out
#   in one block; its size is a sum you can do beforehand.
# - Forward activations are kept for every block, gradients of activations for
#   one. What is cheap to compute again need not be kept.
# - Groups that are never in use at the same time can have the same bytes.
#
# ## Design note
#
# The arena keeps what is dear to compute again. One can keep less still: only each
# block's input, and run its forward pass again, which costs a third more
# arithmetic (a step is one part forward and two parts backward). On a CPU time is
# scarcer than memory, so we stop at arrays that can be had again without a product.
#
# One could also let every array take the place of one that is no longer needed. It
# would make the table hard to read and save little beyond our one overlay: nearly
# all activations live until the backward pass comes by.
#
# ## Exercises
#
# **1** (★). At which byte of a float32 array of shape (4, 8, 768) does the
# element (2, 5, 7) begin?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# $4 \cdot (2 \cdot 8 \cdot 768 + 5 \cdot 768 + 7) = 64540$.
# :::

# %% exercise 1, checked tags=["hide-cell"]
answer = 4 * (2 * 8 * 768 + 5 * 768 + 7)
strides = np.empty((4, 8, 768), np.float32).strides
verdict("byte", answer == np.dot((2, 5, 7), strides), f"is {answer}")

# %% [markdown]
# **2** (★★). You have 8 GB for GPT-2 124M and rows of 1,024 tokens. How many
# rows can a batch have?
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# Ten. Compute the footprint for one row and for two; it is linear in $B$, so from
# these two follow what a model takes without rows, and what each row adds.
# :::


# %% exercise 2, checked tags=["hide-cell"]
def total(rows):
    return sum(footprint(gpt2_layout(GPT2Config(), rows, 1024)).values())


one, two = total(1), total(2)
most = int((8e9 - (2 * one - two)) // (two - one))
fits = most == 10 and total(10) <= 8e9 < total(11)
verdict(f"{most} rows", fits, "fit, one more does not")

# %% [markdown]
# **3** (★★★). Could `dln` and `dstream` be two more tensors of the group that lies
# over the logits? Find the calls that decide it in the notes of the watched step.
#
# :::{admonition} Solution to exercise 3
# :class: dropdown
# `dln` could not: the product at the head writes it while it reads the gradient of
# the logits. `dstream` could, just: it is cleared after that product (by the model,
# between two calls, so not in the notes: [chapter 1.17](17_model.ipynb)), and then the
# last LayerNorm adds to it from `dln`. But it must lie beside the arrays that the
# blocks take turns with, not over them: they are in use at the same time. It would
# save $BTC$ numbers of the $10\,L\,BTC$ and more that are kept.
# :::

# %% exercise 3, checked tags=["hide-cell"]
at = {name: set() for name in ("dln", "dstream")}
for time, _, group, name, _, _, _ in notes:
    if group == "dacts":
        at[name].add(time)
verdict("dln", bool(at["dln"] & set(times["logits"])), "meets the logits")
verdict("dstream", not at["dstream"] & set(times["logits"]), "does not")
verdict(
    "dstream", bool(at["dstream"] & set(times["turns"])), "meets the turns"
)

# %% [markdown]
# ## Further reading
#
# - Hanson (1990), [Fast allocation and deallocation of memory based on object
#   lifetimes](https://doi.org/10.1002/spe.4380200104): the arena as a general
#   technique.
# - Chen et al. (2016), [Training Deep Nets with Sublinear Memory
#   Cost](https://arxiv.org/abs/1604.06174): what the design note calls running the
#   forward pass again.
#
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("1.16")
