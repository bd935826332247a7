# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       reference.learning: "A weight that learns with its gradient, in NumPy."
#       cpu.learning: "A weight that learns while its gradient is made."
#       model.inbackward: "A model that learns while it goes back."
# ---

# %% [markdown]
# # In backward: learn while going back
#
# > A gradient is needed until its weight has learnt. If the weight learns at once,
# > the gradient is never stored, and memory works while the processor computes.
#
# *Reading time: 15 minutes. You need: the model's passes ([chapter
# 1.17](../1_by_hand/17_model.ipynb)), AdamW ([chapter
# 1.12](../1_by_hand/12_adamw.ipynb)), the compiled product ([chapter
# 2.4](../2_cpu/04_matmul.ipynb)) and what fine-tuning takes ([chapter
# 5.10](10_lora.ipynb)). The compiled version builds on appendices
# [A.2](../appendix/02_tile.ipynb) and [A.3](../appendix/03_panels.ipynb); whoever does
# not want it goes on at "The model that learns".*

# %% [markdown]
# ## Where we are
#
# LoRA trains a large model in little memory, but its thin matrices cannot
# learn everything. This chapter keeps all weights learning and asks what can be
# left out instead. At the end of it you can
#
# - say when a gradient is written, read, and dead;
# - let a matrix learn inside the product that makes its gradient;
# - say which three things a training run gives up for it.
#
# ## Setup

# %% setup
import json
from pathlib import Path

import matplotlib.pyplot as plt

import llmnb
from llmnb.book.diagram import PALETTE
from llmnb.book.verify import compare, verdict

# %% [markdown]
# ## When a gradient is dead
#
# Count the numbers that training holds for each parameter: itself, its
# gradient, and AdamW's two averages. The averages outlive a step and so does the
# parameter. The gradient does not. Going back through a layer with the weight $w$,
#
# - one product takes the gradient of the output through $w$ to that of the input;
# - another makes $dw$;
# - AdamW reads $dw$, and then the next step overwrites it.
#
# Who else reads gradients? Clipping needs the norm of all before it scales the
# first ([chapter 1.12](../1_by_hand/12_adamw.ipynb)); the norm that a step only reports
# can be added up weight by weight. The layers before this one read their own weights
# and the gradient of their output, which was made with the old $w$, but $w$ itself is
# never read again in this step. And AdamW computes each parameter from its own
# value, gradient and averages only, so the order in which tensors learn cannot
# matter. (A tied table, which is used twice, comes later.) So without clipping the two
# loops
#
# $$ \begin{aligned} &\text{for all } w, \text{ from the last: } dw \\
# &\text{then for all } w{:} \; w \leftarrow \mathrm{AdamW}(w, dw)
# \end{aligned} \tag{5.11.1} $$
#
# may be one loop with the same numbers for each parameter:
#
# $$ \begin{aligned} &\text{for all } w, \text{ from the last: } \\
# &\quad dw, \quad w \leftarrow \mathrm{AdamW}(w, dw). \end{aligned} \tag{5.11.2} $$
#
# The same holds for a part of $w$: a row of $dw$ is dead when that row has learnt. So
# $dw$ need not be stored at all, only the rows that are being made.
#
# That may save time too. AdamW reads four numbers for each parameter and writes three, 28
# bytes, and computes little with them: it waits for memory. The product that makes
# $dw$ computes for each of its elements as many multiplications as there are tokens,
# and hardly reads memory: it waits for the processor. Done together, each works while
# the other waits.
#
# ## A weight that learns
#
# In NumPy the two are one after the other. Besides the squares for the norm, a sum a row,
# there is what a tied table will need: rows set aside, which do not learn yet.

# %% imports of the weight that learns tags=["export"] module="reference.learning"
import numpy as np

from llmnb.checks import check_array
from llmnb.reference.adamw import learn
from llmnb.shapes import shapes


# %% are these rows tags=["exporti"] module="reference.learning"
def check_aside(weight, aside, few):
    """Raise unless `aside` numbers rows of `few`, or is None."""
    if aside is not None:
        (OC, C), name = weight.shape, "matmul_learn: "
        own, rows = (np.dtype(np.int32),), 0 if few is None else len(few)
        check_array(f"{name}aside", aside, (OC,), own)
        check_array(f"{name}few", few, (rows, C), (weight.dtype,), True)
        if not -1 <= aside.min() <= aside.max() < len(few):
            raise ValueError(
                f"{name}aside must lie in [-1, {len(few)}), the rows "
                f"of few, got {aside.min()} to {aside.max()}"
            )


