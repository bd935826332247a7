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
#       cpu.adamw: "AdamW and clipping, compiled for the processor's cores."
#       cuda.adamw: "AdamW and clipping on a GPU."
# ---

# %% [markdown]
# # Step downhill with AdamW
#
# > AdamW divides each parameter's averaged gradient by its usual size and
# > shrinks the parameter itself; a schedule sets the pace, a clip bounds it.

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
# - update 124 million parameters in the time that memory needs to move them;
# - sum 124 million squares on a GPU in one order, and say how new settings
#   reach launches that were recorded.
#
# You need the `kernel` decorator from [chapter 1.5](05_encoder.ipynb); for the
# section on a GPU also [chapter 3.1](../3_gpu/01_threads.ipynb). Neither layers nor their
# gradients are needed.

# %% [markdown]
# ## Setup

# %% setup
from types import SimpleNamespace

import matplotlib.pyplot as plt

from llmnb.config import GPT2Config
from llmnb.book.diagram import PALETTE
from llmnb.timing import fastest, machine
from llmnb.book.verify import compare, verdict

# %% imports tags=["export"]
import math

import numpy as np

from llmnb.shapes import shapes

# %% the seed
rng = np.random.default_rng(10)

# %% [markdown]
# ## By hand
#
# AdamW keeps two running means for each parameter: $m$ of its gradient and
# $v$ of its squared gradient. Take a parameter at 1 with the gradient 0.5,
# a learning rate $\eta = 0.1$, a weight decay $\lambda = 0.1$, and the
# usual $\beta_1 = 0.9$, $\beta_2 = 0.999$. In the first step
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
# alike, so it works on flat arrays, as [chapter 1.13](13_memory.ipynb) lays
# them out: all parameters one after the other.

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
# step would be
# $\eta \cdot 0.1 / \sqrt{0.001} \approx 3.2\, \eta$, and for a thousand
# steps $v$ would be too small, and the steps too large. (The race below lasts
# sixty steps, so it takes $\beta_2 = 0.99$, which forgets faster.)

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
# A model generalises better when its weights stay small. **Weight decay**
# shrinks them a little at every step. There are two ways to write it. The
# first adds $\tfrac{\lambda}{2} \sum w^2$ to the loss, hence $\lambda w$ to
# the gradient ("L2"):
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


# %% the settings tags=["exporti"]
ADAMW_LIMITS = {
    "learning_rate": "at least 0",
    "beta1": "in [0, 1)",
    "beta2": "in [0, 1)",
    "eps": "above 0",  # a gradient that is always 0 would divide 0 by 0
    "weight_decay": "at least 0",
    "step": "at least 1",
}


# %% one step of AdamW tags=["export"]
@shapes("N!, N, N!, N!", **ADAMW_LIMITS)
def adamw_update(
    params, grads, m, v,
    learning_rate, beta1, beta2, eps, weight_decay, step,
):  # fmt: skip
    """Take one step of AdamW, in the order in which torch.optim.AdamW does.

    params, grads, m, v: float, of one shape; params, m and v change in
    place. m and v are the running means of the gradient and of its square,
    zero before the first step. step counts from 1. weight_decay applies to
    every element. Raises ValueError for settings out of range.
    """
    correction1 = 1 - beta1**step
    correction2 = 1 - beta2**step
    params *= 1 - learning_rate * weight_decay
    m += (1 - beta1) * (grads - m)
    v *= beta2
    v += (1 - beta2) * grads * grads
    spread = np.sqrt(v) / math.sqrt(correction2) + eps
    params -= learning_rate / correction1 * m / spread


# %% the two parameters through the function
p, m, v = np.ones(2), np.zeros(2), np.zeros(2)
adamw_update(p, g, m, v, 0.1, 0.9, 0.999, 1e-8, 0.1, step=1)
compare("by hand", p, [0.89, 0.89], tol=1e-5)

# %% the valley through the function
w, m, v = np.array([-1.0, -0.2]), np.zeros(2), np.zeros(2)
path = [w.copy()]
for step in range(1, 61):
    slope = curvature * (w - lowest)
    adamw_update(w, slope, m, v, 0.2, 0.9, 0.99, 1e-8, 0.1, step)
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
# (L, C), and counting dimensions would mislead. We decide by name.

# %% imports of the schedule tags=["export"] module="train.schedule"
import math

# %% which tensors decay tags=["export"] module="train.schedule"
MATRICES = ("wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw")
VECTORS = (
    "ln1w", "ln1b", "qkvb", "attprojb", "ln2w", "ln2b", "fcb", "fcprojb",
    "lnfw", "lnfb",
)  # fmt: skip


def decayed(name):
    """Whether weight decay applies to the parameter tensor of this name.

    True for the matrices and the two tables, False for biases and for
    LayerNorm's scales and shifts. Raises ValueError for another name.
    """
    if name not in MATRICES + VECTORS:
        raise ValueError(f"decayed: no tensor is called {name!r}")
    return name in MATRICES


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
looks = zip(
    KINDS,
    ("blue", "orange", "grey", "green"),
    ("-", "--", "-.", ":"),
    strict=True,
)
for kind, colour, line in looks:
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
# ## Proof
#
# There is no gradient to check here: AdamW is a definition. What can be
# checked is that ours is PyTorch's. The numbers below were computed with
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
        update(p, scaled, m, v, 0.01, 0.9, 0.999, 1e-8, 0.1, t)
    return p


