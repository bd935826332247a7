# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       reference.gated: "Gated feed-forward layers in NumPy: SwiGLU and GeGLU."
#       cpu.gated: "SwiGLU and GeGLU, compiled for the processor's cores."
#       cuda.gated: "Gated feed-forward layers on a GPU."
# ---

# %% [markdown]
# # Gated feed-forward: one half opens the other
#
# > Two sums in place of one: the first is bent and multiplies the second. A
# > product of two sums is what no row of bends can follow; SwiGLU and GeGLU, and
# > what the third matrix costs.
#
# *Reading time: 30 minutes. You need: GELU
# ([chapter 1.9](../1_by_hand/09_gelu.ipynb)); for the last two sections chapters
# [2.2](../2_cpu/02_rows.ipynb) and [3.5](../3_gpu/05_elementwise.ipynb).*
#
# ## Where we are
#
# In the second half of a block GPT-2 widens a token's vector to $4C$ hidden numbers,
# bends each of them by GELU, and narrows them to $C$ again. Llama, Mistral, Gemma and
# Qwen have three matrices there in place of two. This chapter builds what stands
# between them. At its end you can
#
# - say what a gate can compute that no layer of bends can, and what it is worse
#   at;
# - give the hidden width that makes three matrices as large as two;
# - derive the gradient of a gate and of the value that it lets through;
# - say what must be kept for the backward pass, and what is computed anew.
#
# ## Setup

# %% setup
import math
from functools import partial

import matplotlib.pyplot as plt

from llmnb.book.diagram import PALETTE
from llmnb.book.verify import compare, numerical_gradient, verdict

# %% imports of the layer tags=["export"] module="reference.gated"
import numpy as np

from llmnb.reference.gelu import gelu_backward, gelu_forward
from llmnb.shapes import shapes


# %% [markdown]
# ## Why it is there
#
# Ask a feed-forward layer for the product of two of its inputs, $x_0 x_1$. It is a
# thing one may well want: one channel says *how much*, another says *of what*. A layer
# of bends computes each hidden number from one sum. For a large sum GELU is as good as
# $\max(x, 0)$, and twice the sum gives twice the result. So far out, where all sums are
# large, twice the input gives twice the output. The product gives four times. No
# weights and no width can follow it there.
#
# Now let one sum multiply another. *SiLU*, the sigmoid linear unit, also called Swish,
# is the bend that such layers use most. It is a number times its own *sigmoid*, a
# cousin of GELU with a simpler curve in the place of $\Phi$:
#
# $$ \operatorname{sig}(x) = \frac{1}{1 + e^{-x}} , \qquad
#    \operatorname{silu}(x) = x \operatorname{sig}(x) . \tag{5.3.1} $$
#
# Multiply top and bottom of $\operatorname{sig}(-x)$ by $e^{-x}$, and it is
# $1 - \operatorname{sig}(x)$. So the two bends of $x$ and of $-x$ make $x$ whole:
#
# $$ \operatorname{silu}(x) - \operatorname{silu}(-x)
#    = x \operatorname{sig}(x) + x \operatorname{sig}(-x) = x . \tag{5.3.2} $$
#
# Take a hidden number $\operatorname{silu}(x_0)\, x_1$ and another one
# $\operatorname{silu}(-x_0)\, x_1$. Their difference is $x_0 x_1$, near and far,
# without an error:


# %% a product from two gates, and from a layer of bends
def silu(x):
    return x / (1 + np.exp(-x))


def bends(x, first, second):
    sums = x @ first.T
    tanh = np.tanh(math.sqrt(2 / math.pi) * (sums + 0.044715 * sums**3))
    return 0.5 * sums * (1 + tanh) @ second.T


rng = np.random.default_rng(9)
pairs = rng.normal(size=(100, 2))
x0, x1 = pairs.T
compare("two gates", silu(x0) * x1 - silu(-x0) * x1, x0 * x1, tol=1e-12)
matrices = rng.normal(size=(500, 2)), rng.normal(size=(1, 500))
far, twice = (bends(k * pairs, *matrices) for k in (1e6, 2e6))
verdict(
    "500 bends", np.allclose(twice, 2 * far), "twice as far, twice as much"
)

# %% [markdown]
# The first of two numbers is the *gate*: bent, it opens or shuts. The second is
# the *value* that passes, or does not. The two are a *gated linear unit*.
#
# ## By hand
#
# A token has two gates, 1 and $-2$, and two values, 3 and 5. From a table of
# SiLU (the products from more digits than are shown):
#
# | *x* | −2 | −1 | 0 | 1 | 2 |
# |---|---|---|---|---|---|
# | $\operatorname{sig}(x)$ | 0.1192 | 0.2689 | 0.5 | 0.7311 | 0.8808 |
# | $\operatorname{silu}(x)$ | −0.2384 | −0.2689 | 0 | 0.7311 | 1.7616 |
#
# The first gate lets $0.7311 \cdot 3 = 2.1932$ through. The second is almost shut, and
# turns the sign: $-0.2384 \cdot 5 = -1.1920$.

