# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       reference.adamw: "AdamW and the clipping of gradients in NumPy."
#       train.schedule: "The learning rate of each step, and which tensors decay."
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
# *Figure 1.12.1. AdamW is no layer: it stands after the loss. When the
# backward pass has filled every gradient, it changes every parameter.*
#
# The layers have produced one gradient for each parameter. This chapter turns
# gradients into steps. At its end you can
#
# - say what momentum, Adam and AdamW each add to gradient descent, and see
#   it on one and the same valley;
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
from llmnb.config import GPT2Config

# %% imports tags=["export"]
import math
from typing import NamedTuple

import numpy as np

from llmnb.shapes import check_number, shapes

# %% [markdown]
# ## By hand
#
# AdamW keeps two running means for each parameter: $m$ of its gradient and $v$
# of its squared gradient. Take a parameter at 1 with the gradient 0.5, a
# learning rate $\eta = 0.1$, a weight decay $\lambda = 0.1$, and PyTorch's
# defaults $\beta_1 = 0.9$ and $\beta_2 = 0.999$: the shares of the old mean
# that stay, so that 0.1 and 0.001 are left for what is new. In the first step
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
# | `params`, `grads` | (N,) | all parameters and their gradients, flat |
# | `m`, `v` | (N,) | the running means of gradient and squared gradient |
#
# The optimiser treats every parameter alike, so it works on flat arrays, all
# parameters one after the other.
#
# ## From gradient descent to AdamW
#
# Four methods, each a few lines, will race in one valley. Its floor slopes
# gently in one direction, and its walls are 50 times as steep:
#
# $$ \mathcal L(w) = \tfrac12 \sum_i \kappa_i (w_i - w^*_i)^2 , \qquad
#    \kappa = (1, 50) , \quad w^* = (3, 1) . \tag{1.12.1} $$
#
# The gradient is $g_i = \kappa_i (w_i - w^*_i)$, and $w^*$ is the lowest
# point. The $\kappa_i$ are the *curvatures*; in a network the ratio of the
# largest to the smallest, here 50, is far larger.

# %% the valley
curvature, lowest = np.array([1.0, 50.0]), np.array([3.0, 1.0])


def descend(rule, steps=60, **settings):
    """The points that a rule visits from (-1, -0.2)."""
    path, state = [np.array([-1.0, -0.2])], SimpleNamespace(m=0, v=0)
    for step in range(1, steps + 1):
        state.step, g = step, curvature * (path[-1] - lowest)
        path.append(rule(path[-1], g, state, **settings))
    return np.array(path)


def distance(w):
    """How far a point lies from the lowest one."""
    return np.hypot(*(w - lowest))


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


# %% gradient descent
def gradient_descent(w, g, state, lr):
    return w - lr * g


paths = {"gradient descent": descend(gradient_descent, lr=0.036)}

# %% [markdown]
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


paths["momentum"] = descend(momentum, lr=0.02)

# %% [markdown]
# ### Adam
#
# Momentum still has one learning rate for all. Adam gives each parameter its
# own: it divides by the usual size of that parameter's gradient. It keeps
# running *means*, with weights that sum to (nearly) one,
#
# $$ m \leftarrow \beta_1 m + (1 - \beta_1)\, g , \qquad
#    v \leftarrow \beta_2 v + (1 - \beta_2)\, g^2 , \tag{1.12.4} $$
#
# where $\beta_2$ is the larger, since a size should be steady and a direction
# fresh. It steps by the first, divided by the root of the second:
#
# $$ w \leftarrow w - \eta\, \frac{\hat m}{\sqrt{\hat v} + \epsilon} .
#    \tag{1.12.5} $$
#
# The hats need an explanation; $\epsilon = 10^{-8}$ gets its own later. Both
# means start at 0, and so are too small for a while. How much too small? Let
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
# In step 1 this gives $\hat m = g$ and $\hat v = g^2$, so that every parameter
# moves by $\eta$, up or down. Without the correction the first step would be
# $\eta \cdot 0.1 / \sqrt{0.001} \approx 3.2\, \eta$. It gets worse before it
# gets better, and is worst at step 12: $m$ has caught up after some twenty
# steps, while $v$ stays too small, and the steps too large, for a thousand.
# (The race here lasts sixty steps, so its $\beta_2$ is 0.99: it forgets faster.)

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