# %% ours and PyTorch's
compare("float64", six_steps(adamw_update), recorded, tol=1e-14)
compare("float32", six_steps(adamw_update, np.float32), recorded, tol=1e-6)

# %% [markdown]
# Agreement to the last digits has to be hard to get by chance. Here is a
# version that adds $\epsilon = 10^{-8}$ before the correction rather than
# after, and one with L2 for decay:


# %% two optimisers made wrong on purpose
def eps_too_early(p, g, m, v, lr, beta1, beta2, eps, decay, t):
    p *= 1 - lr * decay
    m += (1 - beta1) * (g - m)
    v += (1 - beta2) * (g * g - v)
    spread = (np.sqrt(v) + eps) / math.sqrt(1 - beta2**t)
    p -= lr / (1 - beta1**t) * m / spread


def with_l2(p, g, m, v, lr, beta1, beta2, eps, decay, t):
    adamw_update(p, g + decay * p, m, v, lr, beta1, beta2, eps, 0, t)


for name, wrong in (("eps", eps_too_early), ("L2", with_l2)):
    try:
        compare(name, six_steps(wrong), recorded, tol=1e-14)
        caught = False
    except AssertionError:
        caught = True
    verdict(f"{name} mistake", caught, "is caught")

# %% [markdown]
# ## Fast on a CPU
#
# NumPy's update makes a dozen passes over arrays as large as the model, most
# of them to write a temporary and read it back. But each parameter needs
# only its own four numbers, and a loop can do all its arithmetic while they
# are in registers.

# %% keep the NumPy versions
reference = SimpleNamespace(
    update=adamw_update, norm=global_norm, clip=clip_gradients
)

# %% imports of the kernels tags=["export"] module="cpu.adamw"
import math

import numba
import numpy as np

from llmnb.cpu.jit import arguments, share, team
from llmnb.reference.adamw import ADAMW_LIMITS
from llmnb.shapes import shapes

# %% [markdown]
# Elements do not meet, so each thread takes a share of them, and the array
# may be cut anywhere. That the bits do not depend on the cut
# is owed to `kernel`: it asks for exact division
# ([chapter 1.5](05_encoder.ipynb)), and exact square roots come with it, so
# an element is rounded alike in a vector and in the rest that is left over
# at the end of a thread's share.


# %% the kernel tags=["exporti"] module="cpu.adamw"
@team
def _adamw_update(part, parts, address):
    params, grads, m, v, numbers = arguments(address)
    keep, rate1, beta2, rate2, root, eps, size = numbers
    mine = share(params.size, part, parts)
    params, grads, m, v = params[mine], grads[mine], m[mine], v[mine]
    for i in range(params.size):
        g = grads[i]
        m[i] += rate1 * (g - m[i])
        v[i] = beta2 * v[i] + rate2 * g * g
        spread = math.sqrt(v[i]) / root + eps
        params[i] = keep * params[i] - size * m[i] / spread


# %% [markdown]
# All that does not depend on the element is computed once, in Python's
# float64, and passed in the array's dtype, so that no float64 enters the
# loop. PyTorch does the same.


# %% one step of AdamW tags=["export"] module="cpu.adamw"
@shapes("N!, N, N!, N!", **ADAMW_LIMITS)
def adamw_update(
    params, grads, m, v,
    learning_rate, beta1, beta2, eps, weight_decay, step,
):  # fmt: skip
    """Take one step of AdamW, in the order in which torch.optim.AdamW does.

    params, grads, m, v: float32 or float64, flat, of one length; params, m
    and v change in place. m and v are the running means of the gradient and
    of its square, zero before the first step. step counts from 1.
    weight_decay applies to every element. Raises TypeError or ValueError
    for a wrong dtype or shape and for settings out of range.
    """
    keep = 1 - learning_rate * weight_decay
    root = math.sqrt(1 - beta2**step)
    size = learning_rate / (1 - beta1**step)
    numbers = (keep, 1 - beta1, beta2, 1 - beta2, root, eps, size)
    numbers = tuple([params.dtype.type(x) for x in numbers])
    _adamw_update(params, grads, m, v, numbers)


# %% [markdown]
# The norm is one long sum, and a sum in another order is another sum. Again
# the pieces must not depend on the threads: 256 of them, their bounds set
# by the length alone, each summed by one thread; then the 256 sums, in
# a fixed order. The kernel is compiled under the promise that no NaN occurs
# ([chapter 1.5](05_encoder.ipynb)), and a gradient may break it; but products
# and sums hand a NaN on whatever was promised, and the verdict below sees to
# it that they do. The question itself, `math.isfinite`, is asked in Python.


# %% the sum of squares tags=["exporti"] module="cpu.adamw"
@team
def _sum_of_squares(part, parts, address):
    grads, sums = arguments(address)
    length = (grads.size + sums.size - 1) // sums.size
    for k in range(part, sums.size, parts):
        piece = grads[k * length : (k + 1) * length]
        total = 0.0
        for i in range(piece.size):
            x = np.float64(piece[i])
            total += x * x
        sums[k] = total


@team
def _scale(part, parts, address):
    grads, factor = arguments(address)
    mine = grads[share(grads.size, part, parts)]
    for i in range(mine.size):
        mine[i] *= factor


