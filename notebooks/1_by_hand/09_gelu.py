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
# > GELU lets positive numbers through and holds negative ones back, without a
# > corner; its gradient needs the input and nothing else.
#
# *Reading time: 23 minutes. You need: the linear layer
# ([chapter 1.7](07_matmul.ipynb)). The fast versions: chapters
# [2.2](../2_cpu/02_rows.ipynb) and [3.5](../3_gpu/05_elementwise.ipynb).*
#
# ## Where we are

# %% where we are
from llmnb.book.diagram import gpt2_diagram

gpt2_diagram(lit="gelu")

# %% [markdown]
# *Figure 1.9.1. GELU stands once in every block, between the linear layer that
# widens a vector to 4C channels and the one that narrows it to C again.*
#
# The second half of a block is two linear layers. Sums of sums are sums, so
# something between them has to bend, or one layer would do. GELU, the
# *Gaussian error linear unit*, bends each number by itself. At the end of this
# chapter you can
#
# - name a question that no linear layer can answer, and answer it with a bend;
# - say what GELU computes, and where both constants of its tanh form come from;
# - derive its gradient, and say why the input must be saved and the output
#   would not do;
# - say what the width 4C is for, and why it is worth nothing without a bend.
#
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
# ## Why it is there
#
# Ask of two numbers, each 0 or 1, whether they differ. The answer should be 1
# for $(0, 1)$ and $(1, 0)$, and 0 for $(0, 0)$ and $(1, 1)$. A linear layer
# answers $f(x_0, x_1) = w_0 x_0 + w_1 x_1 + b$, and whatever its weights are,
#
# $$ f(0, 0) + f(1, 1) = w_0 + w_1 + 2 b = f(0, 1) + f(1, 0) . $$
#
# We want 0 on the left and 2 on the right. No weights can do it. Nor can a
# second linear layer after the first: $W_2 (W_1 x + b_1) + b_2$ is
# $(W_2 W_1)\, x + (W_2 b_1 + b_2)$, one matrix again and one bias.
#
# The simplest bend is $\max(x, 0)$, called *ReLU*, for rectified linear unit:
# a positive number passes, a negative one becomes 0. With it two numbers in
# the middle are enough; they are called *hidden*, being neither question nor
# answer:
#
# $$ \max(x_0 - x_1, 0) + \max(x_1 - x_0, 0) , $$
#
# a linear layer, a bend, and a linear layer that adds:

# %% do they differ?
cases = np.array([[0.0, 0], [0, 1], [1, 0], [1, 1]])
differ = np.array([0.0, 1, 1, 0])
line = np.hstack([cases, np.ones((4, 1))])  # the ones are for the bias
best = line @ np.linalg.lstsq(line, differ, rcond=None)[0]
bent = np.maximum(cases @ np.array([[1, -1], [-1, 1]]), 0).sum(axis=1)
print("the best linear layer ", np.round(best, 3))
print("with a bend           ", bent)