# %% a weight that learns tags=["export"] module="reference.learning"
@shapes("OC C!, OC C!, OC C!, OC!, B T OC, B T C, 7")
def matmul_learn(
    weight, m, v, squares, dout, inp, factors, aside=None, few=None
):
    """Take AdamW's step with a linear layer's gradient, dout.T @ inp.

    weight, m, v: (OC, C), change in place; m and v are AdamW's averages.
    dout: (B, T, OC). inp: (B, T, C). squares: (OC,), overwritten with the sum
    of the squares of each row of the gradient. factors: (7,), the Factors of
    the step. All of one float dtype. aside: (OC,) of int32, or None: row i, if
    aside[i] is not -1, does not learn; its gradient goes to few[aside[i]], a
    row of (R, C), and its sum of squares is 0. Raises TypeError or ValueError
    before it computes anything.
    """
    check_aside(weight, aside, few)
    OC, C = weight.shape
    grads = dout.reshape(-1, OC).T @ inp.reshape(-1, C)
    learns = slice(None)
    if aside is not None:
        few[aside[aside >= 0]] = grads[aside >= 0]
        grads[aside >= 0] = 0
        learns = aside < 0
    squares[:] = np.sum(grads * grads, axis=1)
    new = weight[learns], m[learns], v[learns]
    learn(new[0], grads[learns], *new[1:], factors)
    weight[learns], m[learns], v[learns] = new


# %% [markdown]
# ## While the gradient is made
#
# Compiled, each thread takes a share of the rows. A block of at most 88 rows and 768
# columns of $dw$ is made in 270 KB of the products' scratch memory by the packing and the
# tiles of [appendix A.3](../appendix/03_panels.ipynb). Then its parameters learn, and the
# next block is made in the same place: a block, its parameters and averages nearly fit a
# second-level cache of 1 MB together. Where a sum is longer than the panels, with more
# than 768 tokens, there is room for a dozen such blocks, 3.2 MB for each thread, which
# wait until their sums are complete.
#
# AdamW would now wait for the block's `weight`, `m` and `v`. But a tile asks for memory
# in each turn of its loop ([appendix A.2](../appendix/02_tile.ipynb)), so let it ask for
# these instead of the next columns: each of the last tiles of a block for one row of the
# block, in three arrays at once. (Not the first tiles: what they ask for would be gone
# by the time it is needed.) All sums have the order of the product, and the update has
# the lines of `adamw_update`.

# %% imports of the compiled version tags=["export"] module="cpu.learning"
import functools
from typing import NamedTuple

import numba
import numpy as np
from numba import carray, types

from llmnb.cpu.adamw import learn
from llmnb.cpu.jit import arguments, inlined, routine, team
from llmnb.cpu.matmul import as_flat
from llmnb.cpu.microkernel import Place, moved, steps_per_line
from llmnb.cpu.panels import (
    ALL, DEPTH, HEIGHT, INT, LENGTH, PAIR, PLACE, ROOM, SECOND, SIZES, SPARE,
    TALL, WIDTH, WORK, Block, Flat, Routines, all_tiles, check_bf16,
    multiply_panels, pack, scratch,
)  # fmt: skip
from llmnb.cpu.tile import COLS, ROWS
from llmnb.reference.learning import check_aside
from llmnb.shapes import shapes


# %% what tiles ask for tags=["exporti"] module="cpu.learning"
class Rows(NamedTuple):
    """Rows of three arrays that will be read, by address and in bytes.

    at: where the first row begins in the first array; row: from row to row;
    count: of rows; wide: how much of each; second, third: how much further
    on the other arrays begin.
    """

    at: int
    row: int
    count: int
    wide: int
    second: int
    third: int


@inlined
def _asked(ahead, left, lines, chain, per, size):
    """A row for each tile, as long as there are rows; else as in A.3.

    With fewer lines than a row has cache lines, a part of the row.
    """
    second, third = ahead.second, ahead.third
    if left >= ahead.count:
        return ahead.at, 0, 0, second, third
    step = (ahead.wide + lines - 1) // lines
    return ahead.at + left * ahead.row, chain * step, step, second, third


def _tiles_routine(out, start, bias, panels, spare, at, pair, sizes, ahead):
    out, start, bias = carray(out, ALL), carray(start, ALL), carray(bias, ALL)
    x = Flat(out, start, bias, carray(panels, ALL), carray(spare, ALL))
    all_tiles(x, at, pair[0], pair[1], sizes, ahead, _asked)


@functools.cache
def _routine(panel, number):
    """The routine for two dtypes of NumPy, which has an address."""
    p, x = (types.CPointer(numba.from_dtype(d)) for d in (panel, number))
    rows = types.NamedUniTuple(INT, 6, Rows)
    kinds = x, x, x, p, x, PLACE, PAIR, SIZES, rows
    return routine(_tiles_routine, types.void(*kinds))


