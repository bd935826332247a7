# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       cpu.bfloat16: "Products of factors rounded to bfloat16."
#       reference.bfloat16: "Rounding to bfloat16 and back, in NumPy."
# ---

# %% [markdown]
# # bfloat16: half the bits of every factor
#
# > A float32 without its lower half: how to round to it, what that does to a
# > model, and what products of such numbers buy.
#
# *Reading time: 20 minutes. You need: the products of
# [chapter 2.4](04_matmul.ipynb) and the whole model
# ([chapter 1.17](../1_by_hand/17_model.ipynb)).*

# %% [markdown]
# ## Where we are
#
# The products of chapter 2.4 are near the most that a processor can do in
# float32. To go further it must do more in one instruction, and it can if the
# numbers are shorter. At the end of this chapter you can
#
# - say which bits bfloat16 keeps, and round to it by hand;
# - prove a rounding for all finite floats by trying 326,400 of them;
# - say why a model may be used in bfloat16, and may not be trained in it alone;
# - round the factors of a product on the way, and keep its sums in float32.

# %% [markdown]
# ## Setup

# %% setup
import numpy as np

from llmnb.book.verify import compare, verdict
from llmnb.timing import fastest, machine

rng = np.random.default_rng(16)

# %% [markdown]
# ## By hand: a number in sixteen bits
#
# A float has a sign, an exponent and a fraction. The exponent says between
# which two powers of two the number lies, and the fraction cuts the way from
# one to the other into equal steps.
#
# | format | sign | exponent | fraction | largest | step past 1 |
# |---|---|---|---|---|---|
# | float32 | 1 | 8 | 23 | $3.4 \cdot 10^{38}$ | $2^{-23}$ |
# | bfloat16 | 1 | 8 | 7 | $3.4 \cdot 10^{38}$ | $2^{-7}$ |
# | float16 | 1 | 5 | 10 | 65,504 | $2^{-10}$ |
#
# bfloat16 keeps float32's range and gives up its precision; float16 does it
# the other way round. bfloat16 is the upper half of a float32, and reads back
# by putting 16 zero bits behind it.
#
# To write it we must round. Let $u$ be a float32's 32 bits, taken as a whole
# number. The bits of positive floats count upwards as the floats do, so
# rounding the number is rounding $u / 2^{16}$ to a whole number. Adding half,
# $2^{15}$, and dropping 16 bits rounds to the nearest, and a tie upwards. IEEE
# sends a tie to the even neighbour, that is, down when bit 16 of $u$ is 0. So
# add one less in that case:
#
# $$ \text{bf16}(u) = \Big\lfloor \frac{u + 2^{15} - 1 + b_{16}(u)}{2^{16}}
#    \Big\rfloor , \tag{2.6.1} $$
#
# where $b_{16}(u)$ is bit 16. A carry runs from the fraction into the exponent,
# which is right: after the largest fraction comes the next power of two, and
# after the largest number infinity. What (2.6.1) spoils is NaN: its fraction is
# not zero, but the upper half of it may be, or a carry may run out of it. So a
# NaN is cut off instead, with one bit set.

# %% imports of the rounding tags=["export"] module="reference.bfloat16"
import numpy as np

from llmnb.checks import check_fit


# %% to bfloat16 and back tags=["export"] module="reference.bfloat16"
def to_bfloat16(x):
    """The 16 bits of the bfloat16 nearest to each number, equation (2.6.1).

    x: float32, of any shape; TypeError for another dtype. Returns uint16 of
    the same shape. A tie goes to the even neighbour, what is too large to
    infinity; NaN stays NaN.
    """
    check_fit("to_bfloat16: x", x, None, np.float32)
    bits = x.view(np.uint32)
    nearest = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    cut = bits >> 16 | 0x40
    return np.where(np.isnan(x), cut, nearest).astype(np.uint16)


