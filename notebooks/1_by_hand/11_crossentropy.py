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
# *Reading time: 29 minutes. You need: central differences from
# [chapter 1.4](04_gpt2.ipynb), and the gradient of a softmax from
# [chapter 1.8](08_attention.ipynb).*

# %% [markdown]
# ## Where we are

# %% where we are
from llmnb.book.diagram import gpt2_diagram

gpt2_diagram(lit="crossentropy")

# %% [markdown]
# *Figure 1.11.1. Softmax and cross-entropy end the forward pass: the logits
# go in and the loss comes out. The backward pass begins here.*
#
# The last linear layer gives every position V numbers, one for each token
# that might come next. They are called **logits**; they may have any size and
# either sign. This chapter turns them into probabilities, compares these
# with the token that did come next, and sends back the first gradient of
# the backward pass. At its end you can
#
# - compute a softmax that no logit can make overflow;
# - say what a loss of 10.82 means for a vocabulary of 50,257 tokens, and why
#   an untrained model starts near there;
# - derive p - y, the gradient of softmax and cross-entropy together;
# - say why the fused form saves one number a row where the separate form
#   saves V, and survives logits on which the separate one loses its
#   gradient.
#
# The fast versions: [chapter 2.3](../2_cpu/03_loss.ipynb) and
# [chapter 3.8](../3_gpu/08_classifier.ipynb).

# %% [markdown]
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
# Take a vocabulary of three tokens and the logits
# $z_0 = (0, \ln 2, \ln 5)$. Their exponentials are 1, 2 and 5, which sum to
# 8, so the probabilities are $(\frac18, \frac28, \frac58)$. If token 2 came
# next, the model gave it $\frac58$, and its **loss** is
# $-\ln \frac58 = 0.4700$. Had token 0 come, the loss would be
# $-\ln \frac18 = 2.0794$: the less probable the token, the larger the
# surprise.
#
# The gradient of the loss by the logits will turn out to be the
# probabilities, with 1 taken from the token that came: $(\frac18, \frac28,
# -\frac38)$ for token 2. Descending against it raises the logit of token 2
# and lowers the two others, each in proportion to the probability it held.
#
# The second row is the first one plus 1000. The ratios of exponentials are
# the same, so the probabilities are too. But $e^{1000}$ has 435 digits, and
# no float holds it.

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
# Vp is the vocabulary padded to a multiple of 128, as
# [chapter 1.4](04_gpt2.ipynb) explains: columns V to Vp belong to no token.
# From here on, one row is one position: $z_i$ is its logit $i$, and $k$ is its
# target.

# %% [markdown]
# ## Forward
#
# ### From logits to probabilities
#
# Probabilities are positive and sum to 1. The **softmax** makes the logits
# positive with an exponential and then divides by the sum:
#
# $$ p_i = \frac{e^{z_i}}{\sum_j e^{z_j}} . \tag{1.11.1} $$
#
# Only differences count: a logit that is larger by $\ln 2$ means twice the
# probability. Adding the same $c$ to every logit multiplies numerator and
# denominator by $e^c$ and changes nothing. On paper. In float32 the largest
# number is about $3.4 \cdot 10^{38} = e^{88.7}$, and one logit of 89 is
# enough to break (1.11.1):

# %% what overflows
with np.errstate(over="ignore", invalid="ignore"):
    exps = np.exp(np.array([88, 89, 1], np.float32))
    print("exponentials finite? ", np.isfinite(exps))
    print("probabilities finite?", np.isfinite(exps / exps.sum()))
    print("probabilities        ", exps / exps.sum())