# %% two gates by hand
gates, values = np.array([1.0, -2.0]), np.array([3.0, 5.0])
by_hand = silu(gates) * values
print(np.round(by_hand, 4))

# %% [markdown]
# | tensor | shape | what it holds |
# |---|---|---|
# | `inp` | (B, T, 2H) | of each token H gates, and then H values |
# | `out` | (B, T, H) | each value times its bent gate |
# | `dout`, `dinp` | as `out`, `inp` | the gradients of both |
#
# Gates and values come from one product with a matrix of $2H$ rows, the two
# matrices one upon the other. One large product is faster than two small ones.
#
# ## Forward
#
# Call a gate $a$ and its value $u$. SwiGLU puts out
#
# $$ y = \operatorname{silu}(a)\, u . \tag{5.3.3} $$
#
# GeGLU, which Gemma has, takes GELU for the bend, in the tanh form of (1.9.2):
#
# $$ y = \operatorname{gelu}(a)\, u . \tag{5.3.4} $$
#
# The whole half block, with a matrix for the gates, one for the values (often
# called *up*) and one back to the stream (*down*), is
# $W_d\, (\operatorname{silu}(W_g\, x)\, W_u\, x)$, and has no biases.
#
# **How wide?** Two matrices between $C$ and $4C$ channels have $8 C^2$ weights.
# Three between $C$ and $H$ have $3 C H$, and that is as many if
#
# $$ H = \frac{8 C^2}{3 C} = \frac83\, C . \tag{5.3.5} $$
#
# It is rounded up to a number that suits the kernels: for $C = 768$ it is 2,048 as it
# stands; Llama 2 of 7 billion has $C = 4096$, $\frac83 C = 10{,}922.7$, and takes
# 11,008, the next multiple of 256. Other models choose freely: Gemma 1 of 2 billion is
# eight times as wide as its stream.
#
# The sigmoid is written with $e^{-|x|}$, which is never above 1. For $x > 0$
# it is (5.3.1); for the others top and bottom were multiplied by $e^x$.


# %% the sigmoid tags=["exporti"] module="reference.gated"
def _sigmoid(x):
    q = np.exp(-np.abs(x))  # of no positive number: nothing overflows
    return np.where(x > 0, 1, q) / (1 + q)


# %% gates, forward tags=["export"] module="reference.gated"
@shapes("B T H!, B T 2H")
def swiglu_forward(out, inp):
    """Multiply SiLU of the first half of each row by the second half.

    inp: (B, T, 2 H), gates and then values. out: (B, T, H), overwritten.
    Both of one float dtype.
    """
    gate, up = np.split(inp, 2, axis=-1)
    out[...] = gate * _sigmoid(gate) * up


@shapes("B T H!, B T 2H")
def geglu_forward(out, inp):
    """Multiply GELU of the first half of each row by the second half.

    inp: (B, T, 2 H), gates and then values. out: (B, T, H), overwritten.
    Both of one float dtype; GELU in the tanh form.
    """
    gate, up = (x.copy() for x in np.split(inp, 2, axis=-1))
    gelu_forward(out, gate)
    out *= up


# %% the two gates through the function
y = np.zeros((1, 1, 2))
swiglu_forward(y, np.concatenate([gates, values])[None, None])
compare("by hand", y[0, 0], by_hand, tol=1e-12)
with np.errstate(over="raise"):
    swiglu_forward(y, np.array([[[-1000.0, 1000.0, 3.0, 5.0]]]))
compare("far out", y[0, 0], [0, 5000], tol=1e-12)

