# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       reference.gelu: "GELU in NumPy, forward and backward."
# ---

# %% [markdown]
# # GELU: bend the line and differentiate the bend
#
# > GELU lets large numbers through and holds small ones back, without a corner;
# > its gradient needs the input and nothing else.
#
# *Reading time: 16 minutes. You need: the linear layer
# ([chapter 1.7](07_matmul.ipynb)). The fast versions: chapters
# [2.2](../2_cpu/02_rows.ipynb) and [3.5](../3_gpu/05_elementwise.ipynb).*

# %% [markdown]
# ## Where we are

# %% where we are
from llmnb.book.diagram import gpt2_diagram

gpt2_diagram(lit="gelu")

# %% [markdown]
# *Figure 1.9.1. GELU stands once in every block, between the linear layer that
# widens a vector to 4C channels and the one that narrows it to C again.*
#
# Two linear layers in a row are worth no more than one, because the product
# of two matrices is a matrix. Something between them has to bend. GELU, the
# Gaussian error linear unit, bends each number by itself. This chapter
# builds `gelu_forward` and `gelu_backward`. At its end you can
#
# - say what GELU computes, and where both constants of its tanh form come
#   from;
# - derive its gradient, and say why the input must be saved and the output
#   would not do;
# - show what a network can do with a bend that it cannot without.

# %% [markdown]
# ## Setup

# %% setup
import math

import matplotlib.pyplot as plt

from llmnb.book.diagram import PALETTE
from llmnb.book.verify import compare, numerical_gradient, verdict

# %% imports tags=["export"]
import numpy as np

from llmnb.shapes import shapes

# %% the seed
rng = np.random.default_rng(7)

# %% [markdown]
# ## By hand
#
# Draw a number from the standard normal distribution, the bell curve of
# mean 0 and deviation 1. It lies below $x$ with a probability called
# $\Phi(x)$. GELU multiplies $x$ by it: the larger a number is against the
# usual ones, the more of it passes. From a table of $\Phi$:
#
# | $x$ | $-2$ | $-1$ | $0$ | $1$ | $2$ |
# |---|---|---|---|---|---|
# | $\Phi(x)$ | 0.0228 | 0.1587 | 0.5 | 0.8413 | 0.9772 |
# | $x\,\Phi(x)$ | −0.0455 | −0.1587 | 0 | 0.8413 | 1.9545 |
#
# The number 2 passes almost whole, 1 is held back a little, and of the
# negative numbers a small remainder is left. The probability comes from the
# error function, erf, which Python has in its library:


# %% GELU from the error function
def exact_gelu(x):
    erf = np.vectorize(math.erf)(x / math.sqrt(2))
    return 0.5 * x * (1 + erf)


five = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
print(np.round(exact_gelu(five), 4) + 0.0)

# %% [markdown]
# | tensor | shape | what it holds |
# |---|---|---|
# | `inp` | any; in GPT-2 (B, T, 4C) | what the first linear layer put out |
# | `out` | as `inp` | each number through GELU |
# | `dout`, `dinp` | as `inp` | the gradients of both |
#
# Every number is treated alike and alone, so the formulas below have no
# index.

# %% [markdown]
# ## Forward
#
# The exact form is what we did by hand,
#
# $$ x\,\Phi(x) = \frac x2 \Bigl(1 + \operatorname{erf}
#    \frac{x}{\sqrt2}\Bigr) . \tag{1.9.1} $$
#
# The error function takes long to compute. The paper that introduced GELU
# gives a cheaper function of the same S shape in its place, the hyperbolic
# tangent of a polynomial:
#
# $$ u = k\,(x + a x^3), \qquad
#    y = \frac x2 \,(1 + \tanh u) , \tag{1.9.2} $$
#
# with $k = \sqrt{2/\pi}$ and $a = 0.044715$. GPT-2's weights were trained
# with (1.9.2), so (1.9.2) is what GPT-2 *is*, and we keep it.
#
# Where do the constants come from? Near 0 both forms should agree. The
# series of the two S curves begin with
#
# $$ \begin{aligned}
#    \operatorname{erf}\frac{x}{\sqrt2}
#    &= \sqrt{\tfrac2\pi}\,\Bigl(x - \frac{x^3}{6} + \dots\Bigr), \\
#    \tanh u &= u - \frac{u^3}{3} + \dots
#    = k x + \Bigl(k a - \frac{k^3}{3}\Bigr) x^3 + \dots
#    \end{aligned} \tag{1.9.3} $$
#
# The terms in $x$ agree if $k = \sqrt{2/\pi}$. The terms in $x^3$ agree if
# $a = k^2/3 - 1/6$.

