# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       reference.adamw: "AdamW and the clipping of gradients in NumPy."
#       train.schedule: "The learning rate of each step: warm-up, then a decline."
# ---

# %% [markdown]
# # AdamW: step downhill
#
# > AdamW divides each parameter's averaged gradient by its usual size and
# > shrinks the parameter itself; a schedule sets the pace, a clip bounds it.
#
# *Reading time: 30 minutes. You need: gradient and learning rate from [chapter
# 1.1](01_learns.ipynb). The fast versions: chapters
# [2.3](../2_cpu/03_loss.ipynb) and [3.10](../3_gpu/10_adamw.ipynb).*
#
# ## Where we are

# %% where we are
from llmnb.book.diagram import gpt2_diagram

gpt2_diagram(lit="adamw")

# %% [markdown]
# *Figure 1.12.1. AdamW is an optimiser and no layer: when the backward pass
# has filled every gradient, it changes every parameter.*
#
# At the end of this chapter you can
#
# - say what momentum, Adam and AdamW each add to gradient descent;
# - derive the bias correction and say what goes wrong without it;
# - say why weight decay must not pass through the gradient;
# - say what warm-up and a clip each save a run from.
#
# ## Setup

# %% setup
from types import SimpleNamespace

import matplotlib.pyplot as plt

from llmnb.book.diagram import PALETTE
from llmnb.book.moving import moving
from llmnb.book.verify import compare, verdict

# %% imports tags=["export"]
import math
from typing import NamedTuple

import numpy as np

from llmnb.shapes import check_number, shapes

# %% [markdown]
# ## By hand
#
# AdamW treats all parameters alike and keeps two running means for each: $m$
# of its gradient, $v$ of its squared gradient. Take a parameter at 1 with the
# gradient 0.5, a learning rate $\eta = 0.1$, a weight decay $\lambda = 0.1$,
# and PyTorch's defaults $\beta_1 = 0.9$ and $\beta_2 = 0.999$: the shares of
# the old mean that stay; 0.1 and 0.001 are left for what is new. In step 1
#
# - decay shrinks the parameter by the factor $1 - 0.1 \cdot 0.1$ to 0.99;
# - $m$ goes from 0 to $0.1 \cdot 0.5 = 0.05$, and $v$ to
#   $0.001 \cdot 0.25 = 0.00025$;
# - both are divided by the shares that have come in so far, 0.1 and 0.001,
#   and become 0.5 and 0.25;
# - the parameter moves by $-0.1 \cdot 0.5 / \sqrt{0.25} = -0.1$ to 0.89.
#
# A second parameter, also at 1, has the gradient 0.001. It moves to 0.89 as
# well: the size of a gradient cancels, and its sign remains.

# %% two parameters, one step by hand
p, g = np.array([1.0, 1.0]), np.array([0.5, 0.001])
p = p * (1 - 0.1 * 0.1)
m, v = 0.1 * g, 0.001 * g**2
print("decayed ", p)
print("m, v    ", m, v)
print("stepped ", p - 0.1 * (m / 0.1) / np.sqrt(v / 0.001))

# %% [markdown]
# | array | shape | what it holds |
# |---|---|---|
# | `params`, `grads` | (N,) | all parameters, one after the other; gradients |
# | `m`, `v` | (N,) | the running means of gradient and squared gradient |
#
# ## From gradient descent to AdamW
#
# Four methods, each a few lines, will race in one valley. Its floor slopes
# gently in one direction, and its walls are 50 times as steep:
#
# $$
# \begin{aligned}
# \mathcal L(w) &= \tfrac12 \sum_i \kappa_i (w_i - w^*_i)^2 , \\
# \kappa &= (1, 50) , \quad w^* = (3, 1) .
# \end{aligned}
# \tag{1.12.1}
# $$
#
# The gradient is $g_i = \kappa_i (w_i - w^*_i)$, and $w^*$ is the lowest
# point. The $\kappa_i$ are the *curvatures*; in a network the ratio of the
# largest to the smallest, here 50, is far larger.

# %% the valley
curvature, lowest = np.array([1.0, 50.0]), np.array([3.0, 1.0])