# %% [markdown]
# ## Backward, derived
#
# By (5.3.3) $y$ is a product, and each factor's derivative is the other one:
#
# $$ du = dy\, \operatorname{silu}(a) , \qquad
#    da = dy\, u\, \frac{d \operatorname{silu}(a)}{d a} . \tag{5.3.6} $$
#
# The derivative of the sigmoid is that of $(1 + e^{-a})^{-1}$, and as earlier
# $e^{-a} / (1 + e^{-a})$ is $1 - \operatorname{sig}(a)$:
#
# $$ \frac{d \operatorname{sig}(a)}{d a} = \frac{e^{-a}}{(1 + e^{-a})^2}
#    = \operatorname{sig}(a)\, \bigl(1 - \operatorname{sig}(a)\bigr) .
#    \tag{5.3.7} $$
#
# SiLU is $a \operatorname{sig}(a)$, a product again, so by (5.3.7)
#
# $$ \begin{aligned}
#    \frac{d \operatorname{silu}(a)}{d a} &= \operatorname{sig}(a)
#    + a \operatorname{sig}(a)\, \bigl(1 - \operatorname{sig}(a)\bigr) \\
#    &= \operatorname{sig}(a)\, \Bigl(1 + a\, \bigl(1 - \operatorname{sig}(a)
#    \bigr)\Bigr) . \end{aligned} \tag{5.3.8} $$
#
# With (5.3.8) in (5.3.6) both gradients stand there. For GeGLU the slope is
# that of GELU, (1.9.7), and the code asks `gelu_backward` for it, with
# $dy\, u$ for the gradient of the bend's result.
#
# A shut gate sends almost nothing back to its value, but hears itself whether it should
# have been open, the louder the larger the value is.
#
# **What to save.** Both gradients are functions of $a$ and $u$, that is of `inp`:
# $2H = \frac{16}3 C$ numbers a token, where GPT-2 keeps $4C$. The result $y$ is
# computed anew when backward needs it.


# %% gates, backward tags=["export"] module="reference.gated"
@shapes("B T 2H!, B T H, B T 2H")
def swiglu_backward(dinp, dout, inp):
    """Write the gradient of SwiGLU by gates and values.

    dinp, inp: (B, T, 2 H). dout: (B, T, H). All of one float dtype; dinp is
    overwritten.
    """
    gate, up = np.split(inp, 2, axis=-1)
    H, sigma = gate.shape[-1], _sigmoid(gate)
    dinp[..., :H] = dout * up * sigma * (1 + gate * (1 - sigma))
    dinp[..., H:] = dout * gate * sigma


@shapes("B T 2H!, B T H, B T 2H")
def geglu_backward(dinp, dout, inp):
    """Write the gradient of GeGLU by gates and values.

    dinp, inp: (B, T, 2 H). dout: (B, T, H). All of one float dtype; dinp is
    overwritten.
    """
    gate, up = (x.copy() for x in np.split(inp, 2, axis=-1))
    H, grad = gate.shape[-1], np.empty_like(gate)
    gelu_backward(grad, dout * up, gate, add=False)
    dinp[..., :H] = grad
    gelu_forward(grad, gate)
    dinp[..., H:] = dout * grad


# %% [markdown]
# ## Proof
#
# As in Part 1: $\mathcal L = \sum g \cdot y$, float64, step $h = 10^{-5}$,
# tolerance $10^{-8}$.

# %% a problem to differentiate
inp, g = rng.normal(scale=2, size=(2, 3, 8)), rng.normal(size=(2, 3, 4))
out = np.empty_like(g)


def gradient(forward, backward):
    """What backward writes, and what central differences say."""
    dinp = np.full_like(inp, np.nan)
    backward(dinp, g, inp)

    def loss():
        forward(out, inp)
        return (g * out).sum()

    return dinp, numerical_gradient(loss, inp)


compare("SwiGLU", *gradient(swiglu_forward, swiglu_backward), tol=1e-8)
compare("GeGLU", *gradient(geglu_forward, geglu_backward), tol=1e-8)

# %% [markdown]
# A gate is there twice, as the factor $a$ and inside the sigmoid. Whoever takes the
# sigmoid for a fixed weight forgets the second term of (5.3.8), and is right wherever a
# gate is wide open or shut:


# %% a gradient made wrong on purpose
def half_of_it(dinp, dout, inp):
    gate, up = np.split(inp, 2, axis=-1)
    swiglu_backward(dinp, dout, inp)
    dinp[..., :4] = dout * up / (1 + np.exp(-gate))


try:
    compare("half of it", *gradient(swiglu_forward, half_of_it), tol=1e-8)
    caught = False
except AssertionError:
    caught = True
verdict("the mistake", caught, "is caught")

# %% [markdown]
# ## A gate against a bend, at equal parameters
#
# That two gates can make a product is one thing; whether training finds it is another,
# and so is what the gates cost. Let both layers learn. Each has 8 inputs, 8 outputs and
# no biases: GELU 32 hidden numbers, $4C$, in 512 weights; SwiGLU 21, $\frac83 C$ rounded
# down, in 504. There are two things to learn, from random inputs: the product of each
# channel and the one before, $x_i x_{i-1}$, and the distance between them, $|x_i -
# x_{i-1}|$, which has a corner. AdamW takes 1,500 steps with 64 new inputs each. Then
# the layer is asked for inputs from half to four times the size of those that it
# learned from. Its error is the root mean square of what it is off by, as a share of
# that of the target: 1 is as bad as to answer 0 always.

# %% a layer of 8 channels, trained
from llmnb.reference.adamw import AdamW, adamw_update
from llmnb.reference.gelu import gelu_backward, gelu_forward

