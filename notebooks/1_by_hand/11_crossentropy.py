# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       reference.crossentropy: "Softmax and cross-entropy in one, in NumPy, forward and backward."
# ---

# %% [markdown]
# # Cross-entropy: turn logits into a loss and its gradient
#
# > Softmax makes probabilities of logits, cross-entropy measures the surprise
# > at the right token, and the gradient of both together is p - y.
#
# *Reading time: 28 minutes. You need: loss, softmax and their gradient from
# [chapter 1.1](01_learns.ipynb), and the gradient of a softmax in [chapter
# 1.8](08_attention.ipynb). The fast versions: chapters
# [2.3](../2_cpu/03_loss.ipynb) and [3.8](../3_gpu/08_classifier.ipynb).*
#
# ## Where we are

# %% where we are
from llmnb.book.diagram import gpt2_diagram

gpt2_diagram(lit="crossentropy")

# %% [markdown]
# *Figure 1.11.1. Softmax and cross-entropy end the forward pass: the logits go
# in and the loss comes out. The backward pass begins here.*
#
# The last linear layer gives every position V logits, one for each token that
# might come next. This chapter turns them into probabilities, compares these
# with the token that did come, and sends back the first gradient of the
# backward pass. [Chapter 1.1](01_learns.ipynb) did so for letters; here are
# the layer for any logits and the reasons behind it. At its end you can
#
# - compute a softmax that no logit can make overflow;
# - say what a loss of 10.82 means for a vocabulary of 50,257 tokens, and why
#   an untrained model starts near there;
# - derive p - y, the gradient of softmax and cross-entropy together;
# - say why the fused form saves one number a row and not V, and survives
#   logits on which the separate form loses its gradient.
#
# ## Setup

# %% setup
import matplotlib.pyplot as plt

from llmnb.book.diagram import PALETTE
from llmnb.book.verify import compare, numerical_gradient, verdict

# %% imports tags=["export"]
import numpy as np

from llmnb.shapes import shapes

# %% the seed
rng = np.random.default_rng(9)

# %% [markdown]
# ## By hand
#
# Take a vocabulary of three tokens and a row of logits, $(0, \log 2, \log 5)$.
# Their exponentials are 1, 2 and 5, which sum to 8, so the probabilities are
# $(\frac18, \frac28, \frac58)$. If token 2 came next, the model gave it
# $\frac58$, and the loss is $-\log \frac58 = 0.4700$. Had token 0 come, it
# would be $-\log \frac18 = 2.0794$.
#
# The gradient by the logits is, by (1.1.6), the probabilities with 1 taken
# from the token that came: $(\frac18, \frac28, -\frac38)$ for token 2.
#
# Let a second row be the first one plus 1000. The ratios of exponentials are
# the same, so the probabilities are too. But $e^{1000}$ has 435 digits, and no
# float holds it: the second row has to wait for (1.11.2).

# %% two rows by hand
z = np.array([[0.0, np.log(2), np.log(5)]]) + np.array([[0.0], [1000.0]])
exps = np.exp(z[0])
print("exponentials ", exps.round(4))
print("probabilities", exps / exps.sum())
print("losses       ", -np.log(exps / exps.sum()).round(4))
print("gradient     ", exps / exps.sum() - [0, 0, 1])

# %% [markdown]
# | tensor | shape | what it holds |
# |---|---|---|
# | `logits`, `probs` | (B, T, Vp) | a number for each token that may follow |
# | `targets` | (B, T) | the token that does follow, an integer below V |
# | `losses` | (B, T) | the surprise at each target |
# | `lse` | (B, T) | the log of the sum of the exponentials of a row |
#
# Vp is the vocabulary padded to a multiple of 128, as [chapter
# 1.4](04_gpt2.ipynb) explains: columns from V on belong to no token. From here
# on, one row is one position: $z_i$ is its logit $i$, and $y$ is its target,
# the number of the token that came.
#
# ## Forward
#
# ### From logits to probabilities
#
# The softmax is (1.1.2) again:
#
# $$ p_i = \frac{e^{z_i}}{\sum_j e^{z_j}} . \tag{1.11.1} $$
#
# Only differences count: a logit that is larger by $\log 2$ means twice the
# probability. Adding the same number to every logit multiplies numerator and
# denominator by one factor and changes nothing. On paper. In float32 the
# largest number is about $3.4 \cdot 10^{38} = e^{88.7}$, and one logit of 89
# is enough to break (1.11.1):

