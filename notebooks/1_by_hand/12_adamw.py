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
# *Reading time: 30 minutes. You need: what a gradient is. Neither layers nor
# their gradients are needed.*

# %% [markdown]
# ## Where we are

# %% where we are
from llmnb.book.diagram import gpt2_diagram

gpt2_diagram(lit="adamw")

# %% [markdown]
# *Figure 1.12.1. AdamW is no layer: it stands after the loss. When the
# backward pass has filled every gradient, it changes every parameter.*
#
# The layers so far have produced one gradient for each parameter: the
# direction in which the loss grows. This chapter turns gradients into
# steps. It builds the optimiser, the schedule of its learning rate, and the
# guard against gradients that are too large. At its end you can
#
# - say what momentum, Adam and AdamW each add to gradient descent, and see
#   it on one and the same valley;
# - derive the bias correction and say what goes wrong without it;
# - say why weight decay must not pass through the gradient;
# - compute the learning rate of any step under four schedules;
# - say what a clip saves a run from.
#
# The fast versions: [chapter 2.3](../2_cpu/03_loss.ipynb) and
# [chapter 3.10](../3_gpu/10_adamw.ipynb).

# %% [markdown]
# ## Setup

# %% setup
from types import SimpleNamespace

import matplotlib.pyplot as plt

from llmnb.book.diagram import PALETTE
from llmnb.book.verify import compare, verdict
from llmnb.config import GPT2Config

# %% imports tags=["export"]
import math
from typing import NamedTuple

import numpy as np

from llmnb.shapes import check_number, shapes

# %% the seed
rng = np.random.default_rng(10)

# %% [markdown]
# ## By hand
#
# AdamW keeps two running means for each parameter: $m$ of its gradient and
# $v$ of its squared gradient. Take a parameter at 1 with the gradient 0.5,
# a learning rate $\eta = 0.1$, a weight decay $\lambda = 0.1$, and
# PyTorch's defaults $\beta_1 = 0.9$ and $\beta_2 = 0.999$. In the first step
#
# - decay shrinks the parameter by the factor $1 - 0.1 \cdot 0.1$ to 0.99;
# - $m$ goes from 0 to $0.1 \cdot 0.5 = 0.05$, and $v$ to
#   $0.001 \cdot 0.25 = 0.00025$;
# - both are divided by what they lack so far, 0.1 and 0.001, and become 0.5
#   and 0.25;
# - the parameter moves by $-0.1 \cdot 0.5 / \sqrt{0.25} = -0.1$ to 0.89.
#
# A second parameter, also at 1, has the gradient 0.001. It moves to 0.89
# as well: the size of a gradient cancels, and its sign remains.

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
# | `step` | integer | how many steps with this one, from 1 |
#
# Layers have shapes; the optimiser has none. Every parameter is treated
# alike, so it works on flat arrays, all parameters one after the other.

# %% [markdown]
# ## From gradient descent to AdamW
#
# Four methods, each a few lines, will race in one valley. Its floor slopes
# gently in one direction, and its walls are 50 times as steep:
#
# $$ \mathcal L(w) = \tfrac12 \sum_i a_i (w_i - c_i)^2 , \qquad
#    a = (1, 50) , \quad c = (3, 1) . \tag{1.12.1} $$
#
# The gradient is $g_i = a_i (w_i - c_i)$. The ratio of the largest to the
# smallest curvature, here 50, is the **condition number**; in a network it
# is far larger.

# %% the valley
curvature, lowest = np.array([1.0, 50.0]), np.array([3.0, 1.0])


def descend(method, steps=60, **settings):
    """The points a method visits from (-1, -0.2)."""
    w, state = np.array([-1.0, -0.2]), SimpleNamespace(m=0, v=0, step=0)
    path = [w]
    for _ in range(steps):
        state.step += 1
        w = method(w, curvature * (w - lowest), state, **settings)
        path.append(w)
    return np.array(path)


def report(path):
    distances = np.hypot(*(path - lowest).T)
    for step in (0, 10, 20, 40, 60):
        print(f"step {step:2}  distance {distances[step]:7.4f}")