# %% the cubic coefficient that the series gives
k = math.sqrt(2 / math.pi)
series = k**2 / 3 - 1 / 6
print(f"{series:.6f}")

# %% [markdown]
# The value in use, 0.044715, is 2 % smaller: it gives up a little agreement
# at 0 for a smaller error further out. We can check that it pays:


# %% the largest error over the line
def tanh_gelu(x, a):
    return 0.5 * x * (1 + np.tanh(k * (x + a * x**3)))


x = np.linspace(-8, 8, 16001)
errors = [np.abs(tanh_gelu(x, a) - exact_gelu(x)).max() for a in
          (series, 0.044715)]  # fmt: skip
print("largest error", [f"{e:.5f}" for e in errors])
verdict("0.044715", errors[1] < errors[0], "errs less than the series")

# %% [markdown]
# The function itself is (1.9.2):

# %% the constants tags=["exporti"]
ROOT = np.sqrt(2 / np.pi)
CUBIC = 0.044715


# %% GELU, forward tags=["export"]
@shapes("...!, ...~")
def gelu_forward(out, inp):
    """Write GELU of every element of inp to out, by the tanh form.

    out, inp: arrays of one shape, any, and one float dtype; out is
    overwritten.
    """
    u = ROOT * (inp + CUBIC * inp**3)
    out[...] = 0.5 * inp * (1 + np.tanh(u))


# %% the five numbers through the function
y = np.empty(5)
gelu_forward(y, five)
compare("tanh form", y, exact_gelu(five), tol=1e-3)

# %% [markdown]
# ## Backward, derived
#
# Write $t = \tanh u$. (1.9.2) has $x$ in two places, as a factor and inside
# $u$, so by the product rule
#
# $$ \frac{dy}{dx} = \frac12 (1 + t) + \frac x2\,
#    \frac{dt}{du}\,\frac{du}{dx} . \tag{1.9.4} $$
#
# For $dt/du$ take $\tanh u = \sinh u / \cosh u$. The derivative of sinh is
# cosh and the other way round, so by the quotient rule
#
# $$ \frac{dt}{du} = \frac{\cosh^2 u - \sinh^2 u}{\cosh^2 u}
#    = 1 - t^2 , \qquad
#    \frac{du}{dx} = k\,(1 + 3 a x^2) . \tag{1.9.5} $$
#
# Together, with the gradient $dy$ that the layer above hands us:
#
# $$ dx = dy \cdot \frac12 \Bigl( 1 + t
#    + x\,(1 - t^2)\,k\,(1 + 3 a x^2) \Bigr) . \tag{1.9.6} $$
#
# **What to save.** (1.9.6) is a function of $x$ alone. The input is the
# output of the linear layer below, and it must stay in memory until
# backward comes. That is not free: it is the widest activation inside a
# block. $t$ is computed anew. Could we save $y$ and let go of $x$, since the
# next layer needs $y$ anyway? Exercise 4 shows that $y$ does not
# determine $x$.


# %% GELU, backward tags=["export"]
@shapes("...!, ...~, ...")
def gelu_backward(dinp, dout, inp, add=True):
    """Add GELU's gradient to dinp, or overwrite dinp with it.

    dinp, dout, inp: arrays of one shape, any, and one float dtype; dinp is
    added to in place. With add=False it is overwritten and its old contents
    are not used, so it need not be zeroed.
    """
    t = np.tanh(ROOT * (inp + CUBIC * inp**3))
    du = ROOT * (1 + 3 * CUBIC * inp**2)
    grad = dout * 0.5 * (1 + t + inp * (1 - t**2) * du)
    dinp[...] = dinp + grad if add else grad


# %% [markdown]
# ## Proof
#
# As in the chapters before: $\mathcal L = \sum g \cdot y$, float64, step
# $h = 10^{-5}$, tolerance $10^{-8}$.

# %% a problem to differentiate
inp, g = rng.normal(scale=2, size=(2, 3, 5, 4))
out = np.empty_like(inp)