def from_bfloat16(bits):
    """The float32 numbers that bfloat16 bits (uint16) stand for, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


# %% [markdown]
# Take $\pi$, two ties, and a number too large:


# %% pi in sixteen bits
def fields(u, width):
    """The bits of a float, sign and exponent apart."""
    bits = f"{u:0{width}b}"
    return f"{bits[0]} {bits[1:9]} {bits[9:]}"


pi = np.array([np.pi], np.float32)
half = to_bfloat16(pi)
print("float32 ", fields(pi.view(np.uint32)[0], 32))
print("bfloat16", fields(half[0], 16))
verdict("pi", from_bfloat16(half)[0] == 3 + 9 / 64, "becomes 3 + 9/64")


# %% four numbers, rounded
numbers = [1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, np.nan]
halves = to_bfloat16(np.array(numbers, np.float32))
print([f"{h:04x}" for h in halves])

# %% [markdown]
# What was cut off from $\pi$, `0000111111011011`, is less than half of a last
# place (`1000000000000000`), so it was rounded down. Of the four, the first two
# lie halfway between neighbours and went to the even one, one down and one up;
# the third is larger than the largest bfloat16 by more than half a step, and
# became infinity; NaN stayed NaN.
#
# ## A rounding proved for every float
#
# To try (2.6.1) on all $2^{32}$ floats would take a while, and we need not.
# Take the $2^{16}$ floats that share an upper half: a bfloat16 number and what
# lies between it and the next. Let all of them be finite. Among them $b_{16}$ is constant, so (2.6.1) can
# only grow with $u$. If it is right for the first of them and for the last
# before the middle, it is right for all between those two; likewise from the
# first after the middle to the last of all. With the middle that makes five
# floats for each of 65,280 upper halves, 326,400 in all. (The sign is a bit like the others
# here: a negative number is rounded as its absolute value.)


# %% every upper half, at the five places that matter
upper = np.arange(1 << 16, dtype=np.uint32)
finite = (upper & 0x7F80) != 0x7F80  # the exponent of all ones is special
upper = upper[finite]
cases = {
    "itself": (0, upper),
    "below the middle": (0x7FFF, upper),
    "the middle": (0x8000, upper + (upper & 1)),  # to the even neighbour
    "above the middle": (0x8001, upper + 1),
    "the last": (0xFFFF, upper + 1),
}
for name, (lower, want) in cases.items():
    x = (upper << 16 | lower).view(np.float32)
    right = (to_bfloat16(x) == want).sum()
    verdict(name, right == upper.size, f"{right} of {upper.size} right")

# %% [markdown]
# The upper halves with an exponent of all ones are left: infinity and NaN. An
# infinity must stay one and a NaN must not become a number, not even
# `7fffffff`, to which adding anything would carry into the sign.


# %% infinity and NaN
special = np.arange(1 << 16, dtype=np.uint32)[~finite]
x = special[:, None] << 16 | np.array([0, 1, 0x8000, 0xFFFF], np.uint32)
x = x.view(np.float32)
back = from_bfloat16(to_bfloat16(x))
verdict("NaN", np.array_equal(np.isnan(back), np.isnan(x)), "stays NaN")
same = back[np.isinf(x)] == x[np.isinf(x)]
verdict("infinity", same.sum() == 2, "stays, both of them")

# %% [markdown]
# A proof by an argument deserves a check without one: a million random bit
# patterns, and for each the distances, in float64, to the bfloat16 it became
# and to that one's two neighbours.


# %% a million random floats
bits = np.random.default_rng(16).integers(0, 2**32, 1 << 20, np.uint64)
x = bits.astype(np.uint32).view(np.float32)
# without NaN, and without the smallest, which have fewer bits
x = x[(np.abs(x) < 3e38) & (np.abs(x) >= 2.0**-126)]
got = to_bfloat16(x)
distance = [
    np.abs(from_bfloat16(got + np.uint16(k)).astype(float) - x)
    for k in (0, 1, 65535)
]
verdict("nearest", (distance[0] <= np.minimum(*distance[1:])).all(), "always")
error = distance[0] / np.abs(x)
verdict("relative error", error.max() <= 2**-8, "at most 2^-8")

# %% [markdown]
# The bound can be read off: the step after $2^e$ is $2^{e-7}$, rounding errs
# by half a step at most, and the number is at least $2^e$.
#
# Two roundings that look as good are not. Cutting the lower half off always
# goes towards zero, so that weights shrink; sending every tie upwards is
# wrong for half of the ties. The check of the middle sees both.


# %% two wrong roundings, caught
x = (upper << 16 | 0x8000).view(np.float32)
even = upper + (upper & 1)
for name, wrong in (
    ("cut off", lambda u: u >> 16),
    ("half up", lambda u: u + 0x8000 >> 16),
):
    missed = (wrong(x.view(np.uint32)) != even).sum()
    verdict(name, 2 * missed == upper.size, f"caught, {missed} ties wrong")

# %% [markdown]
# ## What it does to a model
#
# Every weight is off by at most $2^{-8}$, four thousandths. A matrix product
# adds up many such errors of either sign, and they mostly cancel. Let us see
# what is left of them in the loss of a small model, which learns here in a few
# steps to repeat one line, the expression that cuts a text into words.

# %% a small trained model
from llmnb import GPT2, GPT2Config, tokenizer
from llmnb.text.bpe import WORDS

text = WORDS * 40
ids = np.array(tokenizer.byte().encode(text)[: 4 * 64 + 1])
batch = ids[:-1].reshape(4, 64), ids[1:].reshape(4, 64)
model = GPT2(GPT2Config(64, 257, 2, 4, 64), 4, 64, backend="cpu")
first = model.forward(*batch)
for step in range(1, 41):
    loss = model.forward(*batch)
    model.backward()
    model.update(learning_rate=3e-3, step=step)
loss = model.forward(*batch)
verdict("training", loss < first / 4, "loss below a quarter")

# %% the same model, every weight rounded
for name in model.params:
    weights = model.params[name]
    weights[...] = from_bfloat16(to_bfloat16(weights))
moved = abs(model.forward(*batch) - loss)
verdict("loss", 0 < moved < 0.02, "moves by less than 0.02")

# %% [markdown]
# So bfloat16 does for a model that will be *used*, and its file is half as
# long. It does not do for a model that will be trained on: a step of AdamW at a
# learning rate of $10^{-4}$ moves a weight by about $10^{-4}$, and from 0.1 to
# its neighbour it is $2^{-11} \approx 5 \cdot 10^{-4}$. The step is rounded
# away, and so are all the steps after it.


# %% a hundred steps that go nowhere
weight = np.array([0.1], np.float32)
half = from_bfloat16(to_bfloat16(weight))
start = half.copy()
for _ in range(100):
    weight += np.float32(1e-4)
    half = from_bfloat16(to_bfloat16(half + np.float32(1e-4)))
verdict("float32", abs(weight[0] - 0.11) < 1e-6, "has moved by 0.01")
verdict("bfloat16", half[0] == start[0], "has not moved")

# %% [markdown]
# That is why the weights stay in float32, and the gradients and AdamW's
# moments too. What may be rounded are the factors of a product, each time one
# is taken. The sums stay in float32, since a long sum of 8 bits would lose its
# small terms as the weight lost its steps.
#
# ## Products of pairs
#
# Processors with AVX512-BF16 have an instruction, `vdpbf16ps`, that multiplies
# 32 pairs of bfloat16 numbers and adds them to 16 sums in float32: twice the
# work of an FMA. It takes two neighbouring steps of the sum in one number of 32
# bits. So a line of a panel, when it is packed ([chapter A.3](../appendix/03_panels.ipynb)),
# may stand for two steps: a panel of type uint32 holds such pairs, and is half
# as long. Rounding is part of packing, and costs no pass over memory.
#
# On a vector of numbers (2.6.1) is a shift, a mask and two additions, in the
# words of [chapter A.2](../appendix/02_tile.ipynb). Only NaN is not looked for.
# The one that arithmetic makes is `7fc00000` or `ffc00000`, to which the addition
# does no harm: a model that computes NaN is broken already, and stays so.

# %% imports of the pairs tags=["exporti"] module="cpu.bfloat16"
import os

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types

from llmnb.cpu.tile import I32, LANES, constant, cpu_features, multiply_add

# %% pairs of bfloat16 tags=["exporti"] module="cpu.bfloat16"
HALVES = "avx512bf16" in cpu_features() and LANES == 16  # has vdpbf16ps


def steps_in(kind):
    """Steps of the sum in one line of a panel, an array of this type."""
    return 2 if kind.dtype == types.uint32 else 1


def pair(builder, low, high):
    """Round two vectors to bfloat16, side by side in uint32."""
    count = low.type.count

    def every(bits):
        return constant(I32, [bits] * count)

    def rounded(x):
        bits = builder.bitcast(x, ir.VectorType(I32, count))
        odd = builder.and_(builder.lshr(bits, every(16)), every(1))
        return builder.add(bits, builder.add(odd, every(0x7FFF)))

    low = builder.lshr(rounded(low), every(16))
    return builder.or_(low, builder.and_(rounded(high), every(0xFFFF0000)))


# %% [markdown]
# Where the processor lacks the instruction, the same panels can still be
# multiplied: a shift or a mask turns each half back into a float32. That is
# slower than float32 throughout, so the model does not use it unless
# `LLMNB_BF16=emulate` asks for it; the tests do, and check all of this on any
# machine. Two differences are left. `vdpbf16ps` adds the product of the upper
# halves first, the emulation that of the lower ones: the last bit of a sum may
# differ. And it takes *subnormal* numbers, those smaller than
# $2^{-126} \approx 10^{-38}$, for zero, among its factors and its sums. The
# emulation keeps them, as float32 does.


# %% multiply and add pairs tags=["exporti"] module="cpu.bfloat16"
def multiply_add_pairs(builder, a, b, c):
    """c plus the products of both halves of two vectors of pairs."""
    if HALVES:
        llvm.initialize_native_asmparser()  # reads the instruction's name
        kind = ir.FunctionType(c.type, [a.type, b.type, c.type])
        text, where = "vdpbf16ps $2, $1, $0", "=v,v,v,0"
        return builder.call(ir.InlineAsm(kind, text, where), [b, a, c])
    a, b = (_split(builder, x, c.type) for x in (a, b))
    for x, y in zip(a, b, strict=True):
        c = multiply_add(builder, x, y, c)
    return c


def _split(builder, pairs, kind):
    """The two halves of a vector of pairs, as float32."""
    shift = ir.Constant(pairs.type, [16] * LANES)
    mask = ir.Constant(pairs.type, [0xFFFF0000] * LANES)
    halves = builder.shl(pairs, shift), builder.and_(pairs, mask)
    return [builder.bitcast(x, kind) for x in halves]


# %% is it worth it here tags=["export"] module="cpu.bfloat16"
def has_bf16():
    """Whether this processor has an instruction for products of bfloat16.

    LLMNB_BF16=emulate says yes anyway, for tests on other processors.
    """
    return HALVES or os.environ.get("LLMNB_BF16") == "emulate"


# %% [markdown]
# The verdict. A product with the identity gives back its other factor, rounded:
# every number must be the one that (2.6.1) gives. Then a product of any size
# against NumPy's product of the rounded factors, in float64; and for the
# difference that it makes, against the factors as they were.

# %% a product that only rounds
from llmnb.cpu.matmul import matmul_forward

x = rng.normal(size=(1, 50, 37)).astype(np.float32)
out = np.empty_like(x)
identity = np.eye(37, dtype=np.float32)
matmul_forward(out, x, identity, None, bf16=True)
same = np.array_equal(out, from_bfloat16(to_bfloat16(x)))
verdict("the identity", same, "rounds as (2.6.1) says")

# %% a product of rounded factors
B, T, C, OC = 2, 37, 51, 97
x = rng.normal(size=(B, T, C)).astype(np.float32)
weight = rng.normal(size=(OC, C)).astype(np.float32)
out = np.empty((B, T, OC), np.float32)
matmul_forward(out, x, weight, None, bf16=True)
near, close = (from_bfloat16(to_bfloat16(a)) for a in (x, weight))
compare("rounded factors", out, near.astype(np.float64) @ close.T, tol=1e-5)
error = np.abs(out - x.astype(np.float64) @ weight.T).max()
size = np.abs(out).max()
verdict("the factors", 1e-4 < error / size < 1e-2, "were rounded")

# %% [markdown]
# ## What it buys
#
# Twice the multiplications in an instruction, and panels of half the length.
# That is twice the speed only if a processor starts as many `vdpbf16ps` in a
# cycle as it starts FMAs. Where it has two units for FMAs and only one of them
# knows the instruction, the two are even, and rounding comes on top. The
# emulation does two FMAs for every two steps, as float32 does, and takes the
# numbers apart first: it must be slower. So we predict a ratio between one half
# and two, and only a clock can say which. A ratio less than 1 in the next
# cell's output says that the machine behind it is better off with float32.

# %% float32 and bfloat16, timed tags=["nbval-ignore-output"]
N, C, OC = 1024, 768, 3072
a = rng.normal(size=(1, N, C)).astype(np.float32)
w = rng.normal(size=(OC, C)).astype(np.float32)
out = np.empty((1, N, OC), np.float32)
speeds = {}
for bf16 in (False, True):
    seconds = fastest(
        lambda bf16=bf16: matmul_forward(out, a, w, None, bf16=bf16), runs=10
    )
    speeds[bf16] = 2 * N * C * OC / seconds / 1e9
print(f"{machine()}, vdpbf16ps: {'yes' if HALVES else 'no'}")
print(
    f"float32 {speeds[False]:.0f} GFLOP/s, bfloat16 {speeds[True]:.0f}: ",
    end="",
)
print(f"{speeds[True] / speeds[False]:.2f} times as fast")

# %% [markdown]
# A model asks for it with `precision="bf16"`, in which every product of the
# linear layers and of attention rounds its factors;
# [chapter 2.7](07_step.ipynb) shows that its loss stays
# beside float32's.

# %% [markdown]
# ## Take away
#
# - bfloat16 is the upper half of a float32: its range, and 8 bits of it.
# - A tie goes to the even neighbour, and one integer addition does it.
# - Five floats for each upper half prove a rounding for all.
# - Factors may be rounded, since their errors cancel; what adds up small steps,
#   weights, moments and sums, may not.
# - The rounding is part of packing, so it costs no pass over memory. Whether it
#   pays depends on the processor: measure.

# %% [markdown]
# ## Design note
#
# One could keep a second copy of the weights in bfloat16, as many trainers do,
# and round activations where they are written. That halves the memory they
# take and what moves. llmnb keeps all arrays in float32 and rounds in the
# product: one layout, one set of kernels for everything that is not a product,
# and nothing to keep in step.

# %% [markdown]
# ## Exercises
#
# **1** (★). How many float32 numbers round to the bfloat16 number 1.0, and
# how many to its upper neighbour? Count first, then let the machine count.
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# The neighbours of 1.0 are $1 + 2^{-7}$ and $1 - 2^{-8}$, each $2^{16}$ bit
# patterns away. Half of each way belongs to 1.0, and both midpoints too, since
# 1.0 is even: $2^{15} + 2^{15} + 1 = 65{,}537$. The neighbour is odd and loses
# both ties: 65,535.
# :::

# %% exercise 1 tags=["hide-cell"]
answers = 65537, 65535


# %% exercise 1, checked
near = np.arange(0x3F7E0000, 0x3F840000, dtype=np.uint32)
rounded = to_bfloat16(near.view(np.float32))
counted = tuple(int((rounded == u).sum()) for u in (0x3F80, 0x3F81))
verdict("counts", answers == counted, f"are {counted}")

# %% [markdown]
# ## Further reading
#
# - Kalamkar et al. (2019),
#   [A Study of BFLOAT16 for Deep Learning Training](https://arxiv.org/abs/1905.12322):
#   sections 2 and 3, which arrays were rounded, and what it did to the loss.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("2.6")