# %% what overflows
with np.errstate(over="ignore", invalid="ignore"):
    exps = np.exp(np.array([88, 89, 1], np.float32))
    print("probabilities", exps / exps.sum())

# %% [markdown]
# The sum is infinite, so two probabilities are 0 and one is $\infty / \infty$,
# not a number. One such row poisons every gradient of the model. The freedom
# to add a number is the cure. Choose it so that the largest logit becomes 0:
#
# $$ p_i = \frac{e^{z_i - z_{\max}}}{\sum_j e^{z_j - z_{\max}}} , \qquad
#    z_{\max} = \max_j z_j . \tag{1.11.2} $$
#
# Now every exponential is at most 1, and the largest is exactly 1, so the sum
# lies between 1 and V: nothing overflows, and the divisor is never 0. An
# exponential may underflow to 0, but only when its share is below one part in
# $10^{37}$ of the largest.
#
# A padding column must get probability 0 whatever its logit holds. It is left
# out of the maximum and of the sum, and set to 0.


# %% the softmax
def softmax_forward(probs, logits, V):
    """Probabilities of the first V logits in each row.

    probs, logits: float (B, T, Vp). Columns from V on are padding: their
    logits are not read and their probability is 0. Writes `probs`, which
    may be `logits` itself.
    """
    shifted = logits[..., :V] - logits[..., :V].max(-1, keepdims=True)
    exps = np.exp(shifted)
    probs[..., :V] = exps / exps.sum(-1, keepdims=True)
    probs[..., V:] = 0


# %% the two rows through the function
logits = np.full((1, 2, 5), np.nan)
logits[0, :, :3] = z
probs = np.empty_like(logits)
softmax_forward(probs, logits, 3)
print(probs[0].round(4))

# %% [markdown]
# Two equal rows, in spite of the 1000, and two padding columns of zeros,
# although their logits were NaN, no numbers at all.
#
# ### From probabilities to a loss
#
# The **surprise** at an event of probability $p$ is $-\log p$, in nats as in
# chapter 1.1, or in bits with the logarithm to base 2; one nat is 1.4427 bits.
#
# The mean surprise of someone who knows the true probabilities $q$ is their
# **entropy**,
#
# $$ H(q) = -\sum_i q_i \log q_i . \tag{1.11.3} $$
#
# The mean surprise of someone who believes in $p$ while $q$ is true is the
# **cross-entropy**,
#
# $$ H(q, p) = -\sum_i q_i \log p_i
#            = H(q) + \sum_i q_i \log \frac{q_i}{p_i} . \tag{1.11.4} $$
#
# The last sum, the Kullback-Leibler divergence, is never negative and is 0
# only for $p = q$: $\log x \le x - 1$, with equality at $x = 1$ alone, so with
# $x = p_i / q_i$ the logarithm in it, $-\log x$, is at least $1 - x$, and the
# sum at least $\sum_i q_i (1 - p_i / q_i) = \sum_i q_i - \sum_i p_i = 0$.
# (Terms with $q_i = 0$ are 0; the other $p_i$ then sum to at most 1, and the
# sum is still at least 0.) With $p_i = 1 / V$ (1.11.4) is $\log V$: no entropy
# is larger than that of V equally likely outcomes. And the cross-entropy has a
# floor, the entropy of the data; the only way down to it is to believe what is
# true.