# %% [markdown]
# ### Gradient descent
#
# Step against the gradient:
#
# $$ w \leftarrow w - \eta\, g . \tag{1.12.2} $$
#
# On (1.12.1) the distance to the lowest point obeys
# $w_i - c_i \leftarrow (1 - \eta a_i)(w_i - c_i)$. Each coordinate shrinks by
# its own factor. The steep one allows no $\eta$ above $2/50 = 0.04$, or
# $|1 - 50 \eta|$ exceeds 1 and the path flies apart. With that $\eta$ the
# gentle one shrinks by the factor $1 - 0.04 = 0.96$ a step. One learning
# rate has to serve both.


# %% gradient descent
def gradient_descent(w, g, state, lr):
    return w - lr * g


paths = {"gradient descent": descend(gradient_descent, lr=0.036)}
report(paths["gradient descent"])

# %% [markdown]
# ### Momentum
#
# Let past gradients count:
#
# $$ m \leftarrow \beta m + g , \qquad
#    w \leftarrow w - \eta\, m . \tag{1.12.3} $$
#
# A gradient that stays the same adds up to
# $g\,(1 + \beta + \beta^2 + \dots) = g / (1 - \beta)$, ten times itself for
# $\beta = 0.9$. A gradient that changes sign at every step comes to
# $g / (1 + \beta)$, about half. So the path gains speed along the floor and
# not across it.


# %% momentum
def momentum(w, g, state, lr, beta=0.9):
    state.m = beta * state.m + g
    return w - lr * state.m


paths["momentum"] = descend(momentum, lr=0.02)
report(paths["momentum"])

# %% [markdown]
# ### Adam
#
# Momentum still has one learning rate for all. Adam gives each parameter
# its own: it divides by the usual size of that parameter's gradient. It
# keeps running *means*, with weights that sum to (nearly) one,
#
# $$ m \leftarrow \beta_1 m + (1 - \beta_1)\, g , \qquad
#    v \leftarrow \beta_2 v + (1 - \beta_2)\, g^2 , \tag{1.12.4} $$
#
# and steps by their ratio:
#
# $$ w \leftarrow w - \eta\, \frac{\hat m}{\sqrt{\hat v} + \epsilon} .
#    \tag{1.12.5} $$
#
# The hats need an explanation. Both means start at 0, and a mean that
# starts at 0 is too small for a while. How much too small? Unroll (1.12.4):
# after $t$ steps
#
# $$ m_t = (1 - \beta_1) \sum_{s=1}^{t} \beta_1^{\,t-s} g_s . \tag{1.12.6} $$
#
# Suppose that all gradients have the same expected value $\bar g$. The
# weights form a geometric series, so
#
# $$ \mathbb E\, m_t = \bar g\, (1 - \beta_1)
#    \sum_{s=1}^{t} \beta_1^{\,t-s} = \bar g\, (1 - \beta_1^{\,t}) ,
#    \tag{1.12.7} $$
#
# because $(1 - \beta)(1 + \beta + \dots + \beta^{t-1}) = 1 - \beta^t$. The
# same holds for $v$ and $g^2$. Dividing by the factor removes the bias:
#
# $$ \hat m = \frac{m}{1 - \beta_1^{\,t}} , \qquad
#    \hat v = \frac{v}{1 - \beta_2^{\,t}} . \tag{1.12.8} $$
#
# In step 1 this gives $\hat m = g$ and $\hat v = g^2$, so that every
# parameter moves by $\eta$, up or down. Without the correction the first
# step would be $\eta \cdot 0.1 / \sqrt{0.001} \approx 3.2\, \eta$. It gets
# worse before it gets better: $m$ has caught up after ten steps or so, while
# $v$ stays too small, and the steps too large, for a thousand. (The race here
# lasts sixty steps, so it takes $\beta_2 = 0.99$, which forgets faster.)

# %% the correction, step by step
steps = np.array([1, 10, 100, 1000, 10000])
ratio = (1 - 0.9**steps) / np.sqrt(1 - 0.999**steps)
for t, r in zip(steps, ratio, strict=True):
    print(f"step {t:5}: uncorrected steps are {r:.2f} times as long")