# %% [markdown]
# The sum is infinite, so two probabilities are 0 and one is
# $\infty / \infty$, not a number. One such row poisons every gradient of
# the model. The freedom to add $c$ is the cure. Choose it so that the
# largest logit becomes 0:
#
# $$ p_i = \frac{e^{z_i - m}}{\sum_j e^{z_j - m}} , \qquad
#    m = \max_j z_j . \tag{1.11.2} $$
#
# Now every exponential lies between 0 and 1, and the largest is exactly 1,
# so the sum lies between 1 and V. Nothing can overflow, and the divisor is
# never 0. An exponential may underflow to 0, but only when its share is
# below one part in $10^{37}$ of the largest.
#
# A padding column must get probability 0 whatever its logit holds. It is
# left out of the maximum and of the sum, and set to 0.


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
# although their logits were not even numbers.
#
# ### From probabilities to a loss
#
# The **surprise** at an event of probability $p$ is $-\log p$. An event
# that was certain surprises by 0; the surprises at two independent events
# add up, because their probabilities multiply. With the natural logarithm
# its unit is the **nat**; with the logarithm to base 2 it is the bit, and
# one nat is 1.4427 bits.
#
# The mean surprise of someone who knows the true probabilities $q$ is their
# **entropy**,
#
# $$ H(q) = -\sum_i q_i \log q_i . \tag{1.11.3} $$
#
# It is largest when all V outcomes are equally likely: then every surprise
# is $\log V$, and so is the mean. The mean surprise of someone who believes
# in $p$ while $q$ is true is the **cross-entropy**,
#
# $$ H(q, p) = -\sum_i q_i \log p_i
#            = H(q) + \sum_i q_i \log \frac{q_i}{p_i} . \tag{1.11.4} $$
#
# The last sum, the Kullback-Leibler divergence, is never negative and is 0
# only for $p = q$ (because $\log x \le x - 1$, it is at least
# $\sum_i q_i (1 - p_i / q_i) = 0$). With $p_i = 1 / V$ the left side is
# $\log V$, so no entropy exceeds that. And the cross-entropy has a floor, the
# entropy of the data; the only way down to it is to believe what is true.
# That is why we minimise it.

# %% entropy and cross-entropy
q = np.array([0.5, 0.25, 0.25])
uniform = np.full(3, 1 / 3)
for name, p in (
    ("q itself", q),
    ("uniform", uniform),
    ("sure", [0.98, 0.01, 0.01]),
):
    print(f"{name:9} {-(q * np.log2(p)).sum():.4f} bits")
print(f"log2 3    {np.log2(3):.4f} bits")
for V in (256, 1024, 50257):
    print(f"log {V:<6}{np.log(V):.4f} nats")

# %% [markdown]
# Belief in $q$ itself costs 1.5 bits, the entropy. Not committing oneself
# costs a little more; being sure of one outcome costs much more when the
# others do happen.
#
# The last line is the loss of a GPT-2 that guesses uniformly. A fresh model
# knows nothing and starts near it ((1.15.4) says how near); a first loss that
# is far off is a mistake. The exponential of a loss, its **perplexity**, is
# the size of a vocabulary among which a uniform guess would do equally well.
#
# Nobody knows the true distribution of text, but every text is a sample
# from it. The mean surprise at the tokens that did come estimates (1.11.4),
# and that is our loss: one number for every position,
#
# $$ \ell = -\log p_k , \tag{1.11.5} $$
#
# and their mean over the B·T positions of a batch.
#
# One corner needs a decision. When $p_k$ has underflowed to 0, its logarithm
# is $-\infty$, and one infinite loss makes the mean infinite. So a
# probability counts as at least the smallest normal number of its dtype,
# about $10^{-38}$ in float32, and a loss computed this way never exceeds 87.4.


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
print("mean", losses.mean().round(4), "nats")
print("perplexity", np.exp(losses.mean()).round(4))