def descend(rule, curvature=curvature, **settings):
    """The points that a rule visits in 60 steps from (-1, -0.2)."""
    path, state = [np.array([-1.0, -0.2])], SimpleNamespace(m=0, v=0)
    for step in range(1, 61):
        state.step, g = step, curvature * (path[-1] - lowest)
        path.append(rule(path[-1], g, state, **settings))
    return np.array(path)


# %% [markdown]
# ### Gradient descent
#
# Step against the gradient:
#
# $$ w \leftarrow w - \eta\, g . \tag{1.12.2} $$
#
# On (1.12.1) the distance to the lowest point obeys $w_i - w^*_i \leftarrow
# (1 - \eta \kappa_i)(w_i - w^*_i)$. Each coordinate shrinks by its own factor.
# The steep one allows no $\eta$ above $2/50 = 0.04$, or $|1 - 50 \eta|$
# exceeds 1 and the path flies apart. With that $\eta$ the gentle one shrinks
# by the factor $1 - 0.04 = 0.96$ a step. One learning rate has to serve both;
# we take 0.036, a little under the limit.
#
# ### Momentum
#
# Let past gradients count, in a sum $m$ that forgets by a factor $\beta < 1$:
#
# $$ m \leftarrow \beta m + g , \qquad
#    w \leftarrow w - \eta\, m . \tag{1.12.3} $$
#
# A gradient that stays the same adds up to $g\,(1 + \beta + \beta^2 + \dots) =
# g / (1 - \beta)$, ten times itself for $\beta = 0.9$. One that changes sign
# at every step comes to $g\,(1 - \beta + \beta^2 - \dots) = g / (1 + \beta)$,
# about half. So the path gains speed along the floor and not across it.


# %% momentum
def momentum(w, g, state, lr, beta=0.9):
    state.m = beta * state.m + g
    return w - lr * state.m


# %% [markdown]
# ### Adam
#
# Momentum still has one learning rate for all. Adam gives each parameter its
# own: it divides by the usual size of that parameter's gradient. It keeps
# running *means*, with weights that sum to (nearly) one,
#
# $$
# \begin{aligned}
# m &\leftarrow \beta_1 m + (1 - \beta_1)\, g , \\
# v &\leftarrow \beta_2 v + (1 - \beta_2)\, g^2 ,
# \end{aligned}
# \tag{1.12.4}
# $$
#
# where $\beta_2$ is the larger, since a size should be steady and a direction
# fresh. It steps by the first, divided by the root of the second:
#
# $$ w \leftarrow w - \eta\, \frac{\hat m}{\sqrt{\hat v} + \epsilon} .
#    \tag{1.12.5} $$
#
# The $\epsilon = 10^{-8}$ keeps a parameter whose gradient is always 0, as in
# the rows of the padded vocabulary, from dividing 0 by 0. The hats are there
# because both means start at 0 and are too small for a while. How much? Let
# $g_r$ be the gradient of step $r$, and unroll (1.12.4): after step $s$
#
# $$ m_s = (1 - \beta_1) \sum_{r=1}^{s} \beta_1^{\,s-r} g_r . \tag{1.12.6} $$
#
# Suppose that all gradients have the same expected value $\bar g$. The weights
# form a geometric series, so
#
# $$ \mathbb E\, m_s = \bar g\, (1 - \beta_1)
#    \sum_{r=1}^{s} \beta_1^{\,s-r} = \bar g\, (1 - \beta_1^{\,s}) ,
#    \tag{1.12.7} $$
#
# because $(1 - \beta)(1 + \beta + \dots + \beta^{s-1}) = 1 - \beta^s$. The
# same holds for $v$ and $g^2$. Dividing by the factor removes the bias:
#
# $$ \hat m = \frac{m}{1 - \beta_1^{\,s}} , \qquad
#    \hat v = \frac{v}{1 - \beta_2^{\,s}} . \tag{1.12.8} $$
#
# In step 1 this gives $\hat m = g$ and $\hat v = g^2$: each parameter moves by
# $\eta$, up or down. Without the correction the first step would be $\eta
# \cdot 0.1 / \sqrt{0.001} \approx 3.2\, \eta$, and step 12 is the worst: $m$ has
# caught up after some twenty steps; $v$ stays too small, and the steps too
# large, for a thousand. (The race lasts sixty, so its $\beta_2$ is 0.99.)