def loss():
    gelu_forward(out, inp)
    return (g * out).sum()


dinp = np.zeros_like(inp)
gelu_backward(dinp, g, inp)
numerical = numerical_gradient(loss, inp)
compare("dinp", dinp, numerical, tol=1e-8)

# %% [markdown]
# The term that is easily lost is the second one of (1.9.4). Without it the
# gradient is still right for large positive and large negative numbers.
# Between them it is not:

# %% a gradient made wrong on purpose
t = np.tanh(ROOT * (inp + CUBIC * inp**3))
try:
    compare("dinp, half of it", g * 0.5 * (1 + t), numerical, tol=1e-8)
    caught = False
except AssertionError:
    caught = True
verdict("the mistake", caught, "is caught")


# %% both directions at once
def both(x):
    y, dy = np.empty_like(x), np.zeros_like(x)
    gelu_forward(y, x)
    gelu_backward(dy, np.ones_like(x), x)
    return y, dy


# %% [markdown]
# ## Why it is there
#
# Two linear layers in a row are one linear layer: $W_2 (W_1 x)$ is
# $(W_2 W_1) x$, whatever the width between them. With a bend between, they can
# be what no line can. Fit the curve $y = \sin 3x$ with a hidden width of 32, by
# least squares over the second layer alone, the first drawn at random:

# %% with and without the bend
grid = np.linspace(-1, 1, 200)[:, None]
hidden = grid @ rng.normal(size=(1, 32)) * 3 + rng.normal(size=32)
target, missed = np.sin(3 * grid), {}
for name, features in (("a line", hidden), ("a bend", both(hidden)[0])):
    features = np.hstack([features, np.ones((200, 1))])
    fit = features @ np.linalg.lstsq(features, target, rcond=1e-8)[0]
    missed[name] = np.sqrt(((fit - target) ** 2).mean())
verdict("without a bend", missed["a line"] > 0.1, "the curve is missed")
verdict("with a bend", missed["a bend"] < 0.01, "it is met")

# %% [markdown]
# ## See it

# %% GELU, its slope, and the error of the tanh form
x = np.linspace(-4, 4, 801)
y, slope = both(x)
fig, axes = plt.subplots(1, 2, figsize=(8, 3.4), dpi=100)
ax = axes[0]
ax.plot(x, np.maximum(x, 0), "--", color=PALETTE["grey"], label="max(x, 0)")
ax.plot(x, y, color=PALETTE["blue"], label="GELU")
ax.plot(x, slope, color=PALETTE["orange"], label="its derivative")
ax.set(xlabel="x", ylim=(-0.4, 3))
ax.legend(frameon=False, loc="upper left")
ax = axes[1]
ax.axhline(0, color=PALETTE["grey"], lw=0.8)
ax.plot(x, (y - exact_gelu(x)) * 1e3, color=PALETTE["purple"])
ax.set(xlabel="x", title="tanh form minus exact, times 1000")
for ax in axes:
    ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.9.2. Left: GELU follows max(x, 0) at both ends and dips below 0
# between; its derivative overshoots 1 and is negative left of the dip.
# Right: the tanh form stays within half a thousandth of the exact one.*
#
# A unit that max(x, 0) has switched off gets no gradient at all. With GELU a
# moderately negative number still gets one and may come back. Far out to the
# left, the derivative dies away here too.

# %% [markdown]
# ## Count it
#
# GELU has no parameters. Per element the forward pass takes about 20 operations,
# most of them in the exponential, and the backward pass about 30. The two linear
# layers around GELU take $2 \cdot 2 C$ operations for each of the $4C$ numbers,
# over 3,000 at C = 768: GELU adds less than a hundredth. `inp` is saved for the
# backward pass, $4C$ numbers a token; `out` is not, since computing it once more
# costs less than keeping it ([chapter 1.14](14_memory.ipynb)).

# %% [markdown]
# ## Take away
#
# - GELU is $x$ times the probability that a normal number lies below $x$;
#   GPT-2 uses a tanh form of it that is off by less than 0.0005.
# - Its gradient needs the input and nothing else.

# %% [markdown]
# ## Design note
#
# ReLU, $\max(x, 0)$, is the older bend, and cheaper. It has a corner at 0 and no
# gradient to the left of it: a unit that has been pushed there for every token
# of the text never comes back. GPT-2 was trained with GELU in the tanh form, and
# its weights mean what they mean only with that form.