STEPS, ROWS = 1500, 64


def trained(forward, backward, H, wide, target):
    draw = np.random.default_rng(3)
    first, second = draw.normal(size=(wide, 8)), draw.normal(size=(8, H))
    weights = [first / np.sqrt(8), second / np.sqrt(H)]
    averages = [np.zeros((2, w.size)) for w in weights]
    hidden, dsums = np.empty((1, ROWS, H)), np.empty((1, ROWS, wide))
    for step in range(1, STEPS + 1):
        x = draw.normal(size=(ROWS, 8))
        sums = (x @ weights[0].T)[None]
        forward(hidden, sums)
        dout = 2 * (hidden[0] @ weights[1].T - target(x)) / x.size
        backward(dsums, (dout @ weights[1])[None], sums)
        grads = dsums[0].T @ x, dout.T @ hidden[0]
        rate = 0.01 * (1 - (step - 1) / STEPS)
        how = AdamW(rate, beta2=0.99, weight_decay=0.0, step=step)
        for w, dw, (m, v) in zip(weights, grads, averages, strict=True):
            adamw_update(w.reshape(-1), dw.reshape(-1), m, v, how)
    return weights


# %% its error, as a share of what there is to say
def error(forward, H, weights, target, scale):
    x = scale * np.random.default_rng(4).normal(size=(1000, 8))
    sums, want = (x @ weights[0].T)[None], target(x)
    hidden = np.empty((1, 1000, H))
    forward(hidden, sums)
    off = hidden[0] @ weights[1].T - want
    return np.sqrt((off**2).mean() / (want**2).mean())


# %% both layers, both targets
layers = {
    "GELU": (gelu_forward, partial(gelu_backward, add=False), 32, 32),
    "SwiGLU": (swiglu_forward, swiglu_backward, 21, 42),
}
targets = {
    "product": lambda x: x * np.roll(x, 1, axis=-1),
    "distance": lambda x: np.abs(x - np.roll(x, 1, axis=-1)),
}
scales, errors = np.array([0.5, 1, 2, 3, 4]), {}
for goal, target in targets.items():
    for name, (forward, backward, H, wide) in layers.items():
        weights = trained(forward, backward, H, wide, target)
        given = forward, H, weights, target
        errors[goal, name] = [error(*given, scale) for scale in scales]

# %% who learns what
at, far = 1, 2  # in the list of scales: as in training, and twice as far
bent, gated = errors["product", "GELU"], errors["product", "SwiGLU"]
verdict("products", bent[at] > 3 * gated[at], "GELU errs > 3 times as much")
verdict("twice as far", gated[far] < 0.2, "SwiGLU still follows")
verdict("twice as far", bent[far] > 0.4, "GELU does not")
bent, gated = errors["distance", "GELU"], errors["distance", "SwiGLU"]
verdict("distances", gated[at] > 3 * bent[at], "SwiGLU errs > 3 times as much")

# %% draw it tags=["hide-input"]
fig, axes = plt.subplots(1, 2, figsize=(8, 3.2), dpi=100, sharey=True)
for ax, goal in zip(axes, targets, strict=True):
    for name, colour in (("GELU", "orange"), ("SwiGLU", "blue")):
        look = {"color": PALETTE[colour], "lw": 2, "label": name}
        ax.semilogy(scales, errors[goal, name], "o-", **look)
    ax.axvline(1, color=PALETTE["grey"], lw=0.8, ls=":")
    ax.set(title=f"the {goal} of two channels", xlabel="size of the inputs")
    ax.spines[["top", "right"]].set_visible(False)