# %% the correction, step by step
for s in (1, 12, 100, 1000, 10000):
    ratio = (1 - 0.9**s) / np.sqrt(1 - 0.999**s)
    print(f"step {s:5}: uncorrected steps are {ratio:.2f} times as long")


# %% Adam
def adam(w, g, state, lr, beta1=0.9, beta2=0.99, eps=1e-8):
    state.m = beta1 * state.m + (1 - beta1) * g
    state.v = beta2 * state.v + (1 - beta2) * g**2
    mean = state.m / (1 - beta1**state.step)
    square = state.v / (1 - beta2**state.step)
    return w - lr * mean / (np.sqrt(square) + eps)


# %% [markdown]
# ### AdamW
#
# What one batch has written into a weight stays there until another writes
# over it, be it knowledge or that batch's noise. **Weight decay** shrinks all
# weights a little at every step: what gradients do not keep asking for fades.
# There are two ways to write it. The first adds $\tfrac{\lambda}{2} \sum w^2$
# to the loss, hence $\lambda w$ to the gradient ("L2"):
#
# $$ g \leftarrow g + \lambda w . \tag{1.12.9} $$
#
# The second leaves the gradient alone and shrinks the weights themselves:
#
# $$ w \leftarrow (1 - \eta \lambda)\, w . \tag{1.12.10} $$
#
# In gradient descent both are the same: (1.12.2) with (1.12.9) reads
# $w - \eta g - \eta \lambda w$. In Adam they are not. There $\lambda w$ passes
# through the division by $\sqrt{\hat v}$, so a weight with large gradients is
# hardly shrunk, and a weight with small ones collapses: there $\lambda w$ is
# most of the gradient, and the step is about $\eta$ whatever $\lambda$ is.
# AdamW is Adam with (1.12.10), decay **decoupled** from the gradient.


# %% AdamW and the other way
def adamw(w, g, state, lr, decay, **settings):
    return adam((1 - lr * decay) * w, g, state, lr, **settings)


def adam_l2(w, g, state, lr, decay, **settings):
    return adam(w, g + decay * w, state, lr, **settings)


# %% the race
means = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
race = {
    "gradient descent": (momentum, {"lr": 0.036, "beta": 0}),  # (1.12.2)
    "momentum": (momentum, {"lr": 0.02, "beta": 0.9}),
    "Adam": (adam, {"lr": 0.2, **means}),
    "AdamW": (adamw, {"lr": 0.2, "decay": 0.1, **means}),
}
paths = {name: descend(rule, **how) for name, (rule, how) in race.items()}

# %% four trajectories tags=["hide-input"]
x, y = np.meshgrid(np.linspace(-1.6, 4.4, 121), np.linspace(-0.6, 2.4, 91))
height = (x - 3) ** 2 / 2 + 25 * (y - 1) ** 2
levels = [0.1, 1, 4, 10, 20, 40]
fig, axes = plt.subplots(2, 2, figsize=(7.6, 5.4), dpi=100)
for ax, (name, path) in zip(axes.flat, paths.items(), strict=True):
    ax.contour(x, y, height, levels, colors=PALETTE["grey"], linewidths=0.7)
    ax.plot(*path.T, "o-", color=PALETTE["blue"], ms=2.5, lw=1)
    ax.plot(*lowest, "+", color=PALETTE["orange"], ms=14, mew=2.5)
    ax.set(title=name, xlim=(-1.6, 4.4), ylim=(-0.6, 2.4))
fig.tight_layout()
plt.show()
moving(
    "valley", "the four paths, at any learning rate", steps=60, levels=levels,
    rules={name: how for name, (_, how) in race.items()}, start=[-1, -0.2],
    curvature=curvature.tolist(), lowest=lowest.tolist(),
)  # fmt: skip