# %% the norm of all gradients tags=["export"] module="cpu.adamw"
@shapes("N")
def global_norm(grads):
    """The Euclidean norm of a flat array, summed in float64, as a float.

    The sum is taken over 256 pieces whose bounds depend on the length alone
    and then over the pieces, so that the number of threads does not change
    it. Raises TypeError or ValueError unless `grads` is flat and
    float32 or float64.
    """
    sums = np.empty(256)
    _sum_of_squares(grads, sums)
    return math.sqrt(sums.sum())


# %% clip the gradients tags=["export"] module="cpu.adamw"
@shapes("N!, above 0")
def clip_gradients(grads, max_norm):
    """Scale a flat array down to norm `max_norm` if it is longer.

    Returns the norm before clipping and scales `grads` in place by
    max_norm / (norm + 1e-6) where that is below 1, as torch's
    clip_grad_norm_. When the norm is infinite or NaN, `grads` is left as it
    is: the caller sees the norm and decides. Raises ValueError unless
    max_norm is positive, and as `global_norm` does.
    """
    norm = global_norm(grads)
    scale = max_norm / (norm + 1e-6)
    if math.isfinite(norm) and scale < 1:
        _scale(grads, grads.dtype.type(scale))
    return norm


# %% the same numbers from the kernels
cpu = SimpleNamespace(
    update=adamw_update, norm=global_norm, clip=clip_gradients
)
compare("float64", six_steps(cpu.update), recorded, tol=1e-14)
compare("float32", six_steps(cpu.update, np.float32), recorded, tol=1e-6)
grads = rng.normal(size=100_003).astype(np.float32)
compare("norm", cpu.norm(grads), reference.norm(grads), tol=1e-12)
grads[77] = np.nan
before = grads.copy()
verdict("NaN", math.isnan(cpu.clip(grads, 1.0)), "is reported")
same = np.array_equal(grads, before, equal_nan=True)
verdict("gradients", same, "are left alone")


# %% one thread and many
def five_steps(threads, n=100_003):
    stream = np.random.default_rng(1)
    p, g = stream.normal(size=(2, n)).astype(np.float32)
    m, v = np.zeros((2, n), np.float32)
    numba.set_num_threads(threads)
    for t in range(1, 6):
        clip_gradients(g, 1.0)
        adamw_update(p, g, m, v, 0.01, 0.9, 0.95, 1e-8, 0.1, t)
        g += p
    return p


most = numba.get_num_threads()
same = np.array_equal(five_steps(1), five_steps(most))
verdict("threads", same, "do not change a bit")
try:
    adamw_update(grads, grads, grads, grads[:5], 0.1, 0.9, 0.9, 1e-8, 0, 1)
except ValueError as error:
    print(error)

# %% NumPy against the kernel tags=["nbval-ignore-output"]
n = 1 << 24
params, grads, m, v = np.ones((4, n), np.float32)
arrays = params, grads, m, v, 1e-3, 0.9, 0.95, 1e-8, 0.1, 5
slow = fastest(reference.update, *arrays, runs=3)
fast = fastest(cpu.update, *arrays)
print(f"{machine()}, {numba.get_num_threads()} threads")
print(f"NumPy   {slow * 1e3:7.1f} ms for {n / 1e6:.1f} M parameters")
print(f"kernel  {fast * 1e3:7.1f} ms, {slow / fast:.1f} times as fast")

# %% [markdown]
# ## On a GPU
#
# The update is bound by memory here as there: 28 bytes for some 14
# operations. Elements do not meet, so each may have a thread of its own.
# The norm is another matter, because all elements meet in one sum. And one
# thing is new: the numbers that change from step to step have to reach the
# GPU.
#
# No GPU has run these kernels yet. They run on the simulator; they are
# compiled for two generations, sm_80 and sm_90, and what the compiler made
# of them is checked.

# %% imports of the GPU's kernels tags=["export"] module="cuda.adamw"
import math
from functools import partial

import numpy as np

from llmnb.cuda.elementwise import by_element, by_four
from llmnb.gpu.launch import (
    DEVICE,
    aligned,
    device,
    empty,
    kernel,
    numbered,
    to_host,
)
from llmnb.gpu.simulator import cuda, load4, store4
from llmnb.gpu.warp import block_sum
from llmnb.reference.adamw import ADAMW_LIMITS
from llmnb.shapes import shapes

# %% sizes tags=["exporti"] module="cuda.adamw"
BLOCK = 256  # threads
WARPS = 8  # of them in a block
SETTINGS = 8  # numbers: seven of AdamW, and one to fill two vectors
NORM_BLOCKS = 1024  # blocks at most that sum squares
ZERO, ONE = np.float32(0), np.float32(1)
TINY = np.float32(1e-6)  # (1.12.14)
LARGEST = float(np.finfo(np.float32).max)
EXPONENT = np.int32(0x7F800000)  # the bits of a float32's exponent


# %% [markdown]
# ### The settings of a step
#
# A training step launches hundreds of kernels, and each launch costs the
# CPU some time. A *CUDA graph* is the cure: the launches are recorded once,
# with all their arguments, and then launched again as one. But an argument
# that is a number is recorded with its value. Every later step would
# run with the learning rate of the step that was recorded.
#
# An argument that is an array is recorded as an address. So the settings
# travel in a small array: the host writes a step's numbers there, and then
# launches the graph, in which nothing has changed.
#
# The numbers are computed on the host, in float64, because a float32 would
# lose digits on the way: $\beta_2 = 0.999$ is so close to 1 that the
# difference $1 - \beta_2$ keeps 14 of its 24 bits. Rounding comes last.