# %% [markdown]
# The best linear layer says "half" to every case.
#
# ReLU has a corner at 0, and left of it no slope at all. A *unit* is one
# hidden number with the weights that make it. If the number lies left of 0 for
# every token of the text, its weights get no gradient and stay as they are:
# the unit is *dead*, unless the layers before it change what it reads. GELU is
# a bend without a corner.
#
# ## By hand
#
# Draw a number from the standard normal distribution, the bell curve of
# mean 0 and deviation 1. It is less than $x$ with a probability called
# $\Phi(x)$. GELU multiplies $x$ by it: the larger a number is against the
# usual ones, the more of it passes. From a table of $\Phi$ (the products from
# more digits than are shown):
#
# | *x* | −2 | −1 | 0 | 1 | 2 |
# |---|---|---|---|---|---|
# | $\Phi(x)$ | 0.0228 | 0.1587 | 0.5 | 0.8413 | 0.9772 |
# | $x\,\Phi(x)$ | −0.0455 | −0.1587 | 0 | 0.8413 | 1.9545 |
#
# Of the negative numbers a small remainder is left. The bell is symmetric, so
# $\Phi(-x) = 1 - \Phi(x)$. The probability comes from the error function, erf,
# which Python has in its library:


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
# Every number is treated alone, so the formulas have no index.
#
# ## Forward
#
# The exact form is what we did by hand, $x$ times the area under the bell
# curve up to $x$. Half of the area lies left of 0, so
#
# $$ \Phi(x) = \frac12 + \frac{1}{\sqrt{2\pi}} \int_0^x e^{-x'^2/2}\, dx' .
#    \tag{1.9.1} $$
#
# The error function is
# $\operatorname{erf} x = \frac{2}{\sqrt\pi} \int_0^x e^{-x'^2} dx'$. At
# $x / \sqrt2$, with $x' / \sqrt2$ in the place of $x'$ and so $dx' / \sqrt2$
# in that of $dx'$, it is $\sqrt{2/\pi} \int_0^x e^{-x'^2/2} dx'$: twice the
# second term of (1.9.1). Hence
# $\Phi(x) = \frac12 (1 + \operatorname{erf}(x / \sqrt2))$, which is what the
# code used.
#
# The error function takes long to compute. The paper that introduced GELU
# gives a cheaper one of the same S shape, the hyperbolic tangent of a
# polynomial:
#
# $$ \xi = \sqrt{\tfrac2\pi}\,(x + \gamma x^3), \qquad
#    y = \frac x2 \,(1 + \tanh \xi) , \tag{1.9.2} $$
#
# with $\gamma = 0.044715$. GPT-2's weights were trained with (1.9.2), so
# (1.9.2) is what GPT-2 *is*, and we keep it.
#
# **Where the constants come from.** Near 0 both S curves should agree, so we
# compare their series. For the first, $e^{-x'^2/2} = 1 - x'^2/2 + \dots$, and
# the integral of (1.9.1), term by term, gives
#
# $$ \operatorname{erf}\frac{x}{\sqrt2}
#    = \sqrt{\tfrac2\pi}\,\Bigl(x - \frac{x^3}{6} + \dots\Bigr) .
#    \tag{1.9.3} $$
#
# For the second we need the derivative of the hyperbolic tangent,
# $\tanh \xi = \sinh \xi / \cosh \xi$ with $\sinh \xi = (e^\xi - e^{-\xi})/2$
# and $\cosh \xi = (e^\xi + e^{-\xi})/2$. Each of the two is the derivative of
# the other, so by the quotient rule
#
# $$ \frac{d \tanh \xi}{d \xi}
#    = \frac{\cosh^2 \xi - \sinh^2 \xi}{\cosh^2 \xi}
#    = 1 - \tanh^2 \xi . \tag{1.9.4} $$
#
# At 0, $\tanh$ is 0 and its slope 1, so it begins as $\xi$. Then by (1.9.4)
# its slope begins as $1 - \xi^2$, and $\tanh$ as $\xi - \xi^3/3$. Put in
# $\xi$ from (1.9.2), whose cube begins as $(2/\pi)^{3/2} x^3$:
#
# $$
# \begin{aligned}
# \tanh \xi &= \xi - \frac{\xi^3}{3} + \dots \\
#   &= \sqrt{\tfrac2\pi}\, \Bigl(
#    x + \Bigl(\gamma - \frac{2}{3\pi}\Bigr) x^3 + \dots \Bigr) .
# \end{aligned}
# \tag{1.9.5}
# $$
#
# The root before the bracket is there to make the terms in $x$ agree with
# (1.9.3). The terms in $x^3$ agree if $\gamma = \frac{2}{3\pi} - \frac16$.

# %% the cubic coefficient that the series gives
series = 2 / (3 * math.pi) - 1 / 6
print(f"{series:.6f}")

# %% [markdown]
# The value in use, 0.044715, is 2 % smaller: it gives up a little agreement at
# 0 for a smaller error further out.


# %% the largest error over the line
def tanh_gelu(x, cubic):
    root = math.sqrt(2 / math.pi)
    return 0.5 * x * (1 + np.tanh(root * (x + cubic * x**3)))


x = np.linspace(-8, 8, 16001)
exact = exact_gelu(x)
errors = [np.abs(tanh_gelu(x, c) - exact).max() for c in (series, 0.044715)]
print("largest error", [f"{e:.5f}" for e in errors])
verdict("0.044715", errors[1] < errors[0], "errs less than the series")
verdict("tanh form", errors[1] < 0.0005, "off by less than 0.0005")