# %% Adam
def adam(w, g, state, lr, beta1=0.9, beta2=0.99, eps=1e-8):
    state.m = beta1 * state.m + (1 - beta1) * g
    state.v = beta2 * state.v + (1 - beta2) * g**2
    mean = state.m / (1 - beta1**state.step)
    square = state.v / (1 - beta2**state.step)
    return w - lr * mean / (np.sqrt(square) + eps)


paths["Adam"] = descend(adam, lr=0.2)
report(paths["Adam"])

# %% [markdown]
# The $\epsilon$ keeps a parameter whose gradient is always 0 from dividing
# 0 by 0. The rows of the padded vocabulary are such parameters.
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
# $w - \eta g - \eta \lambda w$. In Adam they are not. There $\lambda w$
# passes through the division by $\sqrt{\hat v}$, so a weight with large
# gradients is hardly shrunk, and a weight with small ones collapses. AdamW
# is Adam with (1.12.10), decay **decoupled** from the gradient.


# %% AdamW and the other way
def adamw(w, g, state, lr, decay, **settings):
    return adam((1 - lr * decay) * w, g, state, lr, **settings)


def adam_l2(w, g, state, lr, decay, **settings):
    return adam(w, g + decay * w, state, lr, **settings)


paths["AdamW"] = descend(adamw, lr=0.2, decay=0.1)
report(paths["AdamW"])

# %% [markdown]
# AdamW stays short of the lowest point, and means to: decay pulls towards
# the origin, and the path turns back where that pull is the stronger one.
# (In a valley without noise this is not for ever. The gradient there is
# small and steady, $\sqrt{\hat v}$ shrinks to its size, Adam's pull grows,
# and after the sixty steps the path creeps on to the lowest point. In
# training, noise keeps $\sqrt{\hat v}$ up.)

# %% four trajectories
x, y = np.meshgrid(np.linspace(-1.6, 4.4, 121), np.linspace(-0.6, 2.4, 91))
height = (x - 3) ** 2 / 2 + 25 * (y - 1) ** 2
fig, axes = plt.subplots(2, 2, figsize=(7.6, 5.4), dpi=100)
for ax, (name, path) in zip(axes.flat, paths.items(), strict=True):
    levels = [0.1, 1, 4, 10, 20, 40]
    ax.contour(x, y, height, levels, colors=PALETTE["grey"], linewidths=0.7)
    ax.plot(*path.T, "o-", color=PALETTE["blue"], ms=2.5, lw=1)
    ax.plot(*lowest, "+", color=PALETTE["orange"], ms=14, mew=2.5)
    ax.set_title(name)
    ax.set(xlim=(-1.6, 4.4), ylim=(-0.6, 2.4))
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.12.2. Sixty steps from the lower left; the cross is the lowest
# point. Gradient descent bounces between the walls and creeps along the
# floor. Momentum overshoots but arrives. Adam ignores the steepness and
# sets off diagonally. AdamW does too, and turns back before the cross.*
#
# To see the two decays differ, take parameters whose gradients are pure
# noise, of size 0.1, 1 and 10, a thousand of each. There is nothing to
# learn from them, so decay alone should move their mean.


# %% decay in noise
def fade(method, size, steps=300):
    """The mean of 1000 weights, starting at 1, with noise as gradient."""
    w, state = np.ones(1000), SimpleNamespace(m=0, v=0, step=0)
    means = [1.0]
    for _ in range(steps):
        state.step += 1
        noise = size * rng.normal(size=1000)
        w = method(w, noise, state, lr=0.01, decay=0.1)
        means.append(w.mean())
    return np.array(means)


sizes = 0.1, 1, 10
faded = {f: [fade(f, s) for s in sizes] for f in (adam_l2, adamw)}
law = (1 - 0.01 * 0.1) ** np.arange(301)
compare("AdamW, all sizes", faded[adamw], [law] * 3, tol=0.03)
spread = faded[adam_l2][2][-1] - faded[adam_l2][0][-1]
verdict("L2 by size", spread > 0.5, "ends more than 0.5 apart")