# %% the settings tags=["export"] module="cuda.adamw"
def adamw_scratch():
    """The number of floats that `adamw_update` wants as `work`."""
    return SETTINGS


@shapes("-", DEVICE, **ADAMW_LIMITS)
def adamw_settings(
    learning_rate, beta1, beta2, eps, weight_decay, step
):  # fmt: skip
    """What AdamW's kernel wants to know of a step, as a float32 array.

    It is computed in float64 and rounded at the end. Copy it to the device
    for `adamw_apply`. Raises ValueError for settings out of range.
    """
    keep = 1 - learning_rate * weight_decay
    root = math.sqrt(1 - beta2**step)
    size = learning_rate / (1 - beta1**step)
    numbers = keep, 1 - beta1, beta2, 1 - beta2, root, eps, size, 0
    return np.array(numbers, np.float32)


# %% rounded last, and rounded first
beta2 = np.float32(0.999)
exact = 1 - 0.999
late = float(adamw_settings(0.1, 0.9, 0.999, 1e-8, 0, 1)[3])
early = float(1 - beta2)
verdict("rounded last", abs(late / exact - 1) < 6e-8, "errs below 6e-8")
verdict("rounded first", abs(early / exact - 1) > 1e-5, "errs above 1e-5")


# %% [markdown]
# ### Version 1: a thread an element
#
# A thread reads four numbers, computes, and writes three. It reads the
# seven settings as well; all threads of a warp read the same ones, so each
# of these requests is for one sector, which a cache holds.


# %% AdamW of one element tags=["exporti"] module="cuda.adamw"
@device
def _adamw(p, g, m, v, settings):
    keep, rate1, beta2, rate2, root, eps, size = settings
    m += rate1 * (g - m)
    v = beta2 * v + rate2 * g * g
    spread = math.sqrt(v) / root + eps
    return keep * p - size * m / spread, m, v


@device
def _adamw_at(i, params, grads, m, v, settings):
    p, m1, v1 = _adamw(params[i], grads[i], m[i], v[i], settings)
    params[i], m[i], v[i] = p, m1, v1


# %% version 1 tags=["exporti"] module="cuda.adamw"
@kernel
def _adamw_elements(params, grads, m, v, settings):
    i = cuda.grid(1)
    if i < params.size:
        keep, rate1, beta2 = settings[0], settings[1], settings[2]
        rate2, root, eps = settings[3], settings[4], settings[5]
        numbers = keep, rate1, beta2, rate2, root, eps, settings[6]
        _adamw_at(i, params, grads, m, v, numbers)


# %% [markdown]
# ### Version 2: four elements at once
#
# As for GELU ([chapter 1.9](09_gelu.ipynb)): the bytes cannot be fewer, the
# requests can. Each thread takes four neighbours, and the settings come in
# two vectors as well, which is why there is an eighth. Up to three elements
# at the end get a thread each. A view that begins at no multiple of 16 bytes
# goes to version 1.


# %% version 2 tags=["exporti"] module="cuda.adamw"
@kernel
def _adamw_fours(params, grads, m, v, settings):
    i, fours = cuda.grid(1), params.size // 4
    rest = 3 * fours + i
    if i >= fours and rest >= params.size:
        return
    keep, rate1, beta2, rate2 = load4(settings, 0)
    root, eps, size, _ = load4(settings, 4)
    numbers = keep, rate1, beta2, rate2, root, eps, size
    if i >= fours:
        _adamw_at(rest, params, grads, m, v, numbers)
        return
    p0, p1, p2, p3 = load4(params, 4 * i)
    g0, g1, g2, g3 = load4(grads, 4 * i)
    m0, m1, m2, m3 = load4(m, 4 * i)
    v0, v1, v2, v3 = load4(v, 4 * i)
    p0, m0, v0 = _adamw(p0, g0, m0, v0, numbers)
    p1, m1, v1 = _adamw(p1, g1, m1, v1, numbers)
    p2, m2, v2 = _adamw(p2, g2, m2, v2, numbers)
    p3, m3, v3 = _adamw(p3, g3, m3, v3, numbers)
    store4(params, 4 * i, p0, p1, p2, p3)
    store4(m, 4 * i, m0, m1, m2, m3)
    store4(v, 4 * i, v0, v1, v2, v3)


# %% [markdown]
# Now the functions. `adamw_apply` launches and does nothing else, so a
# graph may record it; `adamw_update` has the arguments that all backends
# have, and brings the settings to the device first.


# %% check the scratch tags=["exporti"] module="cuda.adamw"
def _check_work(name, work, size):
    """Raise ValueError unless `work` is at least that long."""
    if work.size < size:
        raise ValueError(
            f"{name}: work must have shape ({size},), got {work.shape}"
        )


# %% AdamW on arrays tags=["export"] module="cuda.adamw"
# one element a thread; four neighbours a thread
ADAMW_UPDATE = (
    partial(by_element, _adamw_elements),
    partial(by_four, _adamw_fours, _adamw_elements),
)