# %% entropy and cross-entropy
q = np.array([0.5, 0.25, 0.25])
beliefs = {"q itself": q, "uniform": np.full(3, 1 / 3)}
beliefs["sure"] = [0.98, 0.01, 0.01]
for name, p in beliefs.items():
    print(f"{name:9} {-(q * np.log2(p)).sum():.4f} bits")
for V in (256, 1024, 50257):
    print(f"log {V:<6}{np.log(V):.4f} nats")

# %% [markdown]
# Belief in $q$ itself costs 1.5 bits, the entropy. Not committing oneself
# costs a little more, being wrongly sure much more.
#
# The last line is the loss of a GPT-2 that guesses uniformly. A fresh model
# starts near it ((1.15.4) says how near); a first loss that is far off is a
# mistake. The exponential of a loss, its **perplexity**, is the size of a
# vocabulary among which a uniform guess would do equally well.
#
# Nobody knows the true distribution of text, but every text is a sample from
# it. The mean surprise at the tokens that did come estimates (1.11.4), so our
# loss is one number for every position,
#
# $$ \ell = -\log p_y , \tag{1.11.5} $$
#
# and their mean over the B·T positions of a batch.
#
# One corner needs a decision. When $p_y$ has underflowed to 0, its logarithm
# is $-\infty$, and one infinite loss makes the mean infinite. So a probability
# is *clamped*: it counts as at least the smallest number that its dtype holds
# with all digits, about $10^{-38}$ in float32, and a loss computed this way
# never exceeds 87.34. (In the code, `take_along_axis` picks from each row the
# column that `targets` names.)


# %% the cross-entropy
def crossentropy_forward(losses, probs, targets):
    """Surprise at each target, in nats: minus the log of its probability.

    losses: float (B, T), written. probs: float (B, T, Vp). targets: int
    (B, T). A probability below the smallest normal number counts as that
    number, so that a loss is never infinite.
    """
    tiny = np.finfo(probs.dtype).tiny
    hit = np.take_along_axis(probs, targets[..., None], -1)[..., 0]
    losses[...] = -np.log(np.maximum(hit, tiny))


# %% the losses of the two rows
targets = np.array([[2, 0]])
losses = np.empty((1, 2))
crossentropy_forward(losses, probs, targets)
compare("by hand", losses, np.log([[8 / 5, 8.0]]), tol=1e-12)
mean = losses.mean()
print(f"mean {mean:.4f} nats, perplexity {np.exp(mean):.4f}")

# %% [markdown]
# ## Backward, derived
#
# The layers before this one need $dz_i = \partial \mathcal L / \partial z_i$.
# We go back in the two steps in which we came, and then see both as one.
#
# **The cross-entropy.** Only $p_y$ enters (1.11.5). With $\delta_{iy}$ for 1
# where $i = y$ and 0 elsewhere (written out, a **one-hot** row),
#
# $$ dp_i = -\frac{\delta_{iy}}{p_y}\, d\ell . \tag{1.11.6} $$
#
# For the mean over the batch, $d\ell = 1/(BT)$ at every position. (In the
# code, `np.indices` gives every row its $b$ and $t$, so `probs[b, t, targets]`
# is $p_y$ of every row, and can be written to. Where the clamp holds, the loss
# is flat; we still send a gradient back, with the clamped number for $p_y$.)


# %% the gradient of the cross-entropy
def crossentropy_backward(dprobs, dlosses, probs, targets):
    """Add the gradient of the losses by the probabilities to `dprobs`.

    dprobs, probs: float (B, T, Vp); dlosses: (B, T); targets: int (B, T).
    Only the targets' columns of `dprobs` change.
    """
    tiny = np.finfo(probs.dtype).tiny
    b, t = np.indices(targets.shape)
    hit = np.maximum(probs[b, t, targets], tiny)
    dprobs[b, t, targets] -= dlosses / hit