# %% draw it
fig, axes = plt.subplots(1, 2, figsize=(7.6, 3.4), dpi=100, sharey=True)
looks = zip(("blue", "orange", "green"), ("-", "--", ":"), strict=True)
looks = [{"color": PALETTE[c], "ls": ls, "lw": 2} for c, ls in looks]
titles = {adam_l2: "L2 through the gradient", adamw: "decoupled"}
for ax, (method, title) in zip(axes, titles.items(), strict=True):
    for size, means, look in zip(sizes, faded[method], looks, strict=True):
        ax.plot(means, label=f"gradients of size {size}", **look)
    ax.set(title=title, xlabel="step", ylim=(0, 1.05))
    ax.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("mean weight")
axes[1].legend(frameon=False, loc="lower left")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.12.3. With L2 the weights whose gradients are small lose almost
# everything and those whose gradients are large lose almost nothing. With
# decoupled decay all three groups follow one curve.*
#
# ### The function
#
# It does (1.12.10), (1.12.4), (1.12.8) and (1.12.5), in the order in which
# PyTorch's `torch.optim.AdamW` does them, so that both give the same
# numbers. Mathematics leaves some freedom here, and rounding does not:
# PyTorch moves $m$ by $(1 - \beta_1)(g - m)$, corrects $v$ *after* the root,
# adds $\epsilon$ to the corrected root, and folds the correction of $m$ into
# the learning rate:
#
# $$ w \leftarrow w - \frac{\eta}{1 - \beta_1^{\,t}} \cdot
#    \frac{m}{\sqrt v \,/ \sqrt{1 - \beta_2^{\,t}} + \epsilon} .
#    \tag{1.12.11} $$
#
# Seven numbers in it are the same for all parameters. They are computed first,
# from the settings of the step.


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

# %% the valley through the function
w, m, v = np.array([-1.0, -0.2]), np.zeros(2), np.zeros(2)
path = [w.copy()]
for step in range(1, 61):
    slope = curvature * (w - lowest)
    settings = AdamW(0.2, 0.9, 0.99, 1e-8, 0.1, step)
    adamw_update(w, slope, m, v, settings)
    path.append(w.copy())
compare("same path", path, paths["AdamW"], tol=1e-10)

# %% [markdown]
# ## Which tensors decay
#
# Decay belongs to weights that multiply their input: the matrices, and the
# two tables that the encoder reads. A bias, or LayerNorm's scale and shift,
# moves or rescales a whole channel; to pull a scale of 1 towards 0 would
# work against its purpose. In a single layer these are the tensors with one
# dimension. Ours are stacked over the L layers, so that `ln1w` has shape
# (L, C), and counting dimensions would mislead. So the table of tensors
# ([chapter 1.13](13_block.ipynb)) says of each whether it decays.

# %% which tensors decay
from llmnb.model.tensors import decaying

print(*decaying(GPT2Config()))

# %% how many parameters that is
cfg = GPT2Config()
L, C, Vp = cfg.num_layers, cfg.channels, cfg.padded_vocab_size
matrices = (Vp + cfg.max_seq_len) * C + 12 * L * C * C
vectors = (2 + 2 + 3 + 1 + 4 + 1) * L * C + 2 * C
print(f"decayed     {matrices:11,}")
print(f"not decayed {vectors:11,}  {vectors / (matrices + vectors):.2%}")

# %% [markdown]
# ## The schedule
#
# **Warm-up.** In the first steps $\hat v$ rests on a handful of gradients,
# and (1.12.5) moves every parameter by almost $\eta$ however uncertain its
# direction. So the learning rate climbs from near 0 to its peak
# $\eta_{\max}$ over the first $W$ steps. With steps counted from 0, step
# $s$ gets
#
# $$ \eta_s = \eta_{\max} \frac{s + 1}{W} \qquad (s < W) . \tag{1.12.12} $$
#
# **Decline.** Near the end a large step keeps throwing the parameters to
# and fro across the valley; a small one lets them sink. Let $S$ be the
# number of steps in all, and $u$ run from 0 to 1 over the declining part.
# With $f$ the fraction of the peak that is left at the end, in step $S$,
# the first that is not taken,
#
# $$ \eta_s = \eta_{\max} \bigl( f + (1 - f)\, d(u) \bigr) , \qquad
#    u = \frac{s - W}{S - W} , \tag{1.12.13} $$
#
# and the schedules differ in $d$: $\tfrac12 (1 + \cos \pi u)$ for
# **cosine**, $1 - u$ for **linear**, 1 for **constant**. The fourth,
# **wsd** (warm-up, stable, decay), stays at the peak until 80 % of all
# steps, $D = \lfloor 0.8\, S \rfloor$, and then falls as
# $d(u) = 1 - \sqrt u$ with $u = (s - D) / (S - D)$. The rates of its long
# flat part do not depend on $S$: one may decide late when to stop.

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