@shapes(f"N!, N, N!, N!, {SETTINGS}", DEVICE)
def adamw_apply(params, grads, m, v, settings, version=2):
    """Take one step of AdamW with settings that are on the device.

    params, grads, m, v: a device's arrays, float32, flat, of one length.
    settings: what `adamw_settings` computed, on the device. Allocates
    nothing and does not wait: a CUDA graph may record it, and new settings
    may be copied into the array before the graph is launched again.
    version: which kernel, from 1 on. Raises TypeError or ValueError for
    arrays that do not fit.
    """
    run = numbered(ADAMW_UPDATE, version, "adamw_update")
    run((params, grads, m, v, settings))


# %% AdamW tags=["export"] module="cuda.adamw"
@shapes("N!, N, N!, N!", DEVICE, work="W!?", **ADAMW_LIMITS)
def adamw_update(
    params, grads, m, v,
    learning_rate, beta1, beta2, eps, weight_decay, step,
    work=None, version=2,
):  # fmt: skip
    """Take one step of AdamW, in the order in which torch.optim.AdamW does.

    params, grads, m, v: a device's arrays, float32, flat, of one length;
    params, m and v change in place. m and v are the running means of the
    gradient and of its square, zero before the first step. step counts from
    1. weight_decay applies to every element. work: a device's array of
    `adamw_scratch()` floats, or None to have one made. version: which
    kernel, from 1 on. The settings are copied to the device, on its default
    stream: a CUDA graph cannot record that, only `adamw_apply`. Raises
    TypeError or ValueError for arrays that do not fit and settings out of
    range, before it launches anything.
    """
    numbers = adamw_settings(
        learning_rate, beta1, beta2, eps, weight_decay, step
    )
    if work is None:
        work = empty(SETTINGS, like=params)
    _check_work("adamw_update", work, SETTINGS)
    settings = work[:SETTINGS]
    settings.copy_to_device(numbers)
    adamw_apply(params, grads, m, v, settings, version)


# %% PyTorch's six steps on the device
from llmnb.gpu.launch import simulated, to_device
from llmnb.gpu.simulator import watch


def on_device(version):
    def update(p, g, m, v, *settings):
        there = [to_device(x) for x in (p, g, m, v)]
        adamw_update(*there, *settings, version=version)
        for x, array in zip((p, g, m, v), there, strict=True):
            x[...] = to_host(array)

    return update


for version in (1, 2):
    got = six_steps(on_device(version), np.float32)
    compare(f"version {version}", got, recorded, tol=2e-6)


# %% what the simulator counts
four = [simulated(np.ones(1027, np.float32)) for _ in range(4)]
settings = simulated(adamw_settings(0.1, 0.9, 0.999, 1e-8, 0.1, 1))
print("version  threads  requests  sectors")
for version in (1, 2):
    with watch() as seen:
        adamw_apply(*four, settings, version=version)
    print(f"{version:7} {seen.threads:8} {seen.requests:9} {seen.sectors:8}")

# %% [markdown]
# The seven arrays hold $7 \cdot 129 = 903$ sectors in both versions. The
# rest of the sectors, 231 and 18, are the settings, the same few bytes over
# and over, which come from a cache. Version 2 asks 81 times where version 1
# asks 462 times: it needs about a quarter of the warps, and each of them has
# 9 requests and not 14.
#
# ### The norm: one sum, one order
#
# All threads could add their squares to one number by an atomic addition.
# Then whoever comes first is added first, the order differs from run to
# run, and so do the last bits of the norm, of the clipped gradients, and of
# the model. We want the same bits each time. So each part of the sum has
# its owner and its place in the order:
#
# 1. Thread $t$ of $T$ sums the squares of fours $t$, $t + T$, $t + 2T$ and
#    so on, one sum for each of the four places, then adds these four.
# 2. The block adds its threads' sums by `block_sum` and writes one number.
# 3. A second kernel of one block adds these numbers in the same way and
#    writes the root.
#
# A second kernel and not a barrier, because there is none across blocks:
# only the end of a launch orders all of them before what comes next. The
# number of blocks depends on the length alone, up to 1024, and not on the
# GPU.

# %% who sums what
from llmnb.book.owners import draw_owners

place = np.arange(32) // 4
tail = np.where(np.arange(32) < 20, place, -1)
tail[20:23] = 0, 1, 2
fig, ax = plt.subplots(figsize=(8, 1.7), dpi=100)
draw_owners(ax, [place, place, tail], group=4, cols="32 elements a row")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.12.5. 87 gradients, summed by two blocks (two colours) of four
# threads; the number is the thread. In each sweep, a row of the figure, a
# thread takes four neighbours; the three elements that make no four go to the first three
# threads. Which thread adds what, and in which order, depends on nothing but
# the length.*
#
# The CPU sums in float64. With this order float32 will do. What counts for
# rounding is not how many numbers there are but the longest chain of
# additions that one number passes through. With $n$ squares and
# $T = 262{,}144$ threads, those of 1024 blocks, that chain has $n / 4T$
# links in a thread and 2 for its four places. In a block it has 5 for the
# butterfly of a warp and 8 for the warps. The second kernel adds 4, for 1024
# sums on 256 threads, and $5 + 8$ again. For 124 million that is about 150
# in place of 124 million, and the relative error is below
# $150 \cdot 2^{-24}$, or $9 \cdot 10^{-6}$, at worst; the root halves it.