# %% [markdown]
# *Figure 1.12.2. Sixty steps from the lower left; the cross is the lowest
# point. Gradient descent bounces between the walls and creeps along the floor.
# Momentum overshoots but arrives. Adam ignores the steepness, sets off
# diagonally and overshoots less. AdamW turns back before the cross, where the
# decay's pull towards the origin is the stronger. At a learning rate above
# 0.04 descent would fly apart; Adam would not.*
#
# **Why Adam.** Make the walls 100 times as steep. Descent must make its steps
# 100 times as short, and sixty of them go $1 - (1 - 0.00036)^{60}$, 2 %, of
# the way along the floor. Adam divides the steepness out and walks as before.

# %% walls a hundred times as steep
steeper = descend(adam, curvature * [1, 100], lr=0.2)
compare("Adam", steeper, paths["Adam"], tol=1e-6)

# %% [markdown]
# **Why decoupled.** Take a thousand weights at 1 whose gradients are pure
# noise of size 0.1, 1 or 10. There is nothing to learn from it, so decay alone
# should move their mean, to $(1 - \eta\lambda)^{300} = 0.74$ in 300 steps. It
# does when decoupled; with L2, weights with small gradients lose almost all,
# and those with large ones almost nothing.


# %% decay in noise
def fade(method, size):
    w, state = np.ones(1000), SimpleNamespace(m=0, v=0)
    for step in range(1, 301):
        state.step, g = step, size * rng.normal(size=1000)
        w = method(w, g, state, lr=0.01, decay=0.1)
    return w.mean()


rng = np.random.default_rng(10)
l2, decoupled = ([fade(f, s) for s in (0.1, 1, 10)] for f in (adam_l2, adamw))
print("L2", np.round(l2, 2), "decoupled", np.round(decoupled, 2))
compare("decoupled", decoupled, [0.999**300] * 3, tol=0.03)
verdict("L2", l2[0] < 0.1 and l2[2] > 0.9, "depends on the gradient")

# %% [markdown]
# ### The function
#
# It does (1.12.10), (1.12.4), (1.12.8) and (1.12.5), in the order in which
# PyTorch's `torch.optim.AdamW` does them, so that both round alike: $m$ moves
# by $(1 - \beta_1)(g - m)$, $v$ is corrected *after* the root, and the
# correction of $m$ is folded into the rate:
#
# $$ w \leftarrow w - \frac{\eta}{1 - \beta_1^{\,s}} \cdot
#    \frac{m}{\sqrt v \,/ \sqrt{1 - \beta_2^{\,s}} + \epsilon} .
#    \tag{1.12.11} $$


# %% the settings of a step tags=["export"]
ADAMW_LIMITS = {
    "learning_rate": "at least 0",
    "beta1": "in [0, 1)",
    "beta2": "in [0, 1)",
    "eps": "above 0",  # a gradient that is always 0 would divide 0 by 0
    "weight_decay": "at least 0",
    "step": "at least 1",
}


class Factors(NamedTuple):
    """The numbers of an update that are the same for all parameters."""

    keep: float  # of a parameter, after decay
    new1: float  # the share of the new gradient in m
    beta2: float  # of the old square in v
    new2: float  # and of the new one
    root: float  # of the correction of v
    eps: float
    size: float  # of a step, with the correction of m