# %% ten steps of each
for kind in KINDS:
    rates = [learning_rate(s, 100, 3, 10, kind, 0.1) for s in range(11)]
    print(f"{kind:9}", " ".join(f"{x:5.1f}" for x in rates))

# %% four schedules
fig, ax = plt.subplots(figsize=(6.4, 3.6), dpi=100)
looks = ("blue", "-"), ("orange", "--"), ("grey", "-."), ("green", ":")
for kind, (colour, line) in zip(KINDS, looks, strict=True):
    rates = [learning_rate(s, 1, 100, 1000, kind, 0.1) for s in range(1000)]
    ax.plot(rates, line, color=PALETTE[colour], lw=2, label=kind)
ax.set(xlabel="step", ylabel="fraction of the peak", ylim=(0, 1.08))
ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.12, 0))
ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.12.4. All four schedules climb for 100 steps. Cosine and linear
# then spend the rest of the run on the way down, wsd only its last fifth;
# here all but the constant one end at a tenth of the peak.*
#
# To see what warm-up saves, begin at the lowest point of the valley, with
# noise on every gradient, a thousand runs at once. There is nothing to gain,
# and some loss is inevitable: noise shakes the parameters about. But the
# first steps need not make it worse than it will stay.


# %% the first steps, with and without warm-up
def shaken(warmup, steps=60):
    """The mean loss after each step, from the lowest point, in noise."""
    w = np.tile(lowest, (1000, 1))
    m, v, losses = np.zeros_like(w), np.zeros_like(w), []
    for s in range(steps):
        g = curvature * (w - lowest + rng.normal(size=w.shape))
        rate = learning_rate(s, 0.2, warmup, steps, "constant")
        settings = AdamW(rate, 0.9, 0.99, 1e-8, 0, s + 1)
        adamw_update(w.ravel(), g.ravel(), m.ravel(), v.ravel(), settings)
        losses.append((curvature * (w - lowest) ** 2 / 2).sum(1).mean())
    return np.array(losses)


for warmup, limit in ((0, "above"), (20, "below")):
    losses = shaken(warmup)
    worse = losses.max() > 1.4 * losses[-1]
    claim = f"peaks {limit} 1.4 times its end"
    verdict(f"warm-up {warmup}", worse == (warmup == 0), claim)

# %% [markdown]
# ## Clipping
#
# Now and then a batch has a gradient many times as long as usual. Adam's
# division does not tame it: with $\beta_2 = 0.999$ a tenth of the spike
# enters $m$, but only $\sqrt{0.001}$, three hundredths, enters $\sqrt v$.
# The next steps follow the spike, at about three times the usual length;
# and $v$ remembers it for some $1 / (1 - \beta_2)$ steps, in which ordinary
# gradients hardly count.
#
# **Clipping** measures the length of the gradient of *all* parameters taken
# as one vector, the **global norm**, and shortens it to a given $c$ when it
# is longer:
#
# $$ \lVert g \rVert = \sqrt{\textstyle\sum_i g_i^2} , \qquad
#    g \leftarrow g \cdot \min \Bigl( 1,
#    \frac{c}{\lVert g \rVert + 10^{-6}} \Bigr) . \tag{1.12.14} $$
#
# The direction stays. The $10^{-6}$ is PyTorch's, and we follow it. Squares
# are summed in float64: the sum of 124 million squares has too many digits
# for a float32, and the square of a number above $2 \cdot 10^{19}$ overflows
# it.
#
# What if a gradient is infinite or not a number? Then so is the norm, and
# (1.12.14) would multiply *every* gradient by 0 or by NaN. We leave the
# gradients as they are and return the norm. The caller looks at it and
# decides: skip the step, or stop.


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
# What is it good for? Adam goes down the valley once more, and one gradient
# on the way, in step 40, comes out a thousand times too long.