# %% the sum of squares tags=["exporti"] module="cuda.adamw"
@kernel(fastmath=False)
def _squares(grads, work, vectors):
    parts = cuda.shared.array(WARPS, np.float32)
    i, fours = cuda.grid(1), grads.size // 4
    s0 = s1 = s2 = s3 = ZERO
    for k in range(i, fours, cuda.gridsize(1)):
        if vectors:
            a, b, c, d = load4(grads, 4 * k)
        else:
            a, b = grads[4 * k], grads[4 * k + 1]
            c, d = grads[4 * k + 2], grads[4 * k + 3]
        s0, s1, s2, s3 = s0 + a * a, s1 + b * b, s2 + c * c, s3 + d * d
    total = (s0 + s1) + (s2 + s3)
    if 4 * fours + i < grads.size:
        a = grads[4 * fours + i]
        total += a * a
    total = block_sum(total, parts)
    if cuda.threadIdx.x == 0:
        work[1 + cuda.blockIdx.x] = total


# %% the sum of the blocks' sums tags=["exporti"] module="cuda.adamw"
@kernel(fastmath=False)
def _root_of_sum(work, blocks):
    parts = cuda.shared.array(WARPS, np.float32)
    total = ZERO
    for k in range(cuda.threadIdx.x, blocks, BLOCK):
        total += work[1 + k]
    total = block_sum(total, parts)
    if cuda.threadIdx.x == 0:
        work[0] = math.sqrt(total)


# %% [markdown]
# The norm stays on the device, in `work[0]`, and the kernel that scales
# reads it there. To bring it to the host first would make the CPU wait for
# all that is under way, and a graph could not record it.
#
# So the question whether the norm is finite must be asked on the device
# now. `norm <= LARGEST` would ask it, since infinity and NaN both fail. But
# `fastmath` promises the compiler that there are no such numbers, and it may
# then drop the question. Nothing is promised of integers. A float32 is
# infinite or NaN exactly if the eight bits of its exponent are all ones, and
# `work[:1].view(np.int32)` is the norm's bits. Where they say so, the
# gradients are left as they are. The sums may meet infinity and NaN too, so
# all kernels of the norm and the clip are compiled without `fastmath`.


# %% by how much to scale tags=["exporti"] module="cuda.adamw"
@device
def _clip_factor(norm, bits, max_norm):
    """The factor of (1.12.14); 1 where the bits are NaN's or infinity's."""
    if bits & EXPONENT == EXPONENT:
        return ONE
    length = norm + TINY
    return max_norm / length if length > max_norm else ONE


# %% scale tags=["exporti"] module="cuda.adamw"
@kernel(fastmath=False)
def _shrink_fours(grads, work, bits, max_norm):
    factor = _clip_factor(work[0], bits[0], max_norm)
    if factor == ONE:
        return
    i, fours = cuda.grid(1), grads.size // 4
    if i < fours:
        a, b, c, d = load4(grads, 4 * i)
        store4(grads, 4 * i, a * factor, b * factor, c * factor, d * factor)
    elif 3 * fours + i < grads.size:
        grads[3 * fours + i] *= factor


@kernel(fastmath=False)
def _shrink_elements(grads, work, bits, max_norm):
    i, factor = cuda.grid(1), _clip_factor(work[0], bits[0], max_norm)
    if factor < ONE and i < grads.size:
        grads[i] *= factor


# %% the norm, for a graph tags=["export"] module="cuda.adamw"
def clip_scratch():
    """The number of floats that the norm and the clip want as `work`."""
    return 1 + NORM_BLOCKS


@shapes("W!, N", DEVICE)
def norm_apply(work, grads):
    """Leave the Euclidean norm of a flat array in work[0].

    work: a device's array of `clip_scratch()` floats; grads: flat, float32.
    The squares are summed in float32: a norm above 1.8e19 comes out
    infinite, and a gradient below 2.6e-23 counts as 0. Allocates nothing
    and does not wait: a CUDA graph may record it. Raises TypeError or
    ValueError for arrays that do not fit.
    """
    _check_work("global_norm", work, clip_scratch())
    blocks = (grads.size + 4 * BLOCK - 1) // (4 * BLOCK)
    blocks = min(NORM_BLOCKS, max(1, blocks))
    _squares[blocks, BLOCK](grads, work, int(aligned(grads)))
    _root_of_sum[1, BLOCK](work, blocks)


# %% the clip, for a graph tags=["export"] module="cuda.adamw"
@shapes("N!, above 0, W!", DEVICE)
def clip_apply(grads, max_norm, work):
    """Clip a flat array to norm `max_norm`; leave its old norm in work[0].

    As `clip_gradients`, but it allocates nothing and does not wait: a CUDA
    graph may record it, with this `max_norm`. The old norm is that of
    `norm_apply`.
    """
    norm_apply(work, grads)
    arrays = grads, work, work[:1].view(np.int32)
    most = np.float32(min(max_norm, LARGEST))
    by_four(_shrink_fours, _shrink_elements, arrays, most)


# %% the norm of all gradients tags=["export"] module="cuda.adamw"
@shapes("N, W!?", DEVICE)
def global_norm(grads, work=None):
    """The Euclidean norm of a flat array, as a float.

    The squares are summed in float32, in an order that the length alone
    decides: a norm above 1.8e19 comes out infinite, and a gradient below
    2.6e-23 counts as 0. work: a device's array of
    `clip_scratch()` floats, or None to have one made. Waits for the result.
    Raises TypeError or ValueError for arrays that do not fit.
    """
    if work is None:
        work = empty(clip_scratch(), like=grads)
    norm_apply(work, grads)
    return float(to_host(work[:1])[0])