# %% [markdown]
# The function itself is (1.9.2). In the line over it `...` is any shape, the
# same for all:

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
    xi = ROOT * (inp + CUBIC * inp**3)
    out[...] = 0.5 * inp * (1 + np.tanh(xi))


# %% the five numbers through the function
y = np.zeros(5)
gelu_forward(y, five)
compare("tanh form", y, exact_gelu(five), tol=5e-4)

# %% [markdown]
# ## Backward, derived
#
# (1.9.2) has $x$ in two places, as a factor and inside $\xi$, so by the
# product rule and the chain rule
#
# $$
# \begin{aligned}
# \frac{dy}{dx} &= \frac12 (1 + \tanh \xi) + \frac x2\,
#    \frac{d \tanh \xi}{d\xi}\,\frac{d\xi}{dx} , \\
# \frac{d\xi}{dx} &= \sqrt{\tfrac2\pi}\,(1 + 3 \gamma x^2) .
# \end{aligned}
# \tag{1.9.6}
# $$
#
# The derivative in the middle is (1.9.4). Each number reaches the loss through
# its own output and no other, so with the gradient $dy$ that later layers
# hand us
#
# $$
# \begin{aligned}
# dx &= dy \cdot \frac12 \Bigl( 1 + \tanh \xi \\
#   &\quad {} + x\,(1 - \tanh^2 \xi)\,
#    \sqrt{\tfrac2\pi}\,(1 + 3 \gamma x^2) \Bigr) .
# \end{aligned}
# \tag{1.9.7}
# $$
#
# **What to save.** (1.9.7) needs $x$ alone, the output of the linear layer
# before. That is not free: it is the widest activation inside a block. Could
# we save $y$ and let go of $x$, since the next layer needs $y$ anyway?
# Exercise 4 shows that $y$ does not determine $x$: every value between the
# lowest and 0 comes from two.


# %% GELU, backward tags=["export"]
@shapes("...!, ...~, ...")
def gelu_backward(dinp, dout, inp, add=True):
    """Add GELU's gradient to dinp, or overwrite dinp with it.

    dinp, dout, inp: arrays of one shape, any, and one float dtype; dinp is
    added to in place. With add=False it is overwritten and its old contents
    are not used, so it need not be zeroed.
    """
    tanh = np.tanh(ROOT * (inp + CUBIC * inp**3))
    dxi = ROOT * (1 + 3 * CUBIC * inp**2)
    grad = dout * 0.5 * (1 + tanh + inp * (1 - tanh**2) * dxi)
    dinp[...] = dinp + grad if add else grad


# %% [markdown]
# ## Proof
#
# As before: $\mathcal L = \sum g \cdot y$, float64, step $h = 10^{-5}$,
# tolerance $10^{-8}$, a gradient that starts from ones, or is written.

# %% a problem to differentiate
inp, g = rng.normal(scale=2, size=(2, 3, 5, 4))
out = np.empty_like(inp)


def loss():
    gelu_forward(out, inp)
    return (g * out).sum()


dinp, written = np.ones_like(inp), np.full_like(inp, np.nan)
gelu_backward(dinp, g, inp)
gelu_backward(written, g, inp, add=False)
numerical = numerical_gradient(loss, inp)
compare("dinp", dinp - 1, numerical, tol=1e-8)
compare("dinp, written", written, numerical, tol=1e-8)

# %% [markdown]
# The term that is easily lost is the second one of (1.9.6). Without it the
# gradient is still right at 0, where its factor $x$ is 0, and far out on both
# sides. Elsewhere it is not:

# %% a gradient made wrong on purpose
tanh = np.tanh(ROOT * (inp + CUBIC * inp**3))
try:
    compare("dinp, half of it", g * 0.5 * (1 + tanh), numerical, tol=1e-8)
    caught = False
except AssertionError:
    caught = True
verdict("the mistake", caught, "is caught")


# %% both directions at once
def both(x):
    y, slope = np.empty_like(x), np.zeros_like(x)
    gelu_forward(y, x)
    gelu_backward(slope, np.ones_like(x), x)
    return y, slope