# %% one spoilt gradient
def spoilt(max_norm, steps=100):
    """The distance from the lowest point after a run with one bad step."""
    w, m, v = np.array([-1.0, -0.2]), np.zeros(2), np.zeros(2)
    for step in range(1, steps + 1):
        g = curvature * (w - lowest) * (1000 if step == 40 else 1)
        clip_gradients(g, max_norm)
        adamw_update(w, g, m, v, AdamW(0.2, 0.9, 0.99, 1e-8, 0, step))
    return np.hypot(*(w - lowest))


apart = spoilt(math.inf) / spoilt(60)
verdict("no clip", apart > 20, "ends more than 20 times as far")

# %% [markdown]
# **What runs choose.** Language models are commonly trained with
# $\beta_2 = 0.95$ in place of 0.999: $v$ then looks back over 20 steps and not
# 1000, so that a spike is soon forgotten. Clipping at 1 touches the first
# steps and the spikes, because later the norm of most runs lies below. A
# decay of 0.1 gives a weight that nothing renews a half-life of
# $\ln 2 / (\eta \lambda)$ steps, 11,552 at a rate of $6 \cdot 10^{-4}$, and so
# hardly touches a short run. The peak rate has no such reason behind it: one
# tries.

# %% [markdown]
# ## Proof
#
# There is no gradient to check here: AdamW is a definition. What can be
# checked is that ours is PyTorch's. These numbers were computed with
# `torch.optim.AdamW` (PyTorch 2.13.0, float64, six steps, learning rate
# 0.01, betas 0.9 and 0.999, epsilon 1e-8, decay 0.1) for seven parameters
# and gradients of very different sizes, one of them 0.

# %% six steps of PyTorch
start = [1.0, -0.5, 0.03125, -2.0, 0.0, 8.0, 0.25]
slope = [0.5, -0.25, 2**-10, 0.0, -8.0, 2**-20, 0.125]
factor = [1.0, -0.5, 2.0, 0.25, -1.0, 1.5]
recorded = [
    0.9618985060667378, -0.4648910166476362, -0.0010532051555053666,
    -1.988029960029988, 0.03211647449987729, 7.920308854785162,
    0.21638727282067885,
]  # fmt: skip


def six_steps(update, dtype=np.float64):
    p, g = np.array([start, slope], dtype)
    m, v = np.zeros((2, 7), dtype)
    for t, f in enumerate(factor, 1):
        scaled = g * dtype(f)
        update(p, scaled, m, v, AdamW(0.01, weight_decay=0.1, step=t))
    return p


# %% ours and PyTorch's
compare("float64", six_steps(adamw_update), recorded, tol=1e-14)
compare("float32", six_steps(adamw_update, np.float32), recorded, tol=1e-6)

# %% [markdown]
# Agreement to the last digits has to be hard to get by chance. Here is a
# version that adds $\epsilon = 10^{-8}$ before the correction rather than
# after, and one with L2 for decay:


# %% two optimisers made wrong on purpose
def eps_too_early(p, g, m, v, settings):
    f = settings.factors("eps_too_early")
    p *= f.keep
    m += f.new1 * (g - m)
    v += f.new2 * (g * g - v)
    p -= f.size * m / ((np.sqrt(v) + f.eps) / f.root)


def with_l2(p, g, m, v, settings):
    g = g + settings.weight_decay * p
    adamw_update(p, g, m, v, settings._replace(weight_decay=0))


for name, wrong in (("eps", eps_too_early), ("L2", with_l2)):
    try:
        compare(name, six_steps(wrong), recorded, tol=1e-14)
        caught = False
    except AssertionError:
        caught = True
    verdict(f"{name} mistake", caught, "is caught")


# %% [markdown]
# ## Count it
#
# AdamW remembers two numbers for each parameter, as much again as the
# parameter and its gradient. For each parameter an update reads four numbers,
# writes three, and does about 14 operations.