# %% clip the gradients tags=["export"] module="cuda.adamw"
@shapes("N!, above 0, W!?", DEVICE)
def clip_gradients(grads, max_norm, work=None):
    """Scale a flat array down to norm `max_norm` if it is longer.

    Returns the norm before clipping and scales `grads` in place by
    max_norm / (norm + 1e-6) where that is below 1, as torch's
    clip_grad_norm_. When the norm is infinite or NaN, `grads` is left as it
    is: the caller sees the norm and decides. It is infinite already above
    1.8e19, where the sum of squares exceeds float32. work: a device's array of
    `clip_scratch()` floats, or None to have one made. Waits for the norm.
    Raises ValueError unless max_norm is positive, and as `global_norm` does.
    """
    if work is None:
        work = empty(clip_scratch(), like=grads)
    clip_apply(grads, max_norm, work)
    return float(to_host(work[:1])[0])


# %% a long, a short and a broken gradient, on the device
g = rng.normal(size=5003).astype(np.float32)
there = to_device(g)
norm = clip_gradients(there, 1.0)
close = abs(norm / reference.norm(g) - 1) < 1e-6
verdict("the norm", close, "to 1e-06 of float64's")
g *= np.float32(1 / (norm + 1e-6))
compare("clipped", to_host(there), g, tol=1e-7)
clip_gradients(there, 2.0)
compare("short", to_host(there), g, tol=1e-7)
for bad in (np.nan, np.inf):
    g[77] = bad
    there = to_device(g)
    norm = clip_gradients(there, 1.0)
    same = np.array_equal(to_host(there), g, equal_nan=True)
    verdict(f"{bad}", same and not math.isfinite(norm), "left alone")


# %% [markdown]
# float32 has one price: from a norm of $1.8 \cdot 10^{19}$ on, the sum of
# squares is infinite, where float64 could still hold it. Such a gradient is
# as broken as an infinite one, and is treated as one.
#
# To see what the order is worth, we follow it in NumPy, for more numbers
# than the simulator could sum. The butterfly of `warp_sum` adds
# lane $l$ and lane $l \oplus s$ for $s = 16, 8, 4, 2, 1$; after it every
# lane has the same sum.


# %% the kernels' order in NumPy
def in_block(x):
    """block_sum of each row of 256, in float32."""
    x = x.reshape(-1, 8, 32)
    for s in (16, 8, 4, 2, 1):
        x = x + x[..., np.arange(32) ^ s]
    total = x[:, 0, 0].copy()
    for warp in range(1, 8):
        total += x[:, warp, 0]
    return total