# %% [markdown]
# **The softmax.** Every $z_j$ enters every $p_i$, because it stands in the sum
# of the denominator. [Chapter 1.8](08_attention.ipynb) has differentiated this
# quotient for attention's weights, (1.8.7). In the letters of this chapter,
#
# $$ \frac{\partial p_i}{\partial z_j}
#    = p_i\, (\delta_{ij} - p_j) . \tag{1.11.7} $$
#
# This is the **Jacobian** of the softmax, a V by V matrix for each row. For
# our first row it reads:

# %% the Jacobian of a small row
p = np.array([1, 2, 5]) / 8
jacobian = p[:, None] * (np.eye(3) - p)
print(jacobian * 64)
print("column sums", jacobian.sum(axis=0))
print(f"GPT-2: {50257**2 * 4 / 1e9:.1f} GB a row")

# %% [markdown]
# (Shown times 64.) The columns sum to 0, because the probabilities sum to 1
# whatever the logits do. Nobody has to hold this matrix for 50,257 tokens. The
# chain rule multiplies it by $dp$, and as in (1.8.8) the double loop collapses
# to one sum for the whole row:
#
# $$
# \begin{aligned}
# dz_j &= \sum_i dp_i\, p_i\, (\delta_{ij} - p_j) \\
#   &= p_j\, \Bigl( dp_j - \sum_i p_i\, dp_i \Bigr) .
# \end{aligned}
# \tag{1.11.8}
# $$
#
# In words: each logit hears by how much the gradient of its own probability
# differs from the average, the average being taken with the model's own
# probabilities. A padding column has $p_j = 0$ and hears nothing.


# %% the gradient of the softmax
def softmax_backward(dlogits, dprobs, probs):
    """Add the gradient by the logits to `dlogits`.

    dlogits, dprobs, probs: float (B, T, Vp). Padding has probability 0, so
    its columns receive 0.
    """
    inside = (dprobs * probs).sum(-1, keepdims=True)
    dlogits += probs * (dprobs - inside)


# %% the collapse against the matrix
dz, dp = np.zeros((1, 1, 3)), rng.normal(size=(1, 1, 3))
softmax_backward(dz, dp, p[None, None])
compare("one sum a row", dz[0, 0], jacobian.T @ dp[0, 0], tol=1e-12)

# %% [markdown]
# **Both together.** Put (1.11.6) into (1.11.8). The sum has one term that is
# not zero, $p_y \cdot (-d\ell / p_y) = -d\ell$, hence
#
# $$ dz_j = p_j \Bigl( -\frac{\delta_{jy}}{p_y}\, d\ell + d\ell \Bigr)
#         = d\ell\, (p_j - \delta_{jy}) . \tag{1.11.9} $$
#
# In the last step $p_j\, \delta_{jy} / p_y = \delta_{jy}$, because $j$ is $y$
# where it is not 0. The division by $p_y$ has gone, and with it the trouble of
# a tiny $p_y$. What is left is called **p - y**, with $y$ for the one-hot row:
# belief minus fact.

# %% p - y on the two rows
dprobs, dlogits = np.zeros_like(probs), np.zeros_like(probs)
crossentropy_backward(dprobs, np.ones((1, 2)), probs, targets)
softmax_backward(dlogits, dprobs, probs)
print(dlogits[0].round(4) + 0.0)
onehot = np.eye(5)[targets]
compare("p - y", dlogits, probs - onehot, tol=1e-12)