# %% numbers for GPT-2
total = matrices + vectors
print(f"parameters        {total:,}")
print(f"m and v, float32  {8 * total / 1e9:.3f} GB")

# %% [markdown]
# ## Take away
#
# - Momentum adds up what the gradients agree on. Adam divides by their
#   usual size, so that each parameter moves by about the learning rate.
# - Means that start at 0 must be divided by $1 - \beta^t$.
# - Decay acts on the weights, not through the gradient, and on matrices and
#   tables only.
# - The learning rate warms up, then declines; the gradient is clipped by its
#   norm over all parameters.
# - The learning rate warms up, then declines; the gradient is clipped by its
#   norm over all parameters.

# %% [markdown]
# ## Design note
#
# Decay in (1.12.10) is multiplied by the learning rate, as PyTorch does it, so
# it fades out with the schedule. The paper on AdamW multiplies it by the
# schedule's fraction only, not by the peak. Under that convention the best
# $\lambda$ depends less on the learning rate; under ours, the one in common
# use, a number found in somebody's recipe means the same here.

# %% [markdown]
# ## Exercises
#
# **1** (★★). Multiply the loss (1.12.1) by 1000. What happens to Adam's path,
# and what to that of gradient descent? Show that one path stays the same.
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# $m$ becomes 1000 times as large and $\sqrt v$ too; their ratio, and with
# it Adam's path, stays the same, but for $\epsilon$. Gradient descent steps
# 1000 times as far and flies apart. This is why the loss may be a sum or a
# mean for Adam, and why clipping that scaled *every* gradient of a run by
# one factor would do nothing to it.
# :::

# %% exercise 1, checked tags=["hide-cell"]
curvature *= 1000
compare("Adam", descend(adam, lr=0.2), paths["Adam"], tol=1e-6)
steep = descend(gradient_descent, steps=5, lr=0.036)
curvature /= 1000
away = np.hypot(*(steep[5] - lowest))
verdict("gradient descent", away > 1e6, "flies apart")

# %% [markdown]
# **2** (★★★). Adam has one scale for each *coordinate*. Turn the valley by
# 45 degrees, so that neither its floor nor its walls lie along a
# coordinate. Who still arrives after 60 steps?
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# Both coordinates now see the steep wall, so both get the same small step,
# and Adam's advantage is gone. Momentum does not know what a coordinate is;
# but for the turned starting point its path is the old one.
# :::


# %% exercise 2, the turned valley tags=["hide-cell"]
def turned(method, steps=60, **settings):
    turn = np.array([[1.0, 1.0], [-1.0, 1.0]]) / np.sqrt(2)
    w, state = np.array([-1.0, -0.2]), SimpleNamespace(m=0, v=0, step=0)
    for _ in range(steps):
        state.step += 1
        g = turn.T @ (curvature * (turn @ (w - lowest)))
        w = method(w, g, state, **settings)
    return np.hypot(*(w - lowest))


# %% exercise 2, checked
straight = np.hypot(*(paths["Adam"][-1] - lowest))
verdict("Adam", turned(adam, lr=0.2) > 10 * straight, "is 10 times as far off")
verdict("momentum", turned(momentum, lr=0.02) < 0.1, "still arrives")

# %% [markdown]
# ## Further reading
#
# - Goh (2017), [Why Momentum Really Works](https://distill.pub/2017/momentum/):
#   the quadratic of this chapter worked out in full, to be played with.
# - Kingma and Ba (2014),
#   [Adam](https://arxiv.org/abs/1412.6980): section 3 for the bias
#   correction.
# - Loshchilov and Hutter (2017),
#   [Decoupled Weight Decay Regularization](https://arxiv.org/abs/1711.05101):
#   section 2 for the difference that figure 1.12.3 shows.
# - Pascanu, Mikolov and Bengio (2012),
#   [On the Difficulty of Training Recurrent Neural Networks](https://arxiv.org/abs/1211.5063):
#   where clipping by the norm comes from, with pictures of the cliffs.
# - Hägele et al. (2024),
#   [Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations](https://arxiv.org/abs/2405.18392):
#   the schedule that stays flat and falls as one minus a root.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("1.12")