def norm_in_order(g):
    blocks = min(1024, -(-g.size // 1024))
    T = 256 * blocks
    padded = np.zeros(-(-g.size // (4 * T)) * 4 * T, np.float32)
    padded[: g.size // 4 * 4] = g[: g.size // 4 * 4] ** 2
    sums = np.zeros((T, 4), np.float32)
    for sweep in padded.reshape(-1, T, 4):
        sums += sweep
    total = (sums[:, 0] + sums[:, 1]) + (sums[:, 2] + sums[:, 3])
    total[: g.size % 4] += g[g.size // 4 * 4 :] ** 2
    parts = np.zeros((4, 256), np.float32)
    parts.reshape(-1)[:blocks] = in_block(total)
    sums = ((parts[0] + parts[1]) + parts[2]) + parts[3]
    return np.sqrt(in_block(sums)[0])


# %% the same order, another order
g = rng.normal(size=5003).astype(np.float32)
same = global_norm(simulated(g)) == norm_in_order(g)
verdict("NumPy", same, "has the simulator's bits")
g = rng.normal(size=1 << 24) * 10.0 ** rng.uniform(-4, 0, 1 << 24)
g = g.astype(np.float32)
exact = reference.norm(g)
ours = abs(norm_in_order(g) / exact - 1)
straight = abs(np.sqrt(np.cumsum(g * g)[-1]) / exact - 1)
verdict("16 million", ours < 1e-7, "err < 1e-07 in the kernels' order")
verdict("one by one", straight > 1e-6, "err > 1e-06")

# %% [markdown]
# A GPU contracts a product and a sum into one instruction with one
# rounding, so its last bits are not those of the simulator. From run to
# run they are the same.
#
# How long the update and the clip take on a GPU is measured by
# `llmnb bench --backend cuda --kernels`, where there is one; the results
# page shows it once it is measured.

# %% [markdown]
# ## Count it
#
# For each parameter the kernel reads four float32 numbers and writes three,
# 28 bytes, and does about 14 operations: half an operation a byte. Memory
# decides, as it did for LayerNorm, and nothing can be saved here short of
# smaller numbers. Clipping reads the gradients once more, and reads and
# writes them where it has to scale: 4 or 12 bytes.

# %% bytes for GPT-2
total = matrices + vectors
print(f"parameters            {total:,}")
print(f"m and v, float32      {8 * total / 1e9:.3f} GB")
print(f"moved by an update    {28 * total / 1e9:.3f} GB")
print(f"moved by the norm     {4 * total / 1e9:.3f} GB")

# %% predicted against measured time tags=["nbval-ignore-output"]
bandwidth = 2 * m.nbytes / fastest(np.copyto, m, v)
predicted = 28 * n / bandwidth
norm_time = fastest(cpu.norm, grads)
print(f"copy: {bandwidth / 1e9:.1f} GB/s")
print(f"update: predicted {predicted * 1e3:.1f} ms", end=", ")
print(f"measured {fast * 1e3:.1f}")
print(f"norm: predicted {4 * n / bandwidth * 1e3:.1f} ms", end=", ")
print(f"measured {norm_time * 1e3:.1f}")

# %% [markdown]
# The copy runs on one thread, the kernels on all; where one core cannot use
# the whole bandwidth of the memory, the kernels beat the prediction.

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
# - The update costs 28 bytes of traffic a parameter, and that is its time.
# - A sum with a fixed order gives the same bits in each run, and short chains
#   of additions make float32 enough for it.

# %% [markdown]
# ## Design note
#
# Clipping and updating could be one pass: measure the norm, then let the
# update multiply each gradient by the factor as it reads it. That saves 8
# bytes a parameter in the steps that clip. We keep two functions, because
# then `grads` holds what the update used, for whoever wants to look.
#
# Decay in (1.12.10) is multiplied by the learning rate, as PyTorch does it, so
# it fades out with the schedule. The paper on AdamW multiplies it by the
# schedule's fraction only, not by the peak. Under that convention the best
# $\lambda$ depends less on the learning rate; under ours, the one in common
# use, a number found in somebody's recipe means the same here.

# %% [markdown]
# ## Exercises
#
# **1** (★). A weight never receives a gradient. With a constant learning
# rate of $6 \cdot 10^{-4}$ and a decay of 0.1, after how many steps has it
# lost half its size?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# $(1 - \eta\lambda)^t = \tfrac12$ gives
# $t = \ln \tfrac12 / \ln (1 - 6 \cdot 10^{-5}) = 11552.1$, about
# $\ln 2 / (\eta \lambda)$.
# :::

# %% exercise 1, checked tags=["hide-cell"]
halving = math.log(0.5) / math.log(1 - 6e-4 * 0.1)
w, m, v, g = np.ones(1), np.zeros(1), np.zeros(1), np.zeros(1)
for step in range(1, round(halving) + 1):
    cpu.update(w, g, m, v, 6e-4, 0.9, 0.95, 1e-8, 0.1, step)
print(round(halving), "steps")
compare("what is left", w, [0.5], tol=1e-4)

# %% [markdown]
# **2** (★★). Multiply the loss (1.12.1) by 1000. What happens to Adam's path,
# and what to that of gradient descent? Show that one path stays the same.
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# $m$ becomes 1000 times as large and $\sqrt v$ too; their ratio, and with
# it Adam's path, stays the same, but for $\epsilon$. Gradient descent steps
# 1000 times as far and flies apart. This is why the loss may be a sum or a
# mean for Adam, and why clipping that scaled *every* gradient of a run by
# one factor would do nothing to it.
# :::

# %% exercise 2, checked tags=["hide-cell"]
curvature *= 1000
compare("Adam", descend(adam, lr=0.2), paths["Adam"], tol=1e-6)
steep = descend(gradient_descent, steps=5, lr=0.036)
curvature /= 1000
away = np.hypot(*(steep[5] - lowest))
verdict("gradient descent", away > 1e6, "flies apart")

# %% [markdown]
# **3** (★★★). Adam has one scale for each *coordinate*. Turn the valley by
# 45 degrees, so that neither its floor nor its walls lie along a
# coordinate. Who still arrives after 60 steps?
#
# :::{admonition} Solution to exercise 3
# :class: dropdown
# Both coordinates now see the steep wall, so both get the same small step,
# and Adam's advantage is gone. Momentum does not know what a coordinate is;
# but for the turned starting point its path is the old one.
# :::


# %% exercise 3, the turned valley tags=["hide-cell"]
def turned(method, steps=60, **settings):
    turn = np.array([[1.0, 1.0], [-1.0, 1.0]]) / np.sqrt(2)
    w, state = np.array([-1.0, -0.2]), SimpleNamespace(m=0, v=0, step=0)
    for _ in range(steps):
        state.step += 1
        g = turn.T @ (curvature * (turn @ (w - lowest)))
        w = method(w, g, state, **settings)
    return np.hypot(*(w - lowest))


# %% exercise 3, checked
straight = np.hypot(*(paths["Adam"][-1] - lowest))
verdict("Adam", turned(adam, lr=0.2) > 10 * straight, "is 10 times as far off")
verdict("momentum", turned(momentum, lr=0.02) < 0.1, "still arrives")

# %% [markdown]
# **4** (★). If the blocks added their sums to one number by atomic
# additions, the order would change from run to run. Take a thousand sums,
# put them in a hundred orders, and add each up in float32. How many results
# are there, and how far apart?
#
# :::{admonition} Solution to exercise 4
# :class: dropdown
# About twenty, within a few millionths of each other. Each is as good as
# the next; but two runs would no longer give the same model.
# :::


# %% exercise 4, a hundred orders tags=["hide-cell"]
def results(sums, orders=100):
    # cumsum adds one after the other, as atomics do
    found = [np.cumsum(rng.permutation(sums))[-1] for _ in range(orders)]
    return np.array(found)


# %% exercise 4, checked
found = results(rng.chisquare(10, 1000).astype(np.float32))
verdict("the order", 10 < len(set(found)) < 30, "makes 10 to 30 sums")
close = found.max() / found.min() - 1 < 1e-5
verdict("all orders", close, "agree to 1e-5")

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