paths["Adam"] = descend(adam, lr=0.2)

# %% [markdown]
# The $\epsilon$ keeps a parameter whose gradient is always 0 from dividing 0
# by 0. The rows of the padded vocabulary are such parameters.
#
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


paths["AdamW"] = descend(adamw, lr=0.2, decay=0.1)

# %% [markdown]
# AdamW stays short of the lowest point, and means to: decay pulls towards the
# origin, and the path turns back where that pull is the stronger one.

# %% four trajectories tags=["hide-input"]
x, y = np.meshgrid(np.linspace(-1.6, 4.4, 121), np.linspace(-0.6, 2.4, 91))
height = (x - 3) ** 2 / 2 + 25 * (y - 1) ** 2
fig, axes = plt.subplots(2, 2, figsize=(7.6, 5.4), dpi=100)
for ax, (name, path) in zip(axes.flat, paths.items(), strict=True):
    levels = [0.1, 1, 4, 10, 20, 40]
    ax.contour(x, y, height, levels, colors=PALETTE["grey"], linewidths=0.7)
    ax.plot(*path.T, "o-", color=PALETTE["blue"], ms=2.5, lw=1)
    ax.plot(*lowest, "+", color=PALETTE["orange"], ms=14, mew=2.5)
    ax.set(title=name, xlim=(-1.6, 4.4), ylim=(-0.6, 2.4))
fig.tight_layout()
plt.show()
means = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
rules = {
    "gradient descent": {"lr": 0.036},
    "momentum": {"lr": 0.02, "beta": 0.9},
    "Adam": {"lr": 0.2, **means},
    "AdamW": {"lr": 0.2, "decay": 0.1, **means},
}
moving(
    "valley", "the four paths, at any learning rate", rules=rules, steps=60,
    curvature=curvature.tolist(), lowest=lowest.tolist(), start=[-1, -0.2],
    levels=levels,
)  # fmt: skip

# %% [markdown]
# *Figure 1.12.2. Sixty steps from the lower left; the cross is the lowest
# point. Gradient descent bounces between the walls and creeps along the floor.
# Momentum overshoots but arrives. Adam ignores the steepness, sets off
# diagonally and overshoots less. AdamW turns back before the cross. At a
# learning rate above 0.04 descent would fly apart; Adam would not.*
#
# **Why Adam.** Make the walls a hundred times as steep. Descent must make its
# steps a hundred times as short, or it flies apart, and comes nowhere along
# the floor. Adam divides the steepness out and walks the path it walked
# before.

# %% walls a hundred times as steep
curvature[1] = 5000
stuck = descend(gradient_descent, lr=0.036 / 100)
verdict("descent", distance(stuck[-1]) > 3.5, "is stuck near its start")
compare("Adam", descend(adam, lr=0.2), paths["Adam"], tol=1e-6)
curvature[1] = 50

# %% [markdown]
# **Why decoupled.** Take a thousand weights at 1 whose gradients are pure
# noise of size 0.1, 1 or 10. There is nothing to learn from it, so decay alone
# should move their mean, to $(1 - \eta\lambda)^{300} = 0.74$ in 300 steps.


# %% decay in noise
rng = np.random.default_rng(10)


def fade(method, size):
    w, state = np.ones(1000), SimpleNamespace(m=0, v=0, step=0)
    for step in range(1, 301):
        state.step, g = step, size * rng.normal(size=1000)
        w = method(w, g, state, lr=0.01, decay=0.1)
    return w.mean()


l2, decoupled = ([fade(f, s) for s in (0.1, 1, 10)] for f in (adam_l2, adamw))
print("L2", np.round(l2, 2), "decoupled", np.round(decoupled, 2))
compare("decoupled", decoupled, [0.999**300] * 3, tol=0.03)
verdict("L2", l2[2] - l2[0] > 0.5, "depends on the gradient")