# %% a block of the gradient tags=["exporti"] module="cpu.learning"
@inlined
def _multiply_block(code, x, at, rows, b, columns, fresh, ahead):
    """As multiply_rows of A.3, where tiles ask for Rows, ahead.

    code: Routines, with that of _tiles_routine to multiply. fresh: whether
    to pack the columns too, a Block of b.
    """
    per, down = steps_per_line(x.panels), (rows + ROWS - 1) // ROWS
    lines = (columns.depth + per - 1) // per
    for c in range(0, columns.rows, COLS):
        m, to = min(COLS, columns.rows - c), SECOND + c * lines
        if fresh:
            p = columns.at + c * columns.row
            block = Block(p, columns.row, columns.col, m, columns.depth)
            pack(code.pack_cols, x.panels, to, b, block)
        here, sizes = moved(at, 0, c), (rows, m, columns.depth, DEPTH)
        first, row, count, wide, second, third = ahead
        # the tiles of the panels that follow ask for the first rows
        later = (columns.rows - c - 1) // COLS * down
        left = max(0, count - later)
        ask = Rows(first + later * row, row, left, wide, second, third)
        multiply_panels(code.multiply, x, here, (0, to), sizes, ask)


# %% and its learning tags=["exporti"] module="cpu.learning"
@inlined
def _learn_block(weights, others, factors, grads, at, block):
    """AdamW on a block; its gradient begins at grads[at].

    others: squares, aside and few. block: top, bottom, left and right.
    """
    (params, m, v), (squares, aside, few) = weights, others
    top, bottom, left, right = block
    for i in range(top, bottom):
        row = grads[at : at + right - left]
        at += WIDTH
        total = row.dtype.type(0)
        if aside.size and aside[i] >= 0:
            few[aside[i], left:right] = row
        else:
            mine = slice(left, right)
            arrays = params[i, mine], row, m[i, mine], v[i, mine]
            total = learn(*arrays, factors)
        squares[i] = total if left == 0 else squares[i] + total


@inlined
def _rows_of(weights, block):
    """The Rows of a block of the parameters and their averages."""
    (params, m, v), (top, bottom, left, right) = weights, block
    size, at = params.itemsize, np.int64(params.ctypes.data)
    row, first = size * params.shape[1], at + size * left
    further = np.int64(m.ctypes.data) - at, np.int64(v.ctypes.data) - at
    wide = size * (right - left)
    return Rows(first + top * row, row, bottom - top, wide, *further)