# %% [markdown]
# ## Backward, derived
#
# The layers before this one need
# $dz_i = \partial \mathcal L / \partial z_i$. We go back in the two steps in
# which we came, and then see both as one.
#
# **The cross-entropy.** Only $p_k$ enters (1.11.5). Let $y_i$ be 1 for
# $i = k$ and 0 otherwise (a **one-hot** row). Then
#
# $$ dp_i = -\frac{y_i}{p_k}\, d\ell . \tag{1.11.6} $$
#
# For the mean over the batch, $d\ell = 1/(BT)$ at every position.


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
# **The softmax.** Every $z_j$ enters every $p_i$, because it stands in the
# sum of the denominator. [Chapter 1.8](08_attention.ipynb) has differentiated
# this quotient for attention's weights, (1.8.7). In the letters of this
# chapter, with $\delta_{ij}$ for 1 where $i = j$ and 0 elsewhere,
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
# whatever the logits do. Nobody wants to hold this matrix for 50,257
# tokens, and nobody has to. The chain rule multiplies it by $dp$, and as in
# (1.8.8) the double loop collapses to one sum for the whole row:
#
# $$ dz_j = \sum_i dp_i\, p_i\, (\delta_{ij} - p_j)
#         = p_j\, \Bigl( dp_j - \sum_i p_i\, dp_i \Bigr) . \tag{1.11.8} $$
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
# **Both together.** Put (1.11.6) into (1.11.8). The sum has one term that is not
# zero, $p_k \cdot (-d\ell / p_k) = -d\ell$, hence
#
# $$ dz_j = p_j \Bigl( -\frac{y_j}{p_k}\, d\ell + d\ell \Bigr)
#         = d\ell\, (p_j - y_j) . \tag{1.11.9} $$
#
# In the last step $p_j y_j / p_k = y_j$: where $y_j$ is not 0, $j$ is $k$.
# The division by $p_k$ has gone, and with it the trouble of a $p_k$ near 0.
# What is left is **p - y**: belief minus fact.

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
# If the gradient of both layers is that short, the layers may as well be
# one. Put (1.11.1) into (1.11.5):
#
# $$ \ell = -\log \frac{e^{z_k}}{\sum_j e^{z_j}}
#         = \underbrace{\log \sum_j e^{z_j}}_{\operatorname{lse}} - z_k .
#    \tag{1.11.10} $$
#
# The log of the sum of the exponentials is called **lse**. With
# the largest logit $m$ taken out of the sum it cannot overflow:
#
# $$ \operatorname{lse} = m + \log \sum_j e^{z_j - m} . \tag{1.11.11} $$
#
# No probability is stored and no logarithm of a small number is taken. The
# gradient follows from (1.11.10) in one line, because
# $\partial \operatorname{lse} / \partial z_j
# = e^{z_j} / \sum_i e^{z_i} = p_j$, and
# $p_j = e^{z_j - \operatorname{lse}}$:
#
# $$ dz_j = d\ell\, \bigl( e^{z_j - \operatorname{lse}} - y_j \bigr) .
#    \tag{1.11.12} $$
#
# **What to save.** The logits, which are there anyway, and lse, one number a
# row. Each $dz_j$ needs its own $z_j$ and no other, so it may be written in
# the place of $z_j$: the largest array of the whole model needs no second one
# for its gradient.


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
# The fused backward pass overwrites its gradient, where other layers add to
# theirs. Nothing else reads the logits, so there is no earlier contribution
# to keep; and when it works in place, what stands there is not a gradient
# yet.


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
lse, fused = np.empty((1, 2)), np.empty((1, 2))
crossentropy_softmax_forward(fused, lse, logits, targets, 3)
compare("losses", fused, losses, tol=1e-12)
crossentropy_softmax_backward(logits, np.ones((1, 2)), logits, lse, targets, 3)
compare("in place", logits, probs - onehot, tol=1e-12)

# %% [markdown]
# ### Extreme logits
#
# What does a model look like that is very sure and wrong? Give it one logit
# of 10,000, the rest 0, and let another token come. By (1.11.10) the loss is
# 10,000, and by (1.11.12) the gradient is 1 at the wrong token and -1 at the
# right one. The separate functions see a probability that has underflowed
# to 0: the clamp turns their loss into 87.3, and (1.11.8) multiplies by 0.

# %% sure and wrong
wide = np.zeros((1, 1, 4), np.float32)
wide[0, 0, 1] = 1e4
k, one = np.array([[2]]), np.ones((1, 1), np.float32)
losses, lse, probs = np.empty_like(one), np.empty_like(one), wide.copy()
softmax_forward(probs, wide, 4)
crossentropy_forward(losses, probs, k)
dprobs, dlogits = np.zeros_like(wide), np.zeros_like(wide)
crossentropy_backward(dprobs, one, probs, k)
softmax_backward(dlogits, dprobs, probs)
print("separate", int(losses[0, 0]), dlogits[0, 0].astype(int))
crossentropy_softmax_forward(losses, lse, wide, k, 4)
crossentropy_softmax_backward(dlogits, one, wide, lse, k, 4)
print("fused   ", int(losses[0, 0]), dlogits[0, 0].astype(int))

# %% [markdown]
# Look at token 2, the right one. The separate form sends it 0: where the
# model is most wrong, it learns nothing about what would have been right.
# The fused form is exact. It is the layer of `llmnb`; the separate functions
# have done their work on this page and are not exported.

# %% [markdown]
# ## Proof
#
# Central differences in float64, with step $10^{-5}$ and tolerance
# $10^{-8}$, as in [chapter 1.6](06_layernorm.ipynb). The two halves are
# tested alone, with a random gradient coming in, then the fused
# form with unequal weights `dlosses` for the positions.
#
# The cross-entropy alone needs care: the error of central differences grows
# with the third derivative, here $2 / p_k^3$ in size. So its test takes
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