# %% [markdown]
# With L2, weights with small gradients lose almost everything and those with
# large ones almost nothing. Decoupled, all three groups fade alike.
#
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
#
# The numbers in it that all parameters share are computed first, and
# `check_number` refuses a setting that is out of its limits.


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
        rate, beta1, beta2, eps, decay, step = self
        keep, root = 1 - rate * decay, math.sqrt(1 - beta2**step)
        size = rate / (1 - beta1**step)
        return Factors(keep, 1 - beta1, beta2, 1 - beta2, root, eps, size)


# %% one step of AdamW tags=["export"]
@shapes("N!, N, N!, N!")
def adamw_update(params, grads, m, v, settings):
    """Take one step of AdamW, in the order in which torch.optim.AdamW does.

    params, grads, m, v: float, of one shape; params, m and v change in
    place. m and v are the running means of the gradient and of its square,
    zero before the first step. settings: an AdamW; its decay applies to every
    element. Raises ValueError for settings out of range.
    """
    f = settings.factors("adamw_update")
    params *= f.keep
    m += f.new1 * (grads - m)
    v *= f.beta2
    v += f.new2 * grads * grads
    params -= f.size * m / (np.sqrt(v) / f.root + f.eps)


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
# against its purpose. The table of tensors in [chapter 1.13](13_block.ipynb)
# says of each whether it decays.

# %% which tensors decay
from llmnb.model.tensors import decaying

print(*decaying(GPT2Config()))

# %% [markdown]
# ## The schedule
#
# **Warm-up.** In the first steps $\hat v$ rests on a handful of gradients, and
# (1.12.5) moves every parameter by almost $\eta$ however uncertain its
# direction. So the learning rate climbs from near 0 to its peak $\eta_{\max}$
# over the first $S_0$ steps:
#
# $$ \eta_s = \eta_{\max} \frac{s}{S_0} \qquad (s \le S_0) . \tag{1.12.12} $$
#
# **Decline.** Near the end a large step keeps throwing the parameters to and
# fro across the valley; a small one lets them sink. Let $S$ be the number of
# steps in all, and $\rho$ (`u` in the code) run from 0 towards 1 over the
# declining part; the step after the last would have 1. With $\phi$ the share
# of the peak that is left at the end,
#
# $$ \eta_s = \eta_{\max} \bigl( \phi + (1 - \phi)\, f(\rho) \bigr) ,
#    \qquad \rho = \frac{s - 1 - S_0}{S - S_0} , \tag{1.12.13} $$
#
# and the schedules differ in $f$: $\tfrac12 (1 + \cos \pi \rho)$ for
# **cosine**, $1 - \rho$ for **linear**, 1 for **constant**. The fourth,
# **wsd** (warm-up, stable, decay), stays at the peak until 80 % of all steps
# are done and falls over the rest as $f = 1 - \sqrt \rho$, with $0.8\, S$ in
# place of $S_0$ in $\rho$. The rates up to there are the same for any $S$: one
# may decide late when to stop. (A loop counts its steps from 0, so
# `learning_rate` takes $s - 1$.)

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
    u = min(1, max(0, step - start) / max(1, total - start))
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
for kind in KINDS:
    rates = [learning_rate(s, 100, 3, 10, kind, 0.1) for s in range(11)]
    print(f"{kind:9}", " ".join(f"{x:5.1f}" for x in rates))

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
# $$ \lVert g \rVert = \sqrt{\textstyle\sum_i g_i^2} , \qquad
#    g \leftarrow g \cdot \min \Bigl( 1,
#    \frac{g_{\max}}{\lVert g \rVert + 10^{-6}} \Bigr) . \tag{1.12.14} $$
#
# The direction stays. The $10^{-6}$ is PyTorch's, and we follow it. Squares
# are summed in float64, for the sum of 124 million of them has too many digits
# for a float32. Where a gradient is infinite or not a number, so is the norm,
# and (1.12.14) would spoil *every* gradient. We leave them as they are and
# return the norm; the caller decides: skip the step, or stop.


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
    scale = max_norm / (norm + 1e-6)
    if math.isfinite(norm) and scale < 1:
        grads *= scale
    return norm