# %% [markdown]
# ### The fused form
#
# If the gradient of both layers is that short, the layers may as well be one.
# Put (1.11.1) into (1.11.5):
#
# $$
# \begin{aligned}
# \ell &= -\log \frac{e^{z_y}}{\sum_j e^{z_j}}
#    = \operatorname{lse} - z_y , \\
# \operatorname{lse} &= \log \sum_j e^{z_j} .
# \end{aligned}
# \tag{1.11.10}
# $$
#
# This is the log-sum-exp of chapter 1.8. With the largest logit taken out it
# cannot overflow:
#
# $$ \operatorname{lse} = z_{\max} + \log \sum_j e^{z_j - z_{\max}} .
#    \tag{1.11.11} $$
#
# No probability is stored and no logarithm of a small number is taken. The
# gradient follows from (1.11.10) in one line, because $\partial
# \operatorname{lse} / \partial z_j = e^{z_j} / \sum_i e^{z_i} = p_j$, and $p_j
# = e^{z_j - \operatorname{lse}}$:
#
# $$ dz_j = d\ell\, \bigl( e^{z_j - \operatorname{lse}} - \delta_{jy} \bigr) .
#    \tag{1.11.12} $$
#
# **What to save.** The logits, which are there anyway, and lse, one number a
# row. Beside it, $dz_j$ needs its own $z_j$ and no other, so it may be written
# in the place of $z_j$: the largest array of the whole model needs no second
# one for its gradient. (`1 to Vp` is an integer between the two.)


# %% both in one tags=["export"]
@shapes("B T!, B T!, B T Vp, B T of V, 1 to Vp")
def crossentropy_softmax_forward(losses, lse, logits, targets, V):
    """Losses straight from the logits; no probability is stored.

    losses, lse: float (B, T), written; lse is the log of the sum of the
    exponentials of a row, all that the backward pass needs besides the
    logits. logits: float (B, T, Vp), of which columns from V on are not
    read. targets: int (B, T), each below V.
    """
    top = logits[..., :V].max(-1)
    sums = np.exp(logits[..., :V] - top[..., None]).sum(-1)
    lse[...] = top + np.log(sums)
    hit = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    losses[...] = lse - hit


# %% [markdown]
# The backward pass overwrites its gradient; it has no `add`. Nothing else
# reads the logits, so there is no earlier contribution to keep; and when it
# works in place, what stands there is not a gradient yet.


# %% the gradient of both in one tags=["export"]
@shapes("B T Vp!, B T, B T Vp~, B T, B T of V, 1 to Vp")
def crossentropy_softmax_backward(dlogits, dlosses, logits, lse, targets, V):
    """Write the gradient of the losses by the logits: p - y, scaled.

    dlogits: float (B, T, Vp), overwritten (not added to); it may be
    `logits` itself, which then is lost. dlosses, lse: (B, T), lse from the
    forward pass. targets: int (B, T). Columns from V on receive 0.
    """
    b, t = np.indices(targets.shape)
    dlogits[..., :V] = np.exp(logits[..., :V] - lse[..., None])
    dlogits[b, t, targets] -= 1
    dlogits[..., :V] *= dlosses[..., None]
    dlogits[..., V:] = 0


# %% the two rows, fused
lse, fused = np.zeros((1, 2)), np.zeros((1, 2))
crossentropy_softmax_forward(fused, lse, logits, targets, 3)
compare("losses", fused, losses, tol=1e-12)
crossentropy_softmax_backward(logits, np.ones((1, 2)), logits, lse, targets, 3)
compare("in place", logits, probs - onehot, tol=1e-12)

# %% [markdown]
# ### Extreme logits
#
# What does a model look like that is very sure and wrong? Give it one logit of
# 10,000, the rest 0, and let another token come. By (1.11.10) the loss is
# 10,000, and by (1.11.12) the gradient is 1 at the wrong token and -1 at the
# right one. The separate functions see a probability that has underflowed to
# 0: the clamp turns their loss into 87.3. Backward, $p_j$ is 0 at every token
# but the wrong one, and (1.11.8) multiplies by it. At the wrong one $dp_j$ is
# 0, and so is the sum: the only $dp_i$ that is not 0 is the right token's, and
# it is multiplied by $p_y = 0$. Nothing is left.