class AdamW(NamedTuple):
    """The settings of one step of AdamW; step counts from 1."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    step: int = 1

    def factors(self, name):
        """The Factors of this step; name: what a message calls the caller.

        Raises TypeError or ValueError for a setting out of range.
        """
        for key, limit in ADAMW_LIMITS.items():
            check_number(f"{name}: {key}", getattr(self, key), limit)
        # NumPy's numbers would widen the arrays that they multiply
        rate, beta1, beta2, eps, decay, step = map(float, self)
        keep, root = 1 - rate * decay, math.sqrt(1 - beta2**step)
        size = rate / (1 - beta1**step)
        return Factors(keep, 1 - beta1, beta2, 1 - beta2, root, eps, size)


# %% the arithmetic of a step tags=["exporti"]
def learn(params, grads, m, v, factors):
    """AdamW on some parameters; factors: the Factors, or an array of them."""
    keep, new1, beta2, new2, root, eps, size = factors
    params *= keep
    m += new1 * (grads - m)
    v *= beta2
    v += new2 * grads * grads
    params -= size * m / (np.sqrt(v) / root + eps)


# %% one step of AdamW tags=["export"]
@shapes("N!, N, N!, N!")
def adamw_update(params, grads, m, v, settings):
    """Take one step of AdamW, in the order in which torch.optim.AdamW does.

    params, grads, m, v: float, of one shape; params, m and v change in
    place. m and v are the running means of the gradient and of its square,
    zero before the first step. settings: an AdamW; its decay applies to every
    element. Raises ValueError for settings out of range.
    """
    learn(params, grads, m, v, settings.factors("adamw_update"))


# %% the two parameters through the function
p, m, v = np.ones(2), np.zeros(2), np.zeros(2)
adamw_update(p, g, m, v, AdamW(0.1, weight_decay=0.1))
compare("by hand", p, [0.89, 0.89], tol=1e-5)

# %% [markdown]
# ## Which tensors decay
#
# Decay belongs to weights that multiply their input: the matrices, and the two
# tables that the encoder reads. A bias, or LayerNorm's scale and shift, moves
# or rescales a whole channel; to pull a scale of 1 towards 0 would work
# against its purpose. [Chapter 1.13](13_block.ipynb) says which tensors decay.
#
# ## The schedule
#
# **Warm-up.** In the first steps $\hat v$ rests on a handful of gradients, and
# (1.12.5) moves every parameter by almost $\eta$ however uncertain its
# direction. So the learning rate climbs from near 0 to its peak $\eta_{\max}$
# over the first $S_0$ steps:
#
# $$ \eta_s = \eta_{\max} \frac{s}{S_0} \qquad (s \le S_0) . \tag{1.12.12} $$
#
# **Decline.** Near the end a large step keeps throwing the parameters across
# the valley; a small one lets them sink. Let $\rho$ (`u` in the code) run from
# 0 towards 1 over the declining part of all $S$ steps; the step after the last
# would have 1. With $\phi$ the share of the peak that is left at the end,
#
# $$
# \begin{aligned}
# \eta_s &= \eta_{\max} \bigl( \phi + (1 - \phi)\, f(\rho) \bigr) , \\
# \rho &= \frac{s - 1 - S_0}{S - S_0} ,
# \end{aligned}
# \tag{1.12.13}
# $$
#
# where $f$ is $\tfrac12 (1 + \cos \pi \rho)$ for **cosine**, $1 - \rho$ for
# **linear**, 1 for **constant**. The fourth, **wsd** (warm-up, stable, decay),
# stays at the peak until 80 % of all steps are done and falls over the rest as
# $f = 1 - \sqrt \rho$, with $0.8\, S$, rounded down, in place of $S_0$ in $\rho$
# where it is the larger. The rates up to there are the same for any $S$: one may
# decide late when to stop. (A loop counts its steps from 0, so `learning_rate`
# takes $s - 1$.)

# %% imports of the schedule tags=["export"] module="train.schedule"
import math

# %% the schedule tags=["export"] module="train.schedule"
KINDS = ("cosine", "linear", "constant", "wsd")


def learning_rate(step, peak, warmup, total, kind="cosine", final=0.0):
    """The learning rate of a step, counted from 0, of `total` steps.

    For `warmup` steps it climbs in equal stairs to `peak`. Then it falls to
    `final * peak` along half a cosine ("cosine") or a line ("linear"), stays
    ("constant"), or stays until 80 % of `total` and falls as 1 - sqrt
    ("wsd"). Raises ValueError for an unknown kind and numbers out of range.
    """
    check_schedule(step, peak, warmup, total, kind, final)
    if step < warmup:
        return peak * (step + 1) / warmup
    start = max(warmup, int(0.8 * total)) if kind == "wsd" else warmup
    u = min(1, (max(step, start) - start) / max(1, total - start))
    left = {
        "cosine": (1 + math.cos(math.pi * u)) / 2,
        "linear": 1 - u,
        "constant": 1,
        "wsd": 1 - math.sqrt(u),
    }
    return peak * (final + (1 - final) * left[kind])


# %% check a schedule tags=["export"] module="train.schedule"
def check_schedule(step, peak, warmup, total, kind, final):
    """Raise ValueError unless `learning_rate` can work with these."""
    if kind not in KINDS:
        known = ", ".join(KINDS)
        raise ValueError(f"learning_rate: no kind {kind!r}, only {known}")
    limits = [
        ("step", step, step >= 0, "at least 0"),
        ("peak", peak, peak >= 0, "at least 0"),
        ("total", total, total >= 1, "at least 1"),
        ("warmup", warmup, 0 <= warmup <= total, f"in [0, {total}]"),
        ("final", final, 0 <= final <= 1, "in [0, 1]"),
    ]
    for name, value, ok, limit in limits:
        if not ok:
            raise ValueError(
                f"learning_rate: {name} must be {limit}, got {value}"
            )


# %% ten steps of each, and what an eleventh would have
by_hand = {  # in steps 0, 1, 4, 9 and 10
    "cosine": [50, 100, 10 + 45 * (1 + 0.5**0.5), 13.4254, 10],
    "linear": [50, 100, 77.5, 21.25, 10],
    "constant": [50, 100, 100, 100, 100],
    "wsd": [50, 100, 100, 10 + 90 * (1 - 0.5**0.5), 10],
}
for kind in KINDS:
    rates = [learning_rate(s, 100, 2, 10, kind, 0.1) for s in range(11)]
    print(" ".join(f"{x:5.1f}" for x in rates))
    compare(kind, np.take(rates, [0, 1, 4, 9, 10]), by_hand[kind], tol=1e-4)

# %% [markdown]
# ## Clipping
#
# Now and then a batch has a gradient many times as long as usual. Adam's
# division does not tame it: with $\beta_2 = 0.999$ a tenth of the spike enters
# $m$, but only $\sqrt{0.001}$, three hundredths, enters $\sqrt v$. The next
# steps follow the spike, at about three times the usual length. Then $m$
# forgets it, $\sqrt v$ does not, and for a long time the steps are too short.
#
# **Clipping** measures the length of the gradient of *all* parameters taken as
# one vector, the **global norm**, and shortens it to a given $g_{\max}$ when
# it is longer:
#
# $$
# \begin{aligned}
# \lVert g \rVert &= \sqrt{\textstyle\sum_i g_i^2} , \\
# g &\leftarrow g \cdot \min \Bigl( 1,
#    \frac{g_{\max}}{\lVert g \rVert + 10^{-6}} \Bigr) .
# \end{aligned}
# \tag{1.12.14}
# $$
#
# The direction stays. The $10^{-6}$ is PyTorch's. Squares are summed in
# float64: the sum of 124 million of them has too many digits for a float32.
# Where a gradient is infinite or not a number, so is the norm, and (1.12.14)
# would spoil *every* gradient. We leave them as they are and return the norm;
# the caller decides: skip the step, or stop.


# %% the norm of all gradients tags=["export"]
@shapes("N")
def global_norm(grads):
    """The Euclidean norm of a flat array, summed in float64, as a float."""
    wide = grads.astype(np.float64)
    return math.sqrt(np.sum(wide * wide))


# %% clip the gradients tags=["export"]
@shapes("N!, above 0")
def clip_gradients(grads, max_norm):
    """Scale a flat array down to norm `max_norm` if it is longer.

    Returns the norm before clipping and scales `grads` in place by
    max_norm / (norm + 1e-6) where that is below 1, as torch's
    clip_grad_norm_. When the norm is infinite or NaN, `grads` is left as it
    is: the caller sees the norm and decides. Raises ValueError unless
    max_norm is positive.
    """
    norm = global_norm(grads)
    scale = float(max_norm) / (norm + 1e-6)
    if math.isfinite(norm) and scale < 1:
        grads *= scale
    return norm


# %% a long, a short and a broken gradient
for values, size, left in (
    ([3e20, 4e20], 5e20, [0.6, 0.8]),  # their squares are no float32
    ([0.3, 0.4], 0.5, [0.3, 0.4]),
    ([3.0, np.inf], np.inf, [3.0, np.inf]),
):
    grads = np.array(values, np.float32)
    norm = clip_gradients(grads, 1.0)
    right = np.isclose(norm, size) and np.allclose(grads, left, atol=1e-6)
    verdict(f"norm {norm:g}", right, f"{values} becomes {grads.round(4)}")

# %% [markdown]
# To see what warm-up saves, begin at the valley's lowest point, with noise on
# every gradient, which makes some loss inevitable; a thousand runs at once. To
# see what a clip saves, go down the valley without noise; one gradient, in
# step 40, is a thousand times too long. Rate and $\beta_2$ are the race's.


# %% losses of a run, or of a thousand
def losses_of(w, noise=0, bad=1, warmup=0, max_norm=math.inf):
    """The mean loss after each of 100 steps; w: (runs, 2), starts."""
    w, m, v, losses = w.copy(), np.zeros_like(w), np.zeros_like(w), []
    for s in range(1, 101):
        g = curvature * (w - lowest + noise * rng.normal(size=w.shape))
        g *= bad if s == 40 else 1
        clip_gradients(g.ravel(), max_norm)
        rate = learning_rate(s - 1, 0.2, warmup, 100, "constant")
        settings = AdamW(rate, 0.9, 0.99, 1e-8, 0, s)
        adamw_update(w.ravel(), g.ravel(), m.ravel(), v.ravel(), settings)
        losses.append((curvature * (w - lowest) ** 2 / 2).sum(1).mean())
    return np.array(losses)


many, one = np.tile(lowest, (1000, 1)), np.array([[-1.0, -0.2]])
cold, warm = (losses_of(many, noise=1, warmup=s) for s in (0, 20))
free, held = (losses_of(one, bad=1000, max_norm=x) for x in (math.inf, 10))

# %% warm-up and clipping tags=["hide-input"]
verdict("no warm-up", cold[:60].max() > 1.5 * cold[60:].mean(), "has a peak")
verdict("warm-up", warm[:60].max() < 1.25 * warm[60:].mean(), "spares it")
verdict("not clipped", free[40:].max() > 10, "the loss climbs past 10")
verdict("not clipped", free[-1] > 10 * free[38], "ends at 10 times step 39's")
verdict("clipped", held[40:].max() < 0.5, "it stays below 0.5")
noisy = {"no warm-up": cold, "20 steps": warm}
spoilt = {"not clipped": free, "clipped at 10": held}
fig, axes = plt.subplots(1, 2, figsize=(8, 3.2), dpi=100)
for ax, curves in zip(axes, (noisy, spoilt), strict=True):
    for colour, name in zip(("orange", "blue"), curves, strict=True):
        ax.plot(curves[name], color=PALETTE[colour], lw=2, label=name)
    ax.legend(frameon=False)
    ax.set(xlabel="step")
    ax.spines[["top", "right"]].set_visible(False)
axes[0].set(ylabel="loss", ylim=(0, None), title="noise")
axes[1].set(yscale="log", ylim=(1e-5, 100), title="one spoilt gradient")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.12.3. Left, from the lowest point, in noise: without warm-up the
# first steps throw the parameters further out than they are ever again here.
# Right, step 40's gradient is a thousand times too long: without a clip the
# run loses most of what it had gained and has not recovered sixty steps later;
# with one, it hardly notices.*
#
# **What runs choose.** The numbers of [chapter 1.18](18_training.ipynb) have
# reasons, and that chapter takes three of them away to see what comes of it.
#
# - A $\beta_2$ of 0.95, not 0.999: $v$ looks back over $1/(1 - \beta_2) = 20$
#   steps and not 1000, and soon forgets a spike.
# - Warm-up over 150 of 3,000 steps: many times what $v$ needs to come to rest.
# - A clip at 1 touches spikes and the first steps; later most runs have shorter
#   gradients.
# - A peak of $5 \cdot 10^{-3}$: (1.12.5) moves a weight by little more than
#   $\eta$ at most (a mean is no larger than the root of the mean square over the
#   same steps; $m$ looks back over ten, $v$ over twenty). First weights are of
#   size 0.02 ([chapter 1.15](15_weights.ipynb)), so four steps in one direction
#   move a weight by its own size. Larger models take less.
# - A decay of 0.1 takes half of a weight that nothing renews in
#   $\log 2 / (\eta \lambda)$ steps, here 1,386 at the peak.
#
# ## Proof
#
# AdamW is a definition, with no gradient to check. What can be checked is that
# ours is PyTorch's. These numbers were computed with `torch.optim.AdamW`
# (PyTorch 2.13.0, float64, six steps, learning rate 0.01, its defaults, decay
# 0.1) for seven parameters and gradients of very different sizes, one being 0.
# The plausible mistake: to add $\epsilon = 10^{-8}$ before the correction.

# %% six steps of PyTorch tags=["hide-input"]
start = [1.0, -0.5, 0.03125, -2.0, 0.0, 8.0, 0.25]
slope = [0.5, -0.25, 2**-10, 0.0, -8.0, 2**-20, 0.125]
factor = [1.0, -0.5, 2.0, 0.25, -1.0, 1.5]
recorded = [
    0.9618985060667378, -0.4648910166476362, -0.0010532051555053666,
    -1.988029960029988, 0.03211647449987729, 7.920308854785162,
    0.21638727282067885,
]  # fmt: skip


# %% ours, and one made wrong on purpose
def six_steps(update):
    p, g = np.array([start, slope])
    m, v = np.zeros((2, 7))
    for t, f in enumerate(factor, 1):
        update(p, g * f, m, v, AdamW(0.01, weight_decay=0.1, step=t))
    return p


def eps_too_early(p, g, m, v, settings):
    eps = settings.eps / math.sqrt(1 - settings.beta2**settings.step)
    adamw_update(p, g, m, v, settings._replace(eps=eps))


compare("ours", six_steps(adamw_update), recorded, tol=1e-14)
caught = np.abs(six_steps(eps_too_early) - recorded).max() > 1e-4
verdict("the mistake", caught, "is caught")

# %% [markdown]
# ## Count it
#
# AdamW remembers two numbers for each parameter, 0.996 GB for the 124,475,904
# of GPT-2 in float32: as much again as the parameter and its gradient. For
# each, an update reads four numbers, writes three, and does 14 operations: one
# for the decay, three for $m$, four for $v$ and six for the step.
#
# ## Take away
#
# - Momentum adds up what the gradients agree on. Adam divides by their
#   usual size, so that each parameter moves by about the learning rate.
# - Means that start at 0 must be divided by $1 - \beta^s$.
# - Decay shrinks matrices and tables themselves, not through the gradient.
# - The learning rate warms up, then declines; a clip bounds the global norm.
#
# ## Design note
#
# Decay in (1.12.10) is multiplied by the learning rate, as in PyTorch. The
# paper on AdamW leaves the highest rate out, and multiplies decay by the
# schedule's share of it. We keep the common form, as recipes do.
#
# ## Exercises
#
# **1** (★★★). Adam has one scale for each *coordinate*. Turn the valley by 45
# degrees about its lowest point, so that neither floor nor walls lie along one.
# Who still arrives?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# Both coordinates now see the steep wall. Both are divided by its size, the
# floor's slope counts for little, and Adam's advantage is gone. Momentum knows
# no coordinates; but for the turned starting point its path is the old one.
# :::


# %% exercise 1, the turned valley tags=["hide-cell"]
def turned(w, g, state, method, **settings):
    turn = np.array([[1.0, 1.0], [-1.0, 1.0]]) / np.sqrt(2)
    g = turn.T @ (curvature * (turn @ (w - lowest)))
    return method(w, g, state, **settings)


# %% exercise 1, checked
lost = descend(turned, method=adam, lr=0.2)[-1]
found = descend(turned, method=momentum, lr=0.02)[-1]
off = np.hypot(*(np.array([lost, found, paths["Adam"][-1]]) - lowest).T)
verdict("Adam", off[0] > 10 * off[2], "is 10 times as far")
verdict("momentum", off[1] < 0.1, "still arrives")

# %% [markdown]
# ## Further reading
#
# - Goh (2017), [Why Momentum Really Works](https://distill.pub/2017/momentum/):
#   the quadratic of this chapter worked out in full, to be played with.
# - Kingma and Ba (2014), [Adam](https://arxiv.org/abs/1412.6980): section 3 for
#   the bias correction.
# - Loshchilov and Hutter (2017),
#   [Decoupled Weight Decay Regularization](https://arxiv.org/abs/1711.05101):
#   section 2 for the two kinds of decay.
#
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("1.12")