# %% [markdown]
# ## Exercises
#
# **1** (★). GELU has one lowest point. Find it to six digits with the
# derivative and bisection.
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# The derivative is negative at $-2$ and positive at $-0.5$. Halve the
# interval until it is short enough: $x = -0.752461$, $y = -0.170041$.
# :::


# %% exercise 1, bisection tags=["hide-cell"]
def lowest_point():
    low, high = -2.0, -0.5
    while high - low > 1e-12:
        middle = (low + high) / 2
        slope = both(np.array([middle]))[1][0]
        low, high = (middle, high) if slope < 0 else (low, middle)
    return low


# %% exercise 1, checked
x0 = lowest_point()
y0 = tanh_gelu(x0, CUBIC)
print(f"x = {x0:.6f}, y = {y0:.6f}")
verdict("lowest", y0 <= tanh_gelu(np.linspace(-8, 8, 9999), CUBIC).min(),
        "below a grid of points")  # fmt: skip

# %% [markdown]
# **2** (★★). Derive the gradient of the exact form (1.9.1) and check it. The
# derivative of $\Phi$ is the bell curve
# $\varphi(x) = e^{-x^2/2} / \sqrt{2\pi}$.
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# The product rule gives $\Phi(x) + x\,\varphi(x)$: the shape of (1.9.8) with
# $\Phi$ in the place of $\sigma$.
# :::


# %% exercise 2, the gradient tags=["hide-cell"]
def exact_slope(x):
    Phi = 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return Phi + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


# %% exercise 2, checked
want = numerical_gradient(lambda: exact_gelu(inp).sum(), inp)
compare("exact slope", exact_slope(inp), want, tol=1e-8)

# %% [markdown]
# **3** (★★). A cheaper form drops the cube: $x\,\sigma(1.702\,x)$. How far
# is it from the exact form at most, and how many times further than the tanh
# form?
#
# :::{admonition} Solution to exercise 3
# :class: dropdown
# About 0.02, over forty times as far as the tanh form. It saves three
# multiplications beside an exponential that costs many more.
# :::


# %% exercise 3, the distance tags=["hide-cell"]
def distances():
    x = np.linspace(-8, 8, 16001)
    quick = x / (1 + np.exp(-1.702 * x))
    forms = quick, tanh_gelu(x, CUBIC)
    return [np.abs(form - exact_gelu(x)).max() for form in forms]


# %% exercise 3, checked
quick, tanh = distances()
print(f"{quick:.3f}, {quick / tanh:.0f} times as far")
verdict("without the cube", quick > 40 * tanh, "over 40 times as far")

# %% [markdown]
# **4** (★★★). Show that `inp` cannot be replaced by `out` as what is saved:
# find two inputs with the same GELU and different derivatives.
#
# :::{admonition} Solution to exercise 4
# :class: dropdown
# Left of its lowest point GELU falls, right of it GELU rises. Every value
# between the lowest one and 0 is taken twice, once with a negative and once
# with a positive derivative. Take $-0.1$ and bisect on each side. (One more
# bit for each number, telling the side, would do.)
# :::


# %% exercise 4, two inputs tags=["hide-cell"]
def preimages(y):
    found = []
    for outer in (-8.0, 0.0):
        inside = x0
        while abs(outer - inside) > 1e-12:
            middle = (outer + inside) / 2
            if tanh_gelu(middle, CUBIC) > y:
                outer = middle
            else:
                inside = middle
        found.append(inside)
    return np.array(found)


# %% exercise 4, checked
values, ends = both(preimages(-0.1))
compare("both outputs", values, [-0.1, -0.1], tol=1e-10)
verdict("derivatives", ends[0] < 0 < ends[1], "have two signs")

# %% [markdown]
# ## Further reading
#
# - Hendrycks and Gimpel (2016),
#   [Gaussian Error Linear Units](https://arxiv.org/abs/1606.08415): section
#   2 for the idea and both approximations.
# - Shazeer (2020),
#   [GLU Variants Improve Transformer](https://arxiv.org/abs/2002.05202):
#   what later models put in GELU's place.
# - Goldberg (1991),
#   [What every computer scientist should know about floating-point arithmetic](https://doi.org/10.1145/103162.103163):
#   the part on cancellation, which (1.9.10) avoids.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("1.9")