# %% sure and wrong
wide = np.array([[[0, 1e4, 0, 0]]], np.float32)
came, one = np.array([[2]]), np.ones((1, 1), np.float32)
losses, lse, probs = np.empty_like(one), np.empty_like(one), wide.copy()
softmax_forward(probs, wide, 4)
crossentropy_forward(losses, probs, came)
dprobs, dlogits = np.zeros_like(wide), np.zeros_like(wide)
crossentropy_backward(dprobs, one, probs, came)
softmax_backward(dlogits, dprobs, probs)
print("separate", int(losses[0, 0]), dlogits[0, 0].astype(int))
crossentropy_softmax_forward(losses, lse, wide, came, 4)
crossentropy_softmax_backward(dlogits, one, wide, lse, came, 4)
print("fused   ", int(losses[0, 0]), dlogits[0, 0].astype(int))

# %% [markdown]
# Where the model is most wrong, the separate form learns nothing: token 2, the
# right one, is sent 0. The fused form is exact. It is the layer of `llmnb`;
# the separate functions have done their work here and are not exported.
#
# ## Proof
#
# As always: float64, step $10^{-5}$, tolerance $10^{-8}$. The halves are
# tested alone, with a random gradient coming in, then the fused form with
# unequal weights `dlosses` for the positions.
#
# The cross-entropy alone needs care: the error of central differences grows
# with the third derivative, here $2 / p_y^3$ in size. So its test takes
# probabilities above 0.5, where a softmax would give some near 0.001.

# %% a problem to differentiate
B, T, V, Vp = 2, 3, 5, 8
logits = 3 * rng.normal(size=(B, T, Vp))
targets = rng.integers(0, V, (B, T))
dlosses, lse, losses = rng.normal(size=(3, B, T))
g, probs, dprobs, dlogits = rng.normal(size=(4, B, T, Vp))


def softmax_loss():
    softmax_forward(probs, logits, V)
    return (g * probs).sum()


def crossentropy_loss():
    crossentropy_forward(losses, probs, targets)
    return (dlosses * losses).sum()


# %% the halves against central differences
want = numerical_gradient(softmax_loss, logits)
softmax_loss()
dlogits[...] = 0
softmax_backward(dlogits, g, probs)
compare("softmax", dlogits, want, tol=1e-8)
probs[...] = rng.uniform(0.5, 1, probs.shape)
want = numerical_gradient(crossentropy_loss, probs)
dprobs[...] = 0
crossentropy_backward(dprobs, dlosses, probs, targets)
compare("cross-entropy", dprobs, want, tol=1e-8)


# %% the fused form against central differences
def fused_loss():
    crossentropy_softmax_forward(losses, lse, logits, targets, V)
    return (dlosses * losses).sum()


want = numerical_gradient(fused_loss, logits)
fused_loss()
dlogits[...] = np.nan  # the layer must write over all of it
crossentropy_softmax_backward(dlogits, dlosses, logits, lse, targets, V)
compare("fused", dlogits, want, tol=1e-8)

# %% [markdown]
# Two more properties follow from the derivation: the gradient of a row sums to
# 0 (raising all logits alike changes nothing), and padding gets exactly 0.

# %% sums and padding
compare("row sums", dlogits.sum(-1), np.zeros((B, T)), tol=1e-12)
verdict("padding", not dlogits[..., V:].any(), "is exactly 0")

# %% [markdown]
# A plausible mistake: to take the softmax for an elementwise function, whose
# derivative would be $p_j (1 - p_j)$, the diagonal of (1.11.7), and to forget
# that a logit also lowers all other probabilities.

# %% a gradient made wrong on purpose
want = numerical_gradient(softmax_loss, logits)
softmax_loss()
diagonal_only = g * probs * (1 - probs)
caught = np.abs(diagonal_only - want).max() > 1e-3
verdict("the mistake", caught, "is caught")

# %% [markdown]
# ## Count it
#
# An array of the size of the logits is the largest thing in the model: for
# GPT-2 and four sequences of 1024 positions, $4 \cdot 1024 \cdot 50304$
# numbers, 824 MB in float32, where all 124M parameters take 498 MB. The
# separate form holds four of them (`logits`, `probs`, `dprobs`, `dlogits`),
# 3.3 GB; the fused form in place holds one. There are no parameters, and $BT$
# numbers are saved.
#
# ## See it
#
# A row of eight logits goes through the layer; the token that came is the
# fifth.