axes[0].set(ylabel="error, as a share of the target")
axes[0].legend(frameon=False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 5.3.1. Two layers of as many weights, trained on inputs of size 1 (dotted).
# Products: the gates err a fraction of what the bends do, and follow further out than
# they were trained. Corners: the other way round, the gates grow with the square of the
# input where the truth grows with the input.*
#
# So a gate is not a better bend. It is another kind of function, of second degree,
# where a bend is of first. Which of them a text needs more often, no toy can tell; the
# paper that compared them on text credits the gates' success to "divine benevolence".
# What they buy in Part 1's model, on the same text and with about as many weights, [chapter
# 5.5](05_architectures.ipynb) measures.
#
# ## See it
#
# Left, the two bends and their slopes, from the functions as they are: a value of 1
# lets the bent gate through, and the gradient of the gate is then the slope. Right, the
# output of one unit of SwiGLU for any gate and any value, as a map: along a line it is
# the same, blue where positive, orange where negative.

# %% bends, slopes, and a gated unit tags=["hide-input"]
x = np.linspace(-5, 5, 401)
line = np.concatenate([x, np.ones_like(x)])[None, None]
slopes = {}
for name, forward, backward in (
    ("SiLU", swiglu_forward, swiglu_backward),
    ("GELU", geglu_forward, geglu_backward),
):
    bent, back = np.empty((1, 1, 401)), np.empty((1, 1, 802))
    forward(bent, line)
    backward(back, np.ones_like(bent), line)
    slopes[name] = bent[0, 0], back[0, 0, :401]
fig, axes = plt.subplots(1, 2, figsize=(8.4, 3.6), dpi=100)
ax = axes[0]
for (name, (bent, slope)), colour in zip(
    slopes.items(), ("blue", "orange"), strict=True
):
    ax.plot(x, bent, color=PALETTE[colour], label=name)
    ax.plot(x, slope, "--", color=PALETTE[colour], label="its slope")
ax.set(xlabel="gate", ylabel="bent gate, and slope", ylim=(-0.5, 3))
ax.legend(frameon=False, loc="upper left")
ax.spines[["top", "right"]].set_visible(False)
ax, (a, u) = axes[1], np.meshgrid(x, x)
signs = [PALETTE["orange"]] * 3 + [PALETTE["blue"]] * 3
lines = ax.contour(a, u, silu(a) * u, [-8, -4, -1, 1, 4, 8], colors=signs)
places = [(1.2, 1.1), (2.2, 2.1), (3, 2.8), (-1.3, 3.6)]
places += [(gate, -value) for gate, value in places]
ax.clabel(lines, fmt="%d", manual=places)
ax.set(xlabel="gate", ylabel="value", title="what SwiGLU lets through")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 5.3.2. Left: SiLU is a GELU that takes longer to shut, and its slope
# overshoots 1 as well. Right: with an open gate a unit is a product, and its
# lines of equal output are hyperbolas; with a shut gate it is near nothing.*
#
# ## Count it
#
# No parameters of its own. A number of `out` takes about 20 operations forward, most in
# the exponential, and 30 backward, as against $3 \cdot 2 C$ in the three products that
# it takes part in. There are $\frac83 C$ of them a token and not $4C$, so there are
# fewer exponentials than in GPT-2, while $\frac{16}3 C$ numbers a token are kept in
# place of $4C$.
#
# ## On a CPU
#
# The kernels take the sigmoid's form from [chapter 2.2](../2_cpu/02_rows.ipynb): with
# $e^{-|x|}$ from `fast_exp`, which vectorises. Both bends give their value and their
# slope together, since the two share the exponential; where a kernel does not use the
# slope, the compiler drops it. The kernels are made around a bend, so that each loop is
# written once.

# %% imports of the CPU module tags=["export"] module="cpu.gated"
from llmnb.cpu.gelu import CUBIC, SLOPE
from llmnb.cpu.jit import arguments, inlined, share, team
from llmnb.cpu.math import fast_exp
from llmnb.shapes import shapes


# %% two bends and their slopes tags=["exporti"] module="cpu.gated"
@inlined
def _silu(x, number):
    """SiLU of x, and its slope there."""
    q, one = fast_exp(-abs(x)), number(1)
    r = one / (one + q)
    sigma = (one if x > 0 else q) * r
    return x * sigma, sigma + x * q * r * r


@inlined
def _gelu(x, number):
    """GELU of x, in the tanh form, and its slope there."""
    slope, cubic, one = number(SLOPE), number(CUBIC), number(1)
    q = fast_exp(-abs(slope * x * (one + cubic * x * x)))
    r = one / (one + q)
    sigma = (one if x > 0 else q) * r
    dv = slope * (one + (cubic + cubic + cubic) * x * x)
    return x * sigma, sigma + x * dv * q * r * r


# %% kernels around a bend tags=["exporti"] module="cpu.gated"
def _kernels(bend):
    @team
    def forward(part, parts, address):
        out, inp = arguments(address)
        (rows, H), number = out.shape, inp.dtype.type
        mine = share(rows, part, parts)
        for n in range(mine.start, mine.stop):
            for i in range(H):
                bent, _ = bend(inp[n, 0, i], number)
                out[n, i] = bent * inp[n, 1, i]

    @team
    def backward(part, parts, address):
        dinp, dout, inp = arguments(address)
        (rows, H), number = dout.shape, inp.dtype.type
        mine = share(rows, part, parts)
        for n in range(mine.start, mine.stop):
            for i in range(H):
                bent, slope = bend(inp[n, 0, i], number)
                dinp[n, 0, i] = dout[n, i] * inp[n, 1, i] * slope
                dinp[n, 1, i] = dout[n, i] * bent

    return forward, backward


_swiglu, _swiglu_back = _kernels(_silu)
_geglu, _geglu_back = _kernels(_gelu)


# %% [markdown]
# The halves of a row are an axis of their own in the kernels: `inp[n, 0, i]` is
# a gate and `inp[n, 1, i]` its value. Threads share out the rows. What users call has
# the arguments of the functions in NumPy, here and on a GPU.


# %% SwiGLU, compiled tags=["export", "fold-input"] module="cpu.gated"
@shapes("B T H!, B T 2H")
def swiglu_forward(out, inp):
    """Multiply SiLU of the first half of each row by the second half.

    inp: (B, T, 2 H), gates and then values. out: (B, T, H), overwritten.
    Both float32 or both float64 and C-contiguous. Raises TypeError or
    ValueError before it computes anything.
    """
    H = out.shape[-1]
    _swiglu(out.reshape(-1, H), inp.reshape(-1, 2, H))


@shapes("B T 2H!, B T H, B T 2H")
def swiglu_backward(dinp, dout, inp):
    """Write the gradient of SwiGLU by gates and values.

    dinp, inp: (B, T, 2 H). dout: (B, T, H). All float32 or all float64 and
    C-contiguous; dinp is overwritten. Raises TypeError or ValueError before
    it computes anything.
    """
    H = dout.shape[-1]
    dx, x = dinp.reshape(-1, 2, H), inp.reshape(-1, 2, H)
    _swiglu_back(dx, dout.reshape(-1, H), x)


# %% GeGLU, compiled tags=["export", "fold-input"] module="cpu.gated"
@shapes("B T H!, B T 2H")
def geglu_forward(out, inp):
    """Multiply GELU of the first half of each row by the second half.

    inp: (B, T, 2 H), gates and then values. out: (B, T, H), overwritten.
    Both float32 or both float64 and C-contiguous; GELU in the tanh form.
    Raises TypeError or ValueError before it computes anything.
    """
    H = out.shape[-1]
    _geglu(out.reshape(-1, H), inp.reshape(-1, 2, H))


@shapes("B T 2H!, B T H, B T 2H")
def geglu_backward(dinp, dout, inp):
    """Write the gradient of GeGLU by gates and values.

    dinp, inp: (B, T, 2 H). dout: (B, T, H). All float32 or all float64 and
    C-contiguous; dinp is overwritten. Raises TypeError or ValueError before
    it computes anything.
    """
    H = dout.shape[-1]
    dx, x = dinp.reshape(-1, 2, H), inp.reshape(-1, 2, H)
    _geglu_back(dx, dout.reshape(-1, H), x)


# %% the same results from the kernels
import numba

from llmnb import cpu, reference

KINDS = "swiglu", "geglu"


def both_ways(layer, kind, inp, dout):
    out, dinp = np.empty_like(dout), np.empty_like(inp)
    getattr(layer, f"{kind}_forward")(out, inp)
    getattr(layer, f"{kind}_backward")(dinp, dout, inp)
    return out, dinp


wide = rng.normal(scale=3, size=(3, 37, 2 * 331)).astype(np.float32)
dout = rng.normal(size=(3, 37, 331)).astype(np.float32)
threads = numba.get_num_threads()
for kind in KINDS:
    got = both_ways(cpu, kind, wide, dout)
    exact = both_ways(reference, kind, wide.astype("f8"), dout.astype("f8"))
    for name, x, y in zip(("out", "dinp"), got, exact, strict=True):
        compare(f"{kind}, {name}", x, y, tol=2e-5)
    numba.set_num_threads(1)
    alone = both_ways(cpu, kind, wide, dout)
    numba.set_num_threads(threads)
    same = all(np.array_equal(x, y) for x, y in zip(got, alone, strict=True))
    verdict("threads", same, "change no bit")

# %% its time tags=["nbval-ignore-output"]
from llmnb.timing import fastest, machine

wide = rng.normal(size=(4, 128, 2 * 2048)).astype(np.float32)
dout = rng.normal(size=(4, 128, 2048)).astype(np.float32)
slow = fastest(both_ways, reference, "swiglu", wide, dout, runs=5)
fast = fastest(both_ways, cpu, "swiglu", wide, dout)
print(f"{machine()}, {threads} threads")
print(f"SwiGLU: {slow / fast:.1f} times as fast as NumPy")

# %% [markdown]
# ## On a GPU
#
# As in [chapter 3.5](../3_gpu/05_elementwise.ipynb): a thread owns one number of `out`,
# or four neighbours where the arrays begin at multiples of 16 bytes and 4 divides $H$.
# It reads their gates, and $H$ numbers later their values; backward it writes both
# gradients. No thread needs another.

# %% imports of the GPU module tags=["export"] module="cuda.gated"
import math

from llmnb.cuda.gelu import CUBIC32, ONE, SLOPE32, THREE, ZERO
from llmnb.cuda.matmul import as_rows
from llmnb.gpu.launch import DEVICE, aligned, device, kernel
from llmnb.gpu.simulator import cuda, load4, store4
from llmnb.shapes import shapes


# %% bends of one number, and their slopes tags=["exporti"] module="cuda.gated"
@device
def _silu(x):
    q = math.exp(-abs(x))
    r = ONE / (ONE + q)
    sigma = (ONE if x > ZERO else q) * r
    return x * sigma, sigma + x * q * r * r


@device
def _gelu(x):
    q = math.exp(-abs(SLOPE32 * x * (ONE + CUBIC32 * x * x)))
    r = ONE / (ONE + q)
    sigma = (ONE if x > ZERO else q) * r
    dv = SLOPE32 * (ONE + THREE * CUBIC32 * x * x)
    return x * sigma, sigma + x * dv * q * r * r


# %% kernels around a bend, forward tags=["exporti"] module="cuda.gated"
def _forward_kernels(bend):
    @kernel
    def by_one(out, inp):
        i = cuda.grid(1)
        rows, H = out.shape
        if i < rows * H:
            n, c = i // H, i % H
            bent, _ = bend(inp[n, c])
            out[n, c] = bent * inp[n, H + c]

    @kernel
    def by_four(out, inp):
        i = 4 * cuda.grid(1)
        rows, H = out.shape
        if i < rows * H:
            at = i // H * 2 * H + i % H  # the gates; the values are H later
            a, b, c, d = load4(inp, at)
            e, f, g, h = load4(inp, at + H)
            (a, _), (b, _), (c, _), (d, _) = bend(a), bend(b), bend(c), bend(d)
            store4(out, i, a * e, b * f, c * g, d * h)

    return by_one, by_four


# %% kernels around a bend, backward tags=["exporti"] module="cuda.gated"
def _backward_kernels(bend):
    @device
    def back(dy, gate, up):
        bent, slope = bend(gate)
        return dy * up * slope, dy * bent

    @kernel
    def by_one(dinp, dout, inp):
        i = cuda.grid(1)
        rows, H = dout.shape
        if i < rows * H:
            n, c = i // H, i % H
            dgate, dup = back(dout[n, c], inp[n, c], inp[n, H + c])
            dinp[n, c], dinp[n, H + c] = dgate, dup

    @kernel
    def by_four(dinp, dout, inp):
        i = 4 * cuda.grid(1)
        rows, H = dout.shape
        if i < rows * H:
            at = i // H * 2 * H + i % H
            a, b, c, d = load4(dout, i)
            p, q, r, s = load4(inp, at)
            e, f, g, h = load4(inp, at + H)
            (a, e), (b, f) = back(a, p, e), back(b, q, f)
            (c, g), (d, h) = back(c, r, g), back(d, s, h)
            store4(dinp, at, a, b, c, d)
            store4(dinp, at + H, e, f, g, h)

    return by_one, by_four


# %% the launch tags=["exporti"] module="cuda.gated"
BLOCK = 256  # threads of a block
_swiglu, _swiglu_back = _forward_kernels(_silu), _backward_kernels(_silu)
_geglu, _geglu_back = _forward_kernels(_gelu), _backward_kernels(_gelu)


def _launch(kernels, *arrays):
    """Run a kernel on rows; kernels: for one channel a thread, and for four.

    arrays: in their order; the last, inp, has 2 H channels.
    """
    (by_one, by_four), inp = kernels, arrays[-1]
    run, threads = by_one, inp.size // 2
    if inp.shape[-1] % 8 == 0 and aligned(*arrays):
        run, threads = by_four, inp.size // 8
    run[-(-threads // BLOCK), BLOCK](*map(as_rows, arrays))


# %% SwiGLU on a GPU tags=["export", "fold-input"] module="cuda.gated"
@shapes("B T H!, B T 2H", DEVICE)
def swiglu_forward(out, inp):
    """Multiply SiLU of the first half of each row by the second half.

    inp: (B, T, 2 H), gates and then values. out: (B, T, H), overwritten.
    Both float32 on a device and C-contiguous. Raises TypeError or
    ValueError before it launches anything.
    """
    _launch(_swiglu, out, inp)


@shapes("B T 2H!, B T H, B T 2H", DEVICE)
def swiglu_backward(dinp, dout, inp):
    """Write the gradient of SwiGLU by gates and values.

    dinp, inp: (B, T, 2 H). dout: (B, T, H). All float32 on a device and
    C-contiguous; dinp is overwritten. Raises TypeError or ValueError before
    it launches anything.
    """
    _launch(_swiglu_back, dinp, dout, inp)


# %% GeGLU on a GPU tags=["export", "fold-input"] module="cuda.gated"
@shapes("B T H!, B T 2H", DEVICE)
def geglu_forward(out, inp):
    """Multiply GELU of the first half of each row by the second half.

    inp: (B, T, 2 H), gates and then values. out: (B, T, H), overwritten.
    Both float32 on a device and C-contiguous; GELU in the tanh form. Raises
    TypeError or ValueError before it launches anything.
    """
    _launch(_geglu, out, inp)


@shapes("B T 2H!, B T H, B T 2H", DEVICE)
def geglu_backward(dinp, dout, inp):
    """Write the gradient of GeGLU by gates and values.

    dinp, inp: (B, T, 2 H). dout: (B, T, H). All float32 on a device and
    C-contiguous; dinp is overwritten. Raises TypeError or ValueError before
    it launches anything.
    """
    _launch(_geglu_back, dinp, dout, inp)


# %% the same results on the simulator
from llmnb import cuda as on_gpu
from llmnb.gpu.launch import simulated, to_host
from llmnb.gpu.simulator import watch

for H in (8, 9):
    given = wide[:1, :3, : 2 * H].copy(), dout[:1, :3, :H].copy()
    there = [simulated(x) for x in given]
    for kind in KINDS:
        y, back = (simulated(np.empty_like(x)) for x in given[::-1])
        with watch() as seen:
            getattr(on_gpu, f"{kind}_forward")(y, there[0])
            getattr(on_gpu, f"{kind}_backward")(back, there[1], there[0])
        print(kind, H, *[k.__name__ for k, *_ in seen.launches])
        exact = both_ways(reference, kind, *(x.astype("f8") for x in given))
        compare("out", to_host(y), exact[0], tol=2e-6)
        compare("dinp", to_host(back), exact[1], tol=2e-6)

# %% [markdown]
# These kernels have been simulated and compiled, and not run on a GPU.
#
# ## Take away
#
# - A gate multiplies one sum by another. Two gated units make a product without
#   an error; no layer of bends follows a product far out.
# - At corners a bend is better. A gated layer is not a better layer for
#   everything, and at equal parameters it is narrower: $\frac83 C$.
# - Each factor's gradient has the other one in it; both inputs are kept, the
#   result is not.
#
# ## Design note
#
# Gates and values could lie side by side, a gate and then its value, so that a vector
# of four holds two whole units. Published files have two matrices: to stack them is to
# copy each once, to interleave them to copy row by row, and back for whoever saves. And
# two halves are two plain streams of memory, which vectors read as well as one.
#
# ## Exercises
#
# **1** (★). SiLU with a steeper sigmoid, $x \operatorname{sig}(\beta x)$, becomes
# another bend that you know as $\beta$ grows, and a straight line as $\beta$
# goes to 0. Which?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# For large $\beta$ the sigmoid is 1 right of 0 and 0 left of it: ReLU. For
# $\beta = 0$ it is one half everywhere: the line $x / 2$. (Near $\beta = 1.7$ it
# is almost GELU, as exercise 3 of chapter 1.9 found.)
# :::

# %% exercise 1, checked tags=["hide-cell"]
x = np.array([-2.0, -1.0, 0.5, 3.0])
compare("steep", silu(200 * x) / 200, np.maximum(x, 0), tol=1e-6)
compare("flat", silu(1e-9 * x) / 1e-9, x / 2, tol=1e-6)

# %% [markdown]
# **2** (★★). The first gated unit had no bend: it put out
# $\operatorname{sig}(a)\, u$, and is called GLU. Derive its gradient and check it.
# Can such units make a product, too?
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# $du = dy \operatorname{sig}(a)$ and
# $da = dy\, u \operatorname{sig}(a) (1 - \operatorname{sig}(a))$, by (5.3.7). The
# sigmoid lies between 0 and 1, so a unit never puts out more than its value: it
# grows with the input and not with its square, and far out no sum of them is a
# product.
# :::


# %% exercise 2, checked tags=["hide-cell"]
def glu_forward(out, inp):
    gate, up = np.split(inp, 2, axis=-1)
    out[...] = up / (1 + np.exp(-gate))


def glu_backward(dinp, dout, inp):
    gate, up = np.split(inp, 2, axis=-1)
    sig = 1 / (1 + np.exp(-gate))
    dinp[...] = np.concatenate([dout * up * sig * (1 - sig), dout * sig], -1)


compare("GLU", *gradient(glu_forward, glu_backward), tol=1e-8)

# %% [markdown]
# ## Further reading
#
# - Dauphin, Fan, Auli and Grangier (2016),
#   [Language Modeling with Gated Convolutional Networks](https://arxiv.org/abs/1612.08083):
#   section 3 for the gate, and why gradients pass it.
# - Shazeer (2020),
#   [GLU Variants Improve Transformer](https://arxiv.org/abs/2002.05202): four
#   pages, the tables at equal parameters, and the sentence quoted here.
#
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("5.3")