# %% [markdown]
# ## What 4C and a bend can hold
#
# GELU stands between a linear layer from $C$ to $4C$ channels and one back to
# $C$. What is the width for? Let us ask the half block to know things. A
# *fact* here is a token's vector, drawn at random, and for each of $C = 16$
# channels the number that the output should be there, 1 or $-1$, drawn too. A
# layer *holds* facts whose numbers it meets. How many can it hold at once?
#
# An output channel of a linear layer has $C$ weights and a bias, 17 numbers
# that can be chosen; so it can meet 17 equations, and an 18th only by luck.
# With a hidden layer the last matrix has $4C$ weights and a bias for each
# channel: 65 numbers. But they help only if the $4C$ hidden numbers of
# different tokens are independent. Without a bend they are not. They are sums
# of the same 16, so that of the 65 columns of the equations only 17 are
# independent: their *rank* is 17. We compare four layers: a linear one; $4C$
# hidden numbers without a bend; $C$ with a bend, the first $C$ of the bent
# ones; and $4C$ with a bend.

# %% four layers, and what reaches their last matrix
C = 16
tokens = rng.normal(size=(192, C))
signs = rng.choice([-1.0, 1.0], (192, C))
wide = tokens @ rng.normal(scale=0.5, size=(C, 4 * C)) + rng.normal(size=4 * C)
kinds = {
    "a linear layer": tokens,
    "4C, no bend": wide,
    "C and a bend": both(wide)[0][:, :C],
    "4C and a bend": both(wide)[0],
}
for name, hidden in kinds.items():
    kinds[name] = np.hstack([hidden, np.ones((192, 1))])
    print(f"{name:<15} rank {np.linalg.matrix_rank(kinds[name])}")

# %% [markdown]
# Give each of the four more and more facts, and choose its last matrix by
# least squares, which finds the smallest error there is, the root of the mean
# squared miss. The matrix before the bend stays as it was drawn. (To train it
# as well can only do better where there is a bend, and without one changes
# nothing.)


# %% how wrong the best layer is
def misses(hidden, count):
    hidden, wanted = hidden[:count], signs[:count]
    best = hidden @ np.linalg.lstsq(hidden, wanted, rcond=1e-9)[0]
    return np.sqrt(((best - wanted) ** 2).mean())


for name, hidden in kinds.items():
    holds = 4 * C + 1 if name == "4C and a bend" else C + 1
    verdict(name, misses(hidden, holds) < 1e-6, f"holds {holds} facts")
    verdict(name, misses(hidden, holds + 1) > 0.1, f"not {holds + 1}")

# %% draw it tags=["hide-input"]
fig, ax = plt.subplots(figsize=(7, 3.5), dpi=100)
styles = (
    ("grey", "-", 6),
    ("orange", "-", 2),
    ("green", "--", 2),
    ("blue", "-", 2),
)
counts = np.arange(8, 193, 8)
for (name, hidden), (colour, ls, lw) in zip(
    kinds.items(), styles, strict=True
):
    error = [misses(hidden, count) for count in counts]
    ax.plot(counts, error, ls, color=PALETTE[colour], lw=lw, label=name)
for count, name in ((C + 1, "C + 1"), (4 * C + 1, "4C + 1")):
    ax.axvline(count, color=PALETTE["grey"], lw=0.8, ls=":")
    ax.text(count + 1.5, 0.02, name, color=PALETTE["ink"])
ax.set(xlabel="facts", ylabel="error of the best layer", ylim=(0, 1))
ax.legend(frameon=False, loc="lower right")
ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.9.2. Width without a bend is worth nothing; a bend without width is
# worth as little while the matrix before it stays as drawn: three of the four
# hold C + 1 facts. Width and bend together hold 4C + 1.*
#
# Why four times? There is no derivation. Each further $C$ of width buys $C$
# facts for $2 C^2$ weights, and four is what the first transformer took and
# GPT-2 kept.
#
# ## See it