# %% one row through the layer tags=["hide-input"]
row = np.array([0.5, 2.0, -1.0, 0.0, 1.2, -0.5, 1.0, -2.0])
prob = np.exp(row) / np.exp(row).sum()
grad = prob - np.eye(8)[4]
colours = [PALETTE["orange" if i == 4 else "blue"] for i in range(8)]
fig, axes = plt.subplots(3, 1, figsize=(6, 5), dpi=100, sharex=True)
labels = "logits z", "probabilities p", "gradient p - y"
for ax, x, label in zip(axes, (row, prob, grad), labels, strict=True):
    ax.bar(range(8), x, color=colours)
    ax.axhline(0, color=PALETTE["ink"], linewidth=0.8)
    ax.set_ylabel(label)
    ax.spines[["top", "right", "bottom"]].set_visible(False)
axes[2].set_xlabel("token (orange: the one that came next)")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.11.2. The gradient equals the probabilities except at the token
# that came, where it is negative and balances all the others. Tokens that the
# model did not believe in are left in peace.*
#
# ## Why it is there
#
# Why cross-entropy and not, say, the squared distance $(1 - p_y)^2$? Both are
# 0 for a perfect prediction. The derivative of the second by $p_y$ is
# $-2\, (1 - p_y)$, and by (1.11.7) with $i = y$ its gradient is $2\, (1 -
# p_y)\, p_y\, (p_j - \delta_{jy})$. The factor $p_y$ is fatal: the more wrong,
# the smaller. We begin with three logits that are sure of a wrong token, by a
# lead of 4 or of 8, and descend with either, at rate 1.

# %% sure, wrong, and on the way back tags=["hide-input"]
fig, axes = plt.subplots(1, 2, figsize=(8, 3), dpi=100, sharey=True)
for ax, lead in zip(axes, (4.0, 8.0), strict=True):
    for squared, colour in ((False, "blue"), (True, "orange")):
        z, right = np.array([0.0, lead, 0.0]), []
        for _ in range(200):
            p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
            right.append(p[0])
            dz = p - [1, 0, 0]
            z -= dz * (2 * (1 - p[0]) * p[0] if squared else 1)
        name = "squared distance" if squared else "cross-entropy"
        ax.plot(right, color=PALETTE[colour], lw=2, label=name)
        if lead == 8:
            claim = "stays wrong" if squared else "learns"
            ok = right[-1] < 0.01 if squared else right[10] > 0.9
            verdict(name, ok, claim)
    ax.set(title=f"the wrong logit leads by {lead:.0f}", xlabel="step")
    ax.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("probability of the right token")
axes[0].legend(frameon=False, loc="center right")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.11.3. With cross-entropy the pull is near 1 while the prediction is
# wrong, and a few steps set it right. The squared distance needs a long time
# to leave a bad prediction (left), and a hopeless one stays hopeless (right).*
#
# ## Take away
#
# - Softmax sees differences of logits only, so the largest may be
#   subtracted, and then nothing overflows.
# - Cross-entropy is the mean surprise. A uniform guess costs $\log V$; the
#   floor is the entropy of the text.
# - The Jacobian collapses to one sum a row, and with cross-entropy to p - y.
# - The fused form keeps one number a row, works in place, and stays exact
#   where probabilities underflow.
#
# ## Design note
#
# We save lse, not the largest logit and the sum apart: one number instead of
# two, at a price. $e^{z - \operatorname{lse}}$ inherits the rounding of lse,
# $4 \cdot 10^{-6}$ for one near 100 in float32. That scales a whole row of the
# gradient by four parts in a million, far below the noise of a batch of random
# text.
#
# ## Exercises
#
# **1** (★). A model's loss is 3.0 nats a token. Which perplexity is that? A
# second model has half the perplexity: what is its loss? Predict both, then
# check.
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# The perplexity is $e^3 = 20.09$. Half of it means a loss lower by $\log 2$:
# $3 - 0.6931 = 2.3069$.
# :::