# %% a strip of rows tags=["exporti"] module="cpu.learning"
# rows that are made, and learn, at a time
SHORT = max(ROWS, HEIGHT // 3 // ROWS * ROWS)


@inlined
def _learn_strip(weights, others, factors, x, strip, steps, code, memory):
    """Make the gradient of a strip block by block, and learn from it.

    x: dout and inp, flat, and the length of their sums; steps: as in
    chapter 2.4. strip: as a block. memory: of one thread, panels, spare and
    room for a gradient.
    """
    (a, b, depth), (panels, spare, grads) = x, memory
    a_row, a_col, b_row, b_col = steps
    top, bottom, left, right = strip
    zeros = ROWS * COLS
    spare[zeros : zeros + COLS] = 0
    for k in range(0, depth, LENGTH):
        n, start = min(LENGTH, depth - k), grads if k > 0 else spare
        flat = Flat(grads, start, spare, panels, spare)
        p = left * b_col + k * b_row
        columns = Block(p, b_col, b_row, right - left, n)
        for i in range(top, bottom, SHORT):
            rows, p = min(SHORT, bottom - i), i * a_row + k * a_col
            block, ahead = (i, i + rows, left, right), (i, i, left, right)
            pack(code.pack_rows, panels, 0, a, Block(p, a_row, a_col, rows, n))
            o = (i - top) * WIDTH if depth > LENGTH else 0
            at = Place(o, WIDTH, zeros, 0, 0, zeros, 0)
            if k > 0:
                at = Place(o, WIDTH, o, WIDTH, 1, zeros, 0)
            if k + n == depth:
                ahead = block
            ask = _rows_of(weights, ahead)
            _multiply_block(code, flat, at, rows, b, columns, i == top, ask)
            if k + n == depth:
                _learn_block(weights, others, factors, grads, o, block)


# %% the kernel tags=["exporti"] module="cpu.learning"
@team
def _learn(part, parts, address):
    given = arguments(address)
    weights, others, factors, x = given[:3], given[3:6], given[6], given[7:10]
    rows, steps, code, panels, work = given[10:]
    cols = weights[0].shape[1]
    f = factors
    seven = f[0], f[1], f[2], f[3], f[4], f[5], f[6]
    memory = panels[part], work[part, SPARE:], work[part, ROOM:]
    down = -(-rows // (parts * ROWS)) * ROWS
    end = min(rows, (part + 1) * down)
    tall = TALL if x[2] > LENGTH else down
    for left in range(0, cols, WIDTH):
        right = min(left + WIDTH, cols)
        for top in range(part * down, end, tall):
            strip = top, min(top + tall, end), left, right
            _learn_strip(
                weights, others, seven, x, strip, steps, Routines(*code),
                memory,
            )  # fmt: skip


# %% a weight that learns, compiled tags=["export"] module="cpu.learning"
@shapes("OC C!, OC C!, OC C!, OC!, B T OC, B T C, 7", work=WORK)
def matmul_learn(
    weight, m, v, squares, dout, inp, factors, aside=None, few=None,
    work=None, bf16=False,
):  # fmt: skip
    """Take AdamW's step with a linear layer's gradient, dout.T @ inp.

    weight, m, v: (OC, C), change in place; m and v are AdamW's averages.
    dout: (B, T, OC). inp: (B, T, C). squares: (OC,), overwritten with the sum
    of the squares of each row of the gradient. factors: (7,), the Factors of
    the step. All float32 or all float64 and C-contiguous. aside: (OC,) of
    int32, or None: row i, if aside[i] is not -1, does not learn; its gradient
    goes to few[aside[i]], a row of (R, C), and its sum of squares is 0. work,
    bf16: as in matmul_forward. Raises TypeError or ValueError before it
    computes anything.
    """
    check_aside(weight, aside, few)
    check_bf16("matmul_learn", bf16, inp.dtype)
    (*packers, _), panels, work = scratch(work, bf16, inp.dtype)
    (OC, C), tokens = weight.shape, inp.shape[0] * inp.shape[1]
    if aside is None:
        aside, few = np.empty(0, np.int32), weight[:0]
    a, *a_steps = as_flat(dout.reshape(tokens, OC).T)
    b, *b_steps = as_flat(inp.reshape(tokens, C))
    code = *packers, _routine(panels.dtype, work.dtype).address
    others = squares, aside, few
    how = OC, (*a_steps, *b_steps), code, panels, work
    _learn(weight, m, v, *others, factors, a, b, tokens, *how)


# %% [markdown]
# A weight of 600 rows and 800 columns learns from 1,000 tokens, and its rows 3 and 77
# are set aside. The plain way stores the gradient, and lets every row learn:

# %% one weight, in both ways
import numba

from llmnb import cpu, reference
from llmnb.reference.adamw import AdamW
from llmnb.timing import fastest, machine

rng = np.random.default_rng(511)
shapes = (2, 500, 600), (2, 500, 800), (600, 800)
dout, inp, start = (rng.normal(size=x).astype(np.float32) for x in shapes)
rule = AdamW(learning_rate=1e-2, eps=0.1, step=1)
plain = start.copy(), np.zeros_like(start), np.zeros_like(start)
grads, dinp = np.zeros_like(start), np.zeros_like(inp)
cpu.matmul_backward(dinp, grads, None, dout, inp, plain[0])
p, m, v = (x.reshape(-1) for x in plain)
cpu.adamw_update(p, grads.reshape(-1), m, v, rule)

learnt = start.copy(), np.zeros_like(start), np.zeros_like(start)
aside, few = np.full(600, -1, np.int32), np.empty((2, 800), np.float32)
aside[[3, 77]] = 0, 1
squares, factors = np.empty(600, np.float32), rule.factors("one weight")
arrays = *learnt, squares, dout, inp, np.array(factors, np.float32)
cpu.matmul_learn(*arrays, aside, few)

others = aside < 0
pairs = zip(learnt, plain, strict=True)
same = all(np.array_equal(x[others], y[others]) for x, y in pairs)
verdict("weight, m and v", same, "the same bits")
verdict("rows set aside", np.array_equal(few, grads[~others]), "the same bits")
stay = np.array_equal(learnt[0][~others], start[~others])
verdict("they stay", stay, "yes")
compare("squares", squares[others], (grads[others] ** 2).sum(1), tol=1e-5)
by_numpy = start.copy(), *np.zeros((2, 600, 800), np.float32)
by_numpy += np.empty_like(squares), np.empty_like(few)
reference.matmul_learn(*by_numpy[:4], *arrays[4:], aside, by_numpy[4])
pairs = zip(by_numpy, (*learnt, squares, few), strict=True)
close = all(np.allclose(x, y, rtol=1e-4, atol=1e-3) for x, y in pairs)
verdict("NumPy", close, "the same, rounded otherwise")

# %% [markdown]
# Is it faster? Take the matrix that makes GPT-2's logits and 256 tokens. The product
# alone, the update alone, and both at once:

# %% together and apart, timed tags=["nbval-ignore-output"]
V, C, tokens = 50304, 768, 256
weight, grads, m, v = np.zeros((4, V, C), np.float32)
dout = rng.normal(size=(1, tokens, V)).astype(np.float32)
inp, dinp = rng.normal(size=(2, 1, tokens, C)).astype(np.float32)
both = dinp, grads, None, dout, inp, weight
whole = fastest(cpu.matmul_backward, *both)
without = fastest(cpu.matmul_backward, dinp, None, *both[2:])
flat = [x.reshape(-1) for x in (weight, grads, m, v)]
update = fastest(cpu.adamw_update, *flat, rule)
squares = np.zeros(V, np.float32)
arrays = weight, m, v, squares, dout, inp, np.array(factors, np.float32)
learnt = fastest(cpu.matmul_learn, *arrays)
print(f"{machine()}, {numba.get_num_threads()} threads")
print(f"product {(whole - without) * 1e3:6.1f} ms")
print(f"update  {update * 1e3:6.1f} ms")
print(f"at once {learnt * 1e3:6.1f} ms")

# %% [markdown]
# The update hides behind the product for the most part.
#
# ## The model that learns
#
# The parts of a block hand the gradient of each weight on to `matmul_backward` and do not
# look at it ([chapter 1.13](../1_by_hand/13_block.ipynb)). So something else may stand
# where the gradient of a weight would: a `Learner`, which knows what learning takes. The
# layers are wrapped, as LoRA's were: `matmul_backward` makes the gradient of the input,
# with the weight as it is, and then lets the weight learn.

# %% imports tags=["export"] module="model.inbackward"
import math
from typing import Any, NamedTuple

import numpy as np

from llmnb.model.gpt2 import GPT2
from llmnb.model.lora import HOSTS
from llmnb.model.tensors import full_shape, tensor_table


# %% what stands for a gradient tags=["exporti"] module="model.inbackward"
class Learner(NamedTuple):
    """What `matmul_learn` takes besides a weight, dout and inp."""

    m: Any
    v: Any
    squares: Any
    factors: Any
    aside: Any = None
    few: Any = None


class _Learning:
    """A backend's layers; a weight whose gradient is a Learner learns."""

    def __init__(self, ops):
        self._ops = ops

    def __getattr__(self, name):
        return getattr(self._ops, name)

    def matmul_backward(
        self, dinp, dweight, dbias, dout, inp, weight,
        add_dinp=True, add_dweight=True, **how,
    ):  # fmt: skip
        """As the backend's; then the weight learns, if it is to."""
        learns = isinstance(dweight, Learner)
        arrays = dinp, None if learns else dweight, dbias, dout, inp, weight
        self._ops.matmul_backward(*arrays, add_dinp, add_dweight, **how)
        if learns:
            m, v, squares, *rest = dweight
            arrays = weight, m, v, squares, dout, inp, *rest
            self._ops.matmul_learn(*arrays, **how)


# %% [markdown]
# All matrices of the blocks learn so. What is left, biases, the weights of norms, a table
# of positions, and a table of tokens that is not tied, has its gradients stored as ever,
# and learns at the end.
#
# ## The table of tokens
#
# The table that makes the logits is the largest matrix, and if it is tied, it also
# gives every token its vector: its gradient comes from both ends of the model. But the
# other end reaches only the rows of the tokens that are in the batch. So those are set
# aside when the table learns at the head, with their gradients; the encoder adds
# to these few rows at the end; and then they learn.
#
# ## Logits, some tokens at a time
#
# And the logits themselves? They are the largest activation, $V$ numbers for each
# token, and a step needs them no longer than their gradient lives. So one may take 768
# tokens at a time: their logits, losses and gradients, and then those of the next
# 768 in the same place. But the gradient of the table is a sum over all tokens. It
# must then be stored, $VC$ numbers, and the table learns at the end. With more than
# $768 + C$ tokens that is less than the logits it saves. With fewer, all logits are
# there at once and the table learns at the head.
#
# The compiled product adds up in chains of 384 tokens
# ([chapter 2.4](../2_cpu/04_matmul.ipynb)). So two whole chains at a time give the
# same bits. (NumPy's product has its own order; its last bits may differ.) The room for
# all logits is there still, for whoever asks for them after `forward`; but a system
# hands out memory when it is first written
# ([chapter 1.16](../1_by_hand/16_memory.ipynb)), and a step writes 768 rows only.


# %% who learns, and how tags=["exporti"] module="model.inbackward"
PART = 768  # tokens whose logits are there: two whole chains of the sums


def _at_once(cfg, tokens):
    """Whether all logits take no more than PART's and the table's gradient."""
    return tokens <= PART + cfg.channels


def _head(cfg):
    """The name of the table that makes the logits."""
    names = [x.name for x in tensor_table(cfg)]
    return "head" if "head" in names else "wte"


def _learners(cfg, tokens):
    """The tensors that learn as soon as their gradients are made."""
    head = _head(cfg) if _at_once(cfg, tokens) else None
    return [
        x for x in tensor_table(cfg)
        if (x.stacked and len(x.shape) == 2) or x.name == head
    ]  # fmt: skip


def _in_one_row(array):
    """An array (B, T, ...) as (1, B T, ...)."""
    return array.reshape(1, -1, *array.shape[2:])


# %% the layout of its memory tags=["export"] module="model.inbackward"
def in_backward_layout(cfg, layout):
    """The layout of a model's memory, with gradients of what learns later.

    cfg: of the model. layout: as gpt2_layout gives it.
    """
    dtype, shapes = layout["grads"]
    batch = layout["batch"][1]["tokens"]
    tokens = math.prod(batch)
    own = {x.name: full_shape(x, cfg)[:-1] for x in _learners(cfg, tokens)}
    layout = layout | {
        "grads": (dtype, {n: x for n, x in shapes.items() if n not in own}),
        "squares": (dtype, own),
        "factors": (dtype, dict.fromkeys(own, (7,))),
    }
    if "wte" in own:  # some of its rows learn later
        table = shapes["wte"]
        few = min(tokens, table[0]), table[1]
        layout["few"] = dtype, {"few": few}
        layout["places"] = np.int32, {"places": batch, "aside": table[:1]}
    return layout


# %% learn while going back tags=["export"] module="model.inbackward"
class InBackward(GPT2):
    """A model, of any architecture, whose matrices learn while it goes back.

    It learns as GPT2 does, to the bit (with NumPy's layers if a batch has at
    most 768 + channels tokens), by `step` alone and without clipping. cfg,
    batch_size, seq_len, backend, precision, seed: as for GPT2, on the host.
    grads has the gradients of what does not learn at once: all but the
    blocks' matrices and, in such a batch, the table of the logits.
    backward, update and clip_gradients raise RuntimeError, for they need
    all gradients.
    """

    backends = HOSTS

    def _allocate(self, layout):
        self._machine.ops = _Learning(self._machine.ops)
        layout = in_backward_layout(self.cfg, layout)
        super()._allocate(layout)
        self._later = list(self.memory["grads"])
        self._few = self.memory["few"]["few"] if "few" in layout else None
        for x in _learners(self.cfg, self.batch_size * self.seq_len):
            self.memory["grads"][x.name] = self._learner(x)

    def _learner(self, x):
        """A tensor's Learner, or the list of those of its blocks."""
        name, memory = x.name, self.memory
        groups = [memory[group][name] for group in ("m", "v", "squares")]
        factors, last = memory["factors"][name], ()
        if x.stacked:
            blocks = zip(*groups, strict=True)
            return [Learner(*own, factors) for own in blocks]
        if name == "wte":
            last = memory["places"]["aside"], self._few
        return Learner(*groups, factors, *last)

    def _whole_step(self, max_norm, decay):
        for name, factors in self.memory["factors"].items():
            decays = decay is None or name in decay
            factors[:] = self._settings[not decays].factors("InBackward.step")
        if self._few is not None:
            self._set_aside()
        self._again(self._stream)
        self._weigh_losses()
        self._again(self._backward)
        self._squares = self.memory.flat("squares").sum(dtype=np.float64)
        groups = [self.memory[g] for g in ("params", "grads", "m", "v")]
        for name in self._later:
            flat = (tensors[name].reshape(-1) for tensors in groups)
            self._learn(name, decay, *flat)
        if self._few is not None:
            self._learn_few(decay)

    def _set_aside(self):
        """Number the tokens of the batch, whose rows learn last."""
        tokens, memory = self._batch["tokens"], self.memory["places"]
        self._present, found = np.unique(tokens, return_inverse=True)
        memory["places"][...] = found.reshape(tokens.shape)
        memory["aside"].fill(-1)
        memory["aside"][self._present] = np.arange(self._present.size)

    def _logits_backward(self, dln, add):
        """Logits, losses and gradients of some tokens, then of the next."""
        p, g, ops, head = self.params, self.grads, self.ops, self._ends.head
        names = "lnf", "logits", "losses", "lse", "dlosses"
        every = {name: self._acts[name] for name in names} | {"dln": dln}
        every["targets"] = self._batch["targets"]
        tokens, V = every["targets"].size, self.cfg.vocab_size
        rows = tokens if _at_once(self.cfg, tokens) else PART
        if rows < tokens:
            every = {name: _in_one_row(x) for name, x in every.items()}
        for first in range(0, tokens, rows):
            a = {k: x[:, first : first + rows] for k, x in every.items()}
            logits = every["logits"][:, : a["targets"].shape[1]]
            a |= {"logits": logits, "V": V}  # the same place each time
            head.forward(ops, logits, a["lnf"], p, self._how)
            arrays = a["losses"], a["lse"], logits, a["targets"], V
            ops.crossentropy_softmax_forward(*arrays)
            how = add or first > 0, self._how
            head.backward(ops, a["dln"], a, a, p, g, *how)

    def _encoder_backward(self):
        grads, tokens = self.grads, self._batch["tokens"]
        if self._few is not None:
            grads = grads | {"wte": self._few}
            tokens = self.memory["places"]["places"]
        d = self._dacts["dstream"]
        self._ends.encoder.backward(self.ops, d, tokens, grads)

    def _learn(self, name, decay, params, grads, m, v):
        """AdamW on a tensor, or on some of its rows, as flat arrays."""
        decays = decay is None or name in decay
        settings = self._settings[not decays]
        self.ops.adamw_update(params, grads, m, v, settings)
        self._squares += self.ops.clip_gradients(grads, math.inf) ** 2

    def _learn_few(self, decay):
        """The rows of the batch's tokens, from both ends' gradients."""
        rows = self._present
        tables = [self.memory[group]["wte"] for group in ("params", "m", "v")]
        p, m, v = (table[rows].reshape(-1) for table in tables)
        grads = self._few[: rows.size].reshape(-1)
        self._learn("wte", decay, p, grads, m, v)
        for table, x in zip(tables, (p, m, v), strict=True):
            table[rows] = x.reshape(rows.size, -1)

    def _norm(self):
        return math.sqrt(self._squares)

    def step(self, tokens, targets, max_norm=math.inf, **settings):
        """As GPT2.step; raises ValueError for a max_norm that is not inf."""
        if max_norm != math.inf:
            raise ValueError(
                f"InBackward.step: max_norm must be inf, got {max_norm!r}: "
                f"weights learn before the norm of all gradients is known"
            )
        return super().step(tokens, targets, **settings)

    def backward(self, add=False, share=1.0):
        """Raises RuntimeError: call step."""
        self._check_gradients("backward")

    def _check_gradients(self, name):
        raise RuntimeError(
            f"InBackward.{name}: gradients are not kept; call step"
        )


# %% [markdown]
# ## Proof
#
# Not a tolerance this time: after three steps of either model the losses and
# every parameter must be the same bits. Only the norm has one, for the squares of a row
# are added up in float32. With GPT-2 and with a tied Llama, and with weight decay on
# all tensors or on some, as the lines say. A batch of 816 tokens has its logits in two
# parts; a batch of 48, all at once:

# %% the same bits
gpt2 = llmnb.GPT2Config(
    max_seq_len=16, vocab_size=97, num_layers=3, num_heads=2, channels=32
)
llama = llmnb.LlamaConfig(
    max_seq_len=16, vocab_size=97, num_layers=3, num_heads=4, channels=32,
    num_kv_heads=2, tied=True,
)  # fmt: skip


def three_steps(made, cfg, decay, rows):
    """Losses, norms and parameters after three steps."""
    model, told = made(cfg, rows, 16), []
    tokens = np.random.default_rng(511).integers(0, 97, (3, rows, 17))
    for step, batch in enumerate(tokens, 1):
        how = {"step": step, "learning_rate": 1e-2, "decay": decay}
        told.append(model.step(batch[:, :-1], batch[:, 1:], **how))
    losses, norms = zip(*told, strict=True)
    return losses, norms, model.params


for name, cfg in ("GPT-2", gpt2), ("Llama", llama):
    for decay, rows in (None, 3), (None, 51), (("fcw", "wte"), 3):
        want = three_steps(llmnb.GPT2, cfg, decay, rows)
        got = three_steps(InBackward, cfg, decay, rows)
        same = all(np.array_equal(got[2][x], want[2][x]) for x in want[2])
        where = f"{name}, {'some' if decay else 'all'}, {16 * rows} tokens"
        verdict(f"{where} losses", got[0] == want[0], "the same bits")
        verdict(f"{where} weights", same, "the same bits")
        compare(f"{where} norms", np.array(got[1]), want[1], tol=1e-5)

# %% [markdown]
# A mistake that is easy to make: to let the whole table learn at the head. The rows of
# the batch's tokens then learn twice, each time from a part of their gradient. The first
# loss is right all the same; the norm and all later losses are not.


# %% a mistake, caught
class NoneAside(InBackward):
    def _set_aside(self):
        super()._set_aside()
        self.memory["places"]["aside"].fill(-1)


losses = three_steps(NoneAside, gpt2, None, 3)[0]
want = three_steps(llmnb.GPT2, gpt2, None, 3)[0]
verdict("the first loss", losses[0] == want[0], "is right")
verdict("none set aside", losses[1:] != want[1:], "caught")

# %% [markdown]
# ## Count it
#
# With $P$ parameters training holds $4P$ numbers besides activations. Now it is $3P$ and
# a few gradients: for SmolLM2, which is tied, on 256 tokens

# %% numbers held
smollm2 = llmnb.PRESETS["smollm2-135m"]
table = tensor_table(smollm2)
P = sum(math.prod(full_shape(x, smollm2)) for x in table)
learners = {x.name for x in _learners(smollm2, 256)}
rest = [x for x in table if x.name not in learners]
rest = sum(math.prod(full_shape(x, smollm2)) for x in rest)
few = 256 * smollm2.channels
print(f"{4 * 4 * P / 1e6:,.0f} MB before")
print(f"{4 * (3 * P + rest + few) / 1e6:,.0f} MB in backward, of them")
print(f"{4 * rest / 1e6:.2f} MB for the gradients of norms")
print(f"{4 * few / 1e6:.2f} MB for those of the batch's rows of the table")

# %% [markdown]
# `tests/record_lora.py` asked the system for the peak of a process that fine-tunes it:

# %% measured
measured = json.loads(Path("../../book/lora.json").read_text("utf-8"))
for kind in "whole", "inbackward", "lora":
    row = measured[kind]
    print(f"{kind:10} peak {row['peak'] / 1e9:.2f} GB, "
          f"gradients {row['sizes']['grads'] / 1e9:.2f}, "
          f"third loss {row['losses'][2]:.2f}")  # fmt: skip
same = measured["inbackward"]["losses"] == measured["whole"]["losses"]
verdict("SmolLM2, losses", same, "the bits of the whole")

# %% [markdown]
# `llmnb train --in-backward --clip 0` makes a run of it, which can be stopped and
# resumed as any other, and gives the weights of the run without it, to the bit. (Its
# validations write all logits, which then take their whole room.)
#
# `llmnb bench --in-backward` lets such a model race with the plain one and with
# PyTorch. Here GPT-2 124M learns from 4 rows of 64 tokens, and from one of 1,024
# ([results page](../../book/results.md)):

# %% a race
path = Path("../../book/results/7-zen5-lean.json")
for contest in json.loads(path.read_text("utf-8"))["contests"]:
    print(contest["name"])
    for row in contest["contestants"]:
        ms, size = 1e3 * row["step_seconds"], row["memory_bytes"] / 1e6
        low, *_, high = (1e3 * x for x in sorted(row["seconds"]))
        print(f"  {row['name']:<24}{size:6,.0f} MB{ms:8,.0f} ms a step, "
              f"{low:,.0f} to {high:,.0f}")  # fmt: skip

# %% [markdown]
# A fifth of the memory is gone, with 1,024 tokens a sixth. A step of 256 tokens takes 4 %
# less, one of 1,024 as long, for there the update was a smaller part; the rounds of the
# race differ by more.

# %% what is held, and when tags=["hide-input"]
tensors = [x for x in table if x.stacked]
block = sum(math.prod(x.shape) for x in tensors)
ends = P - smollm2.num_layers * block
L = smollm2.num_layers
moments = np.arange(L + 1)  # the head, then the blocks from last to first
both = {
    "all, then learn": (ends + moments * block, "orange"),
    "in backward": (few + rest / L * moments, "blue"),
}
fig, ax = plt.subplots(figsize=(7.5, 2.6), dpi=100)
for name, (held, colour) in both.items():
    ax.step(moments, 4 * held / 1e6, where="post", color=PALETTE[colour])
    ax.text(L, 4 * held[-1] / 1e6 + 14, name, ha="right",
            color=PALETTE[colour])  # fmt: skip
ax.set(xlabel="blocks that have gone back", ylabel="MB of gradients",
       ylim=(0, 620), xlim=(0, L))  # fmt: skip
ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 5.11.1. Gradients that SmolLM2 has stored as it goes back through its 30
# blocks. All of them come to 538 MB; where matrices learn at once it is less than one.*
#
# LoRA takes less still, for frozen weights need no averages, but has learnt less.
#
# ## What it does not do
#
# It cannot clip, nor can it drop a step whose norm is a spike or no number: weights have
# learnt before the norm is known. So a long run is safer with clipping
# ([chapter 1.18](../1_by_hand/18_training.ipynb)). And it cannot add up the gradients of
# several batches, for nothing of the first would be left. It runs on the CPU.
#
# ## Take away
#
# - A gradient lives from the product that makes it to its update.
# - Let the update follow at once, and only a block of it is ever there.
# - A product waits for the processor, an update for memory: one can hide the other.
# - The same bits from $3P$ numbers instead of $4P$; no clipping, no accumulation.
#
# ## Exercises
#
# **1** (★★). AdamW moves 28 bytes a parameter, and a machine's memory 60 GB a second; its
# cores take 530 thousand million floating-point operations a second. From how many tokens
# on does making $dw$ take longer than its update?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# $N$ tokens are $2N$ operations for each parameter, $2N / 530$ ns; the update takes
# $28 / 60 = 0.47$ ns. So from 124 tokens on. With fewer, memory would still be busy when the
# product is done.
# :::

# %% exercise 1, checked tags=["hide-cell"]
first = np.argmax(2 * np.arange(999) / 530 > 28 / 60)
verdict("1: dw", first == 124, "longer from 124 tokens on")

# %% [markdown]
# ## Further reading
#
# - Lv et al. (2023),
#   [Full Parameter Fine-tuning for Large Language Models with Limited
#   Resources](https://arxiv.org/abs/2306.09782): the same loop with plain gradient
#   descent, and two passes where the norm is wanted.
#
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("5.11")