def fused_loss():
    crossentropy_softmax_forward(losses, lse, logits, targets, V)
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
want = numerical_gradient(fused_loss, logits)
fused_loss()
crossentropy_softmax_backward(dlogits, dlosses, logits, lse, targets, V)
compare("fused", dlogits, want, tol=1e-8)

# %% [markdown]
# Two more properties follow from the derivation: the gradient of a row sums
# to 0 (raising all logits alike changes nothing), and padding gets exactly
# 0.

# %% sums and padding
compare("row sums", dlogits.sum(-1), np.zeros((B, T)), tol=1e-12)
verdict("padding", not dlogits[..., V:].any(), "is exactly 0")

# %% [markdown]
# A plausible mistake: to take the softmax for an elementwise function,
# whose derivative would be $p_j (1 - p_j)$, the diagonal of (1.11.7), and to
# forget that a logit also lowers all other probabilities.


# %% a gradient made wrong on purpose
def diagonal_only(dlogits, dprobs, probs):
    dlogits += dprobs * probs * (1 - probs)


want = numerical_gradient(softmax_loss, logits)
softmax_loss()
wrong = np.zeros_like(logits)
diagonal_only(wrong, g, probs)
try:
    compare("diagonal only", wrong, want, tol=1e-8)
    caught = False
except AssertionError:
    caught = True
verdict("the mistake", caught, "is caught")

# %% [markdown]
# ## Count it
#
# An array of the size of the logits is the largest thing in the model. The
# separate form holds four of them (`logits`, `probs`, `dprobs`,
# `dlogits`); the fused form in place holds one.

# %% bytes for GPT-2
Vp = 50304
for B, T in ((4, 64), (4, 1024)):
    one = 4 * B * T * Vp
    print(f"B={B} T={T}: one array {one / 1e6:.1f} MB,", end=" ")
    print(f"separate {4 * one / 1e6:.1f} MB, fused {one / 1e6:.1f} MB")
print(f"saved by fusing at B=4 T=1024: {3 * one / 1e9:.2f} GB")

# %% [markdown]
# For comparison, all 124M parameters together take 0.50 GB.

# %% [markdown]
# ## See it
#
# A row of eight logits goes through the layer. The token that came next is
# the fifth.

# %% one row through the layer
row = np.array([[[0.5, 2.0, -1.0, 0.0, 1.2, -0.5, 1.0, -2.0]]])
target = np.array([[4]])
prob, grad, one = np.empty_like(row), np.empty_like(row), np.ones((1, 1))
softmax_forward(prob, row, 8)
losses, lse = np.empty((1, 1)), np.empty((1, 1))
crossentropy_softmax_forward(losses, lse, row, target, 8)
crossentropy_softmax_backward(grad, one, row, lse, target, 8)
colours = [PALETTE["blue"]] * 8
colours[4] = PALETTE["orange"]
fig, axes = plt.subplots(3, 1, figsize=(6, 5), dpi=100, sharex=True)
labels = "logits z", "probabilities p", "gradient p - y"
for ax, x, label in zip(axes, (row, prob, grad), labels, strict=True):
    ax.bar(range(8), x[0, 0], color=colours)
    ax.axhline(0, color=PALETTE["ink"], linewidth=0.8)
    ax.set_ylabel(label)
    ax.spines[["top", "right", "bottom"]].set_visible(False)
axes[2].set_xlabel("token (orange: the one that came next)")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.11.2. The gradient equals the probabilities except at the token
# that came, where it is negative and balances all the others. Tokens that
# the model did not believe in are left in peace.*
#
# Why cross-entropy and not, say, the squared distance $(1 - p_k)^2$? Both
# are 0 for a perfect prediction. Let $x$ be the lead of the right logit,
# $x = z_k - \log \sum_{j \ne k} e^{z_j}$, so that
# $p_k = 1 / (1 + e^{-x})$.

# %% two losses and their slopes
x = np.linspace(-8, 8, 321)
pk = 1 / (1 + np.exp(-x))
fig, (ax, bx) = plt.subplots(2, 1, figsize=(6, 5.4), dpi=100, sharex=True)
styles = {"color": PALETTE["blue"]}, {"color": PALETTE["orange"], "ls": "--"}
ax.plot(x, -np.log(pk), label="cross-entropy", **styles[0])
ax.plot(x, (1 - pk) ** 2, label="squared distance", **styles[1])
ax.set_ylabel("loss")
ax.legend(frameon=False)
bx.plot(x, pk - 1, **styles[0])
bx.plot(x, -2 * pk * (1 - pk) ** 2, **styles[1])
bx.set_ylabel("slope")
bx.set_xlabel("lead x of the right logit")
for axis in (ax, bx):
    axis.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.11.3. Where the model is wrong (left), cross-entropy pulls with a