# %% GELU, its slope, and the error of the tanh form tags=["hide-input"]
x = np.linspace(-4, 4, 801)
y, slope = both(x)
fig, axes = plt.subplots(1, 2, figsize=(8, 3.4), dpi=100)
ax = axes[0]
ax.plot(x, np.maximum(x, 0), "--", color=PALETTE["grey"], label="ReLU")
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
# *Figure 1.9.3. Left: GELU follows ReLU at both ends and dips below 0
# between; its derivative overshoots 1 and is negative left of the dip.
# Right: the tanh form stays within half a thousandth of the exact one.*
#
# A moderately negative number still gets a gradient and may come back. Far out
# to the left the gradient dies away here too.
#
# ## Count it
#
# GELU has no parameters. Per element the forward pass takes about 20
# operations, most of them in the tanh, and the backward pass about 30.
# The two linear layers around it take $2 \cdot 2 C$ for each of the $4C$
# numbers, over 3,000 at C = 768: GELU adds less than a hundredth. `inp` is
# saved, $4C$ numbers a token; `out` is not, since computing it once more costs
# less than keeping it ([chapter 1.16](16_memory.ipynb)).
#
# ## Take away
#
# - Linear layers in a row are one linear layer. A bend between them makes them
#   more, and the width 4C says how much more.
# - GELU is $x$ times the probability that a normal number is less than $x$;
#   GPT-2 uses a tanh form of it that is off by less than 0.0005.
# - Its gradient needs the input and nothing else.
#
# ## Design note
#
# ReLU is the older bend, and cheaper: one comparison. Many models have used
# it, dead units and all. GPT-2's weights mean what they mean only with GELU in
# the tanh form.
#
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
left, right = both(x0 + np.array([-5e-7, 5e-7]))[1]
verdict("six digits", left < 0 < right, "its slope changes sign")

# %% [markdown]
# **2** (★★). Derive the gradient of the exact form (1.9.1) and check it. The
# derivative of $\Phi$ is the bell curve
# $\varphi(x) = e^{-x^2/2} / \sqrt{2\pi}$.
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# The product rule gives $\Phi(x) + x\,\varphi(x)$, since the derivative of the
# integral in (1.9.1) is what stands under it.
# :::


# %% exercise 2, the gradient tags=["hide-cell"]
def exact_slope(x):
    Phi = 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return Phi + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


# %% exercise 2, checked
want = numerical_gradient(lambda: exact_gelu(inp).sum(), inp)
compare("exact slope", exact_slope(inp), want, tol=1e-8)

# %% [markdown]
# **3** (★★). The *sigmoid* is $\operatorname{sig}(x) = 1 / (1 + e^{-x})$. Show
# that $\frac12 (1 + \tanh \xi) = \operatorname{sig}(2 \xi)$ and that the
# derivative of the sigmoid is $\operatorname{sig}\,(1 - \operatorname{sig})$.
# A cheaper form of GELU drops the cube: $x \operatorname{sig}(1.702\,x)$. How
# far is it from the exact form at most, and how many times further than the
# tanh form?
#
# :::{admonition} Solution to exercise 3
# :class: dropdown
# $\frac12 (1 + \tanh \xi) = \frac12 \frac{(e^\xi + e^{-\xi}) + (e^\xi -
# e^{-\xi})}{e^\xi + e^{-\xi}} = \frac{e^\xi}{e^\xi + e^{-\xi}}$. Multiply both
# by $e^{-\xi}$. By the quotient rule the derivative is $e^{-x} / (1 + e^{-x})^2$,
# which is $\frac{1}{1 + e^{-x}}$ times $\frac{e^{-x}}{1 + e^{-x}}$, and the
# second is $1 - \operatorname{sig}(x)$. The cheaper form is off by about 0.02,
# over forty times as far as the tanh form. It saves three multiplications
# beside an exponential that costs many more.
# :::


# %% exercise 3, the distance tags=["hide-cell"]
def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def distances():
    x = np.linspace(-8, 8, 16001)
    forms = x * sigmoid(1.702 * x), tanh_gelu(x, CUBIC)
    return [np.abs(form - exact_gelu(x)).max() for form in forms]


# %% exercise 3, checked
at = np.linspace(-3, 3, 7)
compare("by tanh", (1 + np.tanh(at)) / 2, sigmoid(2 * at), tol=1e-12)
slope = numerical_gradient(lambda: sigmoid(at).sum(), at)
compare("its slope", sigmoid(at) * (1 - sigmoid(at)), slope, tol=1e-8)
quick, tanh = distances()
print(f"{quick:.3f}, {quick / tanh:.0f} times as far")
far = 40 * tanh < quick < 0.021
verdict("without the cube", far, "over 40 times as far")

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
#
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("1.9")