# %% exercise 1, checked tags=["hide-cell"]
compare("perplexity", np.exp(3.0), 20.0855, tol=1e-5)
compare("half of it", np.log(np.exp(3.0) / 2), 2.3069, tol=1e-4)

# %% [markdown]
# **2** (★★). Divide all logits by a **temperature** $\tau$ before the softmax.
# Derive the gradient of the loss by $z_j$ and by $\tau$.
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# With $z' = z / \tau$ the layer gives $dz'_j = p_j - \delta_{jy}$, where $p$
# is the softmax of $z'$. From $\partial z'_j / \partial z_j = 1 / \tau$
# follows $dz_j = (p_j - \delta_{jy}) / \tau$, and from $\partial z'_j /
# \partial \tau = -z_j / \tau^2$ follows $d\tau = -\sum_j (p_j - \delta_{jy})\,
# z_j / \tau^2$.
# :::


# %% exercise 2, the gradients tags=["hide-cell"]
def tempered(z, tau, y):
    z = z / tau
    return np.log(np.exp(z - z.max()).sum()) + z.max() - z[y]


def tempered_gradients(z, tau, y):
    p = np.exp((z - z.max()) / tau)
    d = p / p.sum() - np.eye(len(z))[y]
    return d / tau, -(d * z).sum() / tau**2


# %% exercise 2, checked
by_hand = tempered(np.array([0, np.log(16)]), 2, 0)  # 1 to 4: p is 1/5
compare("by hand", by_hand, np.log(5), tol=1e-12)
z, tau = rng.normal(size=6), np.array(0.7)
dz, dtau = tempered_gradients(z, float(tau), 2)
want = numerical_gradient(lambda: tempered(z, tau, 2), z)
compare("dz", dz, want, tol=1e-8)
want = numerical_gradient(lambda: tempered(z, tau, 2), tau)
compare("dtau", dtau, want, tol=1e-8)

# %% [markdown]
# **3** (★★). **Label smoothing** replaces the one-hot row by $q_i = (1 -
# \alpha)\, \delta_{iy} + \alpha / V$, so that the model is not asked for
# certainty. Give $H(q, p)$ and its gradient by the logits.
#
# :::{admonition} Solution to exercise 3
# :class: dropdown
# $H(q, p) = \operatorname{lse} \sum_i q_i - \sum_i q_i z_i$, which is
# $\operatorname{lse} - \sum_i q_i z_i$, because $q$ sums to 1. Hence $dz_j =
# p_j - q_j$.
# :::


# %% exercise 3, the gradient tags=["hide-cell"]
def smoothed(z, y, alpha):
    q = (1 - alpha) * np.eye(len(z))[y] + alpha / len(z)
    lse = np.log(np.exp(z).sum())
    return lse - (q * z).sum(), np.exp(z - lse) - q


# %% exercise 3, checked
by_hand = [-0.6, 0.2, 0.2, 0.2]  # all p are 1/4; q is 0.85, 0.05, ...
compare("by hand", smoothed(np.zeros(4), 0, 0.2)[1], by_hand, tol=1e-12)
want = numerical_gradient(lambda: smoothed(z, 2, 0.1)[0], z)
compare("p - q", smoothed(z, 2, 0.1)[1], want, tol=1e-8)

# %% [markdown]
# ## Further reading
#
# - Shannon (1948), A Mathematical Theory of Communication: sections 6 and 7
#   for entropy, and section 3 for approximations to English that are
#   language models, by hand.
# - Blanchard, Higham and Higham (2021),
#   [Accurately Computing the Log-Sum-Exp and Softmax Functions](https://arxiv.org/abs/1909.03469):
#   proves that subtracting the maximum is as accurate as one may hope.
#
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("1.11")