# slope near -1 however far away it is, while the slope of the squared
# distance fades to 0: a hopeless prediction would stay hopeless. Where the
# model is right (right), both let go.*

# %% [markdown]
# ## Take away
#
# - Softmax sees differences of logits only, so the largest may be
#   subtracted, and then nothing overflows.
# - Cross-entropy is the mean surprise. A uniform guess costs $\log V$; the
#   floor is the entropy of the text.
# - The Jacobian collapses to one sum a row, and with cross-entropy to
#   p - y.
# - The fused form keeps one number a row, works in place, and stays exact
#   where probabilities underflow.

# %% [markdown]
# ## Design note
#
# We save lse, not $m$ and the sum apart. That is one number instead
# of two, at a price: $e^{z - \operatorname{lse}}$ inherits the rounding of
# lse, which is $4 \cdot 10^{-6}$ for one near 100 in float32. Saving two
# numbers would bring that to $10^{-7}$. Such an error scales a whole row of
# the gradient by four parts in a million, far below the noise that a batch
# of random text brings, so one number it is.

# %% [markdown]
# ## Exercises
#
# **1** (★). A model's loss is 3.0 nats a token. Which perplexity is that?
# A second model has half the perplexity: what is its loss? Predict both,
# then check.
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# The perplexity is $e^3 = 20.09$. Half of it means a loss lower by $\ln 2$:
# $3 - 0.6931 = 2.3069$.
# :::

# %% exercise 1, checked tags=["hide-cell"]
compare("perplexity", np.exp(3.0), 20.0855, tol=1e-5)
compare("half of it", np.log(np.exp(3.0) / 2), 2.3069, tol=1e-4)

# %% [markdown]
# **2** (★★). Divide all logits by a **temperature** $\tau$ before the
# softmax. Derive the gradient of the loss by $z_j$ and by $\tau$.
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# With $u = z / \tau$ the layer gives $du_j = p_j - y_j$, where $p$ is the
# softmax of $u$. From $\partial u_j / \partial z_j = 1 / \tau$ follows
# $dz_j = (p_j - y_j) / \tau$, and from
# $\partial u_j / \partial \tau = -z_j / \tau^2$ follows
# $d\tau = -\sum_j (p_j - y_j)\, z_j / \tau^2$.
# :::


# %% exercise 2, the gradients tags=["hide-cell"]
def tempered(z, tau, k):
    u = z / tau
    return np.log(np.exp(u - u.max()).sum()) + u.max() - u[k]


def tempered_gradients(z, tau, k):
    u = z / tau
    p = np.exp(u - u.max())
    du = p / p.sum() - np.eye(len(z))[k]
    return du / tau, -(du * z).sum() / tau**2


# %% exercise 2, checked
z, tau = rng.normal(size=6), np.array(0.7)
dz, dtau = tempered_gradients(z, float(tau), 2)
want = numerical_gradient(lambda: tempered(z, tau, 2), z)
compare("dz", dz, want, tol=1e-8)
want = numerical_gradient(lambda: tempered(z, tau, 2), tau)
compare("dtau", dtau, want, tol=1e-8)

# %% [markdown]
# **3** (★★). **Label smoothing** replaces the one-hot $y$ by
# $q_i = (1 - \epsilon)\, y_i + \epsilon / V$, so that the model is not
# asked for certainty. Give the gradient of $H(q, p)$ by the logits.
#
# :::{admonition} Solution to exercise 3
# :class: dropdown
# $H(q, p) = \operatorname{lse} \sum_i q_i - \sum_i q_i z_i$, which is
# $\operatorname{lse} - \sum_i q_i z_i$,
# because $q$ sums to 1. Hence $dz_j = p_j - q_j$.
# :::


# %% exercise 3, the gradient tags=["hide-cell"]
def smoothed(z, k, eps):
    q = (1 - eps) * np.eye(len(z))[k] + eps / len(z)
    lse = np.log(np.exp(z).sum())
    return lse - (q * z).sum(), np.exp(z - lse) - q


# %% exercise 3, checked
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

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("1.11")