# %% a long, a short and a broken gradient
for values in ([3.0, 4.0], [0.3, 0.4], [3.0, np.inf]):
    grads = np.array(values)
    norm = clip_gradients(grads, 1.0)
    print(f"norm {norm:3.1f}  {values} becomes {grads.round(4)}")

# %% [markdown]
# What are the two good for? To see what warm-up saves, begin at the lowest
# point of the valley, with noise on every gradient, a thousand runs at once:
# noise shakes the parameters about, and some loss is inevitable. To see what a
# clip saves, go down the valley without noise; one gradient, in step 40, comes
# out a thousand times too long. Rate and $\beta_2$ are those of the race.


# %% losses of a run, or of a thousand
def losses_of(w, noise=0, bad=1, warmup=0, max_norm=math.inf):
    """The mean loss after each of 100 steps; w: (runs, 2), starts."""
    m, v, losses = np.zeros_like(w), np.zeros_like(w), []
    for s in range(1, 101):
        g = curvature * (w - lowest + noise * rng.normal(size=w.shape))
        g *= bad if s == 40 else 1
        clip_gradients(g.ravel(), max_norm)
        rate = learning_rate(s - 1, 0.2, warmup, 100, "constant")
        settings = AdamW(rate, 0.9, 0.99, 1e-8, 0, s)
        adamw_update(w.ravel(), g.ravel(), m.ravel(), v.ravel(), settings)
        losses.append((curvature * (w - lowest) ** 2 / 2).sum(1).mean())
    return np.array(losses)


# %% with and without
noisy = {
    "no warm-up": losses_of(np.tile(lowest, (1000, 1)), noise=1),
    "20 steps": losses_of(np.tile(lowest, (1000, 1)), noise=1, warmup=20),
}
start = np.array([[-1.0, -0.2]])
spoilt = {
    "not clipped": losses_of(start.copy(), bad=1000),
    "clipped at 10": losses_of(start.copy(), bad=1000, max_norm=10),
}

# %% what they save tags=["hide-input"]
peaks = [losses[:60].max() / losses[60:].mean() for losses in noisy.values()]
verdict("warm-up", peaks[1] < 1.25 and peaks[0] > 1.5, "spares a peak")
worst = [losses[40:].max() for losses in spoilt.values()]
verdict("not clipped", worst[0] > 10, "the loss climbs past 10")
last = spoilt["not clipped"][-1] / spoilt["not clipped"][38]
verdict("not clipped", last > 10, "ends 10 times over step 39's")
verdict("clipped", worst[1] < 0.5, "it stays below 0.5")

# %% warm-up and clipping tags=["hide-input"]
fig, axes = plt.subplots(1, 2, figsize=(8, 3.2), dpi=100)
for ax, curves, corner in zip(
    axes, (noisy, spoilt), ("right", "left"), strict=True
):
    for colour, name in zip(("orange", "blue"), curves, strict=True):
        ax.plot(curves[name], color=PALETTE[colour], lw=2, label=name)
    ax.legend(frameon=False, loc=f"lower {corner}")
    ax.set(xlabel="step")
    ax.spines[["top", "right"]].set_visible(False)
axes[0].set(ylabel="loss", ylim=(0, None), title="noise")
axes[1].set(yscale="log", ylim=(1e-5, 100), title="one spoilt gradient")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.12.3. Left, from the lowest point, in noise: without warm-up the
# first steps throw the parameters further out than they are ever again here.
# Right, one gradient a thousand times too long, in step 40: without a clip the
# run loses most of what it had gained and has not recovered sixty steps later;
# with one, it hardly notices.*
#
# **What runs choose.** The numbers of [chapter 1.18](18_training.ipynb) have
# reasons, and that chapter takes three of them away to see what comes of it. A
# $\beta_2$ of 0.95, not 0.999: $v$ looks back over $1/(1 - \beta_2) = 20$ steps
# and not 1000, and soon forgets a spike. Warm-up over 150 of 3,000 steps: many
# times what $v$ needs to come to rest. A clip at 1 touches spikes and the first
# steps; later most runs have shorter gradients. A peak of $5 \cdot 10^{-3}$:
# (1.12.5) moves a weight by little more than $\eta$ at most (a mean is no larger
# than the root of the mean square over the same steps; $m$ looks back over ten,
# $v$ over twenty), and first weights are of size 0.02 ([chapter
# 1.15](15_weights.ipynb)), so four steps in one direction move a weight by its
# own size; larger models take less. A decay of 0.1 takes half of a weight that
# nothing renews in $\log 2 / (\eta \lambda)$ steps, here 1,386 at the peak.
#
# ## Proof
#
# AdamW is a definition, with no gradient to check. What can be checked is that
# ours is PyTorch's. These numbers were computed with `torch.optim.AdamW`
# (PyTorch 2.13.0, float64, six steps, learning rate 0.01, its defaults, decay
# 0.1) for seven parameters and gradients of very different sizes, one being 0.

# %% six steps of PyTorch tags=["hide-input"]
start = [1.0, -0.5, 0.03125, -2.0, 0.0, 8.0, 0.25]
slope = [0.5, -0.25, 2**-10, 0.0, -8.0, 2**-20, 0.125]
factor = [1.0, -0.5, 2.0, 0.25, -1.0, 1.5]
recorded = [
    0.9618985060667378, -0.4648910166476362, -0.0010532051555053666,
    -1.988029960029988, 0.03211647449987729, 7.920308854785162,
    0.21638727282067885,
]  # fmt: skip


def six_steps(update):
    p, g = np.array([start, slope])
    m, v = np.zeros((2, 7))
    for t, f in enumerate(factor, 1):
        update(p, g * f, m, v, AdamW(0.01, weight_decay=0.1, step=t))
    return p


# %% ours and PyTorch's
compare("float64", six_steps(adamw_update), recorded, tol=1e-14)

# %% [markdown]
# Agreement to the last digits is hard to get by chance. Here is a version that
# adds $\epsilon = 10^{-8}$ before the correction, not after:


# %% an optimiser made wrong on purpose
def eps_too_early(p, g, m, v, settings):
    eps = settings.eps / math.sqrt(1 - settings.beta2**settings.step)
    adamw_update(p, g, m, v, settings._replace(eps=eps))


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
# - Decay acts on the weights, not through the gradient, and on matrices and
#   tables only.
# - The learning rate warms up, then declines; the gradient is clipped by its
#   norm over all parameters.
#
# ## Design note
#
# Decay in (1.12.10) is multiplied by the learning rate, as in PyTorch. The
# paper on AdamW leaves the highest rate out, and multiplies decay by the
# schedule's share of it. We keep the common form: the decay of a recipe means
# here what it means there.
#
# ## Exercises
#
# **1** (★★★). Adam has one scale for each *coordinate*. Turn the valley by 45
# degrees, so that neither its floor nor its walls lie along a coordinate. Who
# still arrives after 60 steps?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# Both coordinates now see the steep wall. Both are divided by its size, the
# floor's slope counts for little, and Adam's advantage is gone. Momentum does
# not know what a coordinate is; but for the turned starting point its path is
# the old one.
# :::


# %% exercise 1, the turned valley tags=["hide-cell"]
turn = np.array([[1.0, 1.0], [-1.0, 1.0]]) / np.sqrt(2)


def turned(w, g, state, method, **settings):
    g = turn.T @ (curvature * (turn @ (w - lowest)))
    return method(w, g, state, **settings)


# %% exercise 1, checked
off = [distance(descend(turned, method=adam, lr=0.2)[-1])]
off += [distance(descend(turned, method=momentum, lr=0.02)[-1])]
verdict(
    "Adam", off[0] > 10 * distance(paths["Adam"][-1]), "is 10 times as far"
)
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
