# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       reference.crossentropy: "Softmax and cross-entropy in NumPy, forward and backward."
#       cpu.crossentropy: "Softmax and cross-entropy, compiled for the processor's cores."
#       cuda.crossentropy: "Softmax and cross-entropy on a GPU, forward and backward."
# ---

# %% [markdown]
# # Turn logits into a loss and its gradient
#
# > Softmax makes probabilities of logits, cross-entropy measures the surprise
# > at the right token, and the gradient of both together is p - y.

# %% [markdown]
# ## Where we are

# %% where we are
from llmnb.book.diagram import gpt2_diagram

gpt2_diagram(lit="crossentropy")

# %% [markdown]
# *Figure 1.11.1. Softmax and cross-entropy end the forward pass: the logits go
# in and the loss comes out. The backward pass begins here.*
#
# The last matmul gives every position V numbers, one for each token that
# might come next. They are called **logits**; they may have any size and
# either sign. This chapter turns them into probabilities, compares these
# with the token that did come next, and sends back the first gradient of
# the backward pass. At its end you can
#
# - compute a softmax that no logit can make overflow;
# - say what a loss of 10.82 means for a vocabulary of 50,257 tokens, and why
#   an untrained model starts there;
# - derive the Jacobian of the softmax and see it collapse, first to one sum
#   a row, then to p - y;
# - say why the fused form saves one number a row where the separate form
#   saves V, and survives logits on which the separate one loses its
#   gradient;
# - merge the maxima and sums that a thousand threads of a GPU have found in
#   one row, and count the bytes that a kernel moves for it.
#
# You need central differences from [chapter 1.4](04_gpt2.ipynb) and, for the
# kernels, `fast_exp` from [chapter 1.8](08_attention.ipynb) and the GPU of
# [chapter 3.1](../3_gpu/01_threads.ipynb).

# %% [markdown]
# ## Setup

# %% setup
import functools
from types import SimpleNamespace

import matplotlib.pyplot as plt

from llmnb.book.diagram import PALETTE
from llmnb.timing import fastest, machine
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
# Below, one row is one position: $z_i$ is its logit $i$, and $k$ is its
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


# %% the softmax tags=["export"]
@shapes("B T Vp!, B T Vp~, 1 to Vp")
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
# knows nothing and starts near it; whatever lies far above at step 0 is a
# mistake. The exponential of a loss, its **perplexity**, is the size of a
# vocabulary among which a uniform guess would do equally well.
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
# is $-\infty$, and the kernels further down are compiled under the promise
# that no infinity occurs. So a probability counts as at least the smallest
# normal number of its dtype, about $10^{-38}$ in float32, and a loss computed
# this way never exceeds 87.4.


# %% the cross-entropy tags=["export"]
@shapes("B T!, B T Vp, B T of Vp")
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
# The layers below need $dz_i = \partial \mathcal L / \partial z_i$. We go
# back in the two steps in which we came, and then see both as one.
#
# **The cross-entropy.** Only $p_k$ enters (1.11.5). Let $y_i$ be 1 for
# $i = k$ and 0 otherwise (a **one-hot** row). Then
#
# $$ dp_i = -\frac{y_i}{p_k}\, d\ell . \tag{1.11.6} $$
#
# For the mean over the batch, $d\ell = 1/(BT)$ at every position.


# %% the gradient of the cross-entropy tags=["export"]
@shapes("B T Vp!, B T, B T Vp, B T of Vp")
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
# **The softmax.** Every $z_j$ enters every $p_i$ through the sum. Write
# $S = \sum_j e^{z_j}$, so that $p_i = e^{z_i} / S$ and
# $\partial S / \partial z_j = e^{z_j}$. The quotient rule gives, for
# $i \ne j$, where only the denominator moves,
#
# $$ \frac{\partial p_i}{\partial z_j}
#    = -\frac{e^{z_i}}{S^2}\, e^{z_j} = -p_i\, p_j , $$
#
# and for $i = j$, where the numerator moves too,
# $e^{z_i} / S - p_i p_i$. With $\delta_{ij}$ for 1 where $i = j$ and 0
# elsewhere, both are
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
# tokens, and nobody has to. The chain rule multiplies it by $dp$,
#
# $$ dz_j = \sum_i dp_i\, p_i\, (\delta_{ij} - p_j)
#         = p_j\, dp_j - p_j \sum_i p_i\, dp_i , $$
#
# and the double loop collapses to one sum for the whole row:
#
# $$ dz_j = p_j\, \Bigl( dp_j - \sum_i p_i\, dp_i \Bigr) . \tag{1.11.8} $$
#
# In words: each logit hears by how much the gradient of its own probability
# differs from the average, the average being taken with the model's own
# probabilities. A padding column has $p_j = 0$ and hears nothing.


# %% the gradient of the softmax tags=["export"]
@shapes("B T Vp!, B T Vp, B T Vp")
def softmax_backward(dlogits, dprobs, probs):
    """Add the gradient by the logits to `dlogits`.

    dlogits, dprobs, probs: float (B, T, Vp). Padding has probability 0, so
    its columns receive 0.
    """
    inside = (dprobs * probs).sum(-1, keepdims=True)
    dlogits += probs * (dprobs - inside)


# %% the collapse against the matrix
dp = rng.normal(size=3)
dz = np.zeros(3)
softmax_backward(*(x.reshape(1, 1, 3) for x in (dz, dp, p)))
compare("10.8 and 10.7", dz, jacobian.T @ dp, tol=1e-12)

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
#         = \underbrace{\log \sum_j e^{z_j}}_{\lambda} - z_k . \tag{1.11.10} $$
#
# The log of the sum of the exponentials, $\lambda$, is called **lse**. With
# the largest logit $m$ taken out of the sum it cannot overflow:
#
# $$ \lambda = m + \log \sum_j e^{z_j - m} . \tag{1.11.11} $$
#
# No probability is stored and no logarithm of a small number is taken. The
# gradient follows from (1.11.10) in one line, because
# $\partial \lambda / \partial z_j = e^{z_j} / S = p_j$, and
# $p_j = e^{z_j - \lambda}$:
#
# $$ dz_j = d\ell\, \bigl( e^{z_j - \lambda} - y_j \bigr) . \tag{1.11.12} $$
#
# **What to save.** The logits, which are there anyway, and $\lambda$, one
# number a row. Each $dz_j$ needs its own $z_j$ and no other, so it may
# be written in the place of $z_j$: the largest array of the whole model
# needs no second one for its gradient.


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
# The fused backward pass is the one function of this book that overwrites
# its gradient instead of adding to it. Nothing else reads the logits, so there
# is no earlier contribution to keep; and when it works in place, what
# stands there is not a gradient yet.


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
# The fused form is exact. Training uses the fused form; the separate one
# serves wherever probabilities themselves are wanted.

# %% [markdown]
# ## Proof
#
# Central differences in float64, with step $10^{-5}$ and tolerance
# $10^{-8}$, as in [chapter 1.6](06_layernorm.ipynb). The two halves are
# tested alone, with a random gradient coming from above, then the fused
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
# ## Fast on a CPU
#
# NumPy's fused forward pass reads the logits for the maximum, reads them
# again to write `logits - top` to a temporary, reads that to write its
# exponential to another, and reads that for the sum. For 64 rows of GPT-2
# each of these arrays has 13 MB, more than a core's own caches hold. One
# row has 200 KB and stays in the second-level cache: a kernel that finishes
# a row before it takes the next one reads memory once.

# %% keep the NumPy versions
reference = SimpleNamespace(
    softmax_forward=softmax_forward,
    softmax_backward=softmax_backward,
    crossentropy_forward=crossentropy_forward,
    crossentropy_backward=crossentropy_backward,
    fused_forward=crossentropy_softmax_forward,
    fused_backward=crossentropy_softmax_backward,
)

# %% imports of the kernels tags=["export"] module="cpu.crossentropy"
import math

import numba
import numpy as np

from llmnb.cpu.jit import arguments, share, team
from llmnb.cpu.math import fast_exp
from llmnb.shapes import COMPILED, shapes

# %% [markdown]
# The fused forward pass takes two sweeps over a row, one for $m$ and one
# for the sum. The exponential decides how long that takes. NumPy's works on
# whole vectors of numbers. In a kernel, `math.exp` is a call to a library
# that takes one number at a time; `fast_exp` is a polynomial, which LLVM
# turns into vector instructions like any other arithmetic.
#
# Rows are independent, so the threads share them out, and each sum is taken
# by one thread in one order.
#
# The sum starts as a zero of the row's own dtype. `top * 0` would not do:
# numba, like NumPy's arrays, takes float32 times a 64-bit integer for
# float64, and the loop would convert every number.


# %% the fused forward kernel tags=["exporti"] module="cpu.crossentropy"
@team
def _fused_forward(part, parts, address):
    logits, losses, lse, targets, V = arguments(address)
    zero, mine = logits.dtype.type(0), share(len(logits), part, parts)
    for n in range(mine.start, mine.stop):
        top, total = logits[n, 0], zero
        for i in range(V):
            top = max(top, logits[n, i])
        for i in range(V):
            total += fast_exp(logits[n, i] - top)
        lse[n] = top + math.log(total)
        losses[n] = lse[n] - logits[n, targets[n]]


# %% [markdown]
# The backward kernel works in place and takes one array, not two; where the
# caller brings two, the logits are copied first. In place is the common
# case. The few columns of padding are set to zero by NumPy, outside,
# so that the kernel is one loop and soon compiled.


# %% the fused backward kernel tags=["exporti"] module="cpu.crossentropy"
@team
def _fused_backward(part, parts, address):
    dlogits, dlosses, lse, targets, V = arguments(address)
    mine = share(len(dlogits), part, parts)
    for n in range(mine.start, mine.stop):
        scale, shift = dlosses[n], lse[n]
        for i in range(V):
            dlogits[n, i] = scale * fast_exp(dlogits[n, i] - shift)
        dlogits[n, targets[n]] -= scale


# %% [markdown]
# numba does not check bounds: a target of 50,300 would read a padding column,
# and one of 60,000 the next row, without a word. So every public function
# has the line of the reference above it, and then views its arrays as rows.


# %% views as rows tags=["exporti"] module="cpu.crossentropy"
def _rows(*arrays):
    """Arrays (B, T, Vp) or (B, T) with one row, or number, a token."""
    return [x.reshape(-1, *x.shape[2:]) for x in arrays]


# %% the fused forward tags=["export"] module="cpu.crossentropy"
@shapes("B T!, B T!, B T Vp, B T of V, 1 to Vp", COMPILED)
def crossentropy_softmax_forward(losses, lse, logits, targets, V):
    """Losses straight from the logits; no probability is stored.

    losses, lse: (B, T), written; lse is the log of the sum of the
    exponentials of a row, all that the backward pass needs besides the
    logits. logits: float32 or float64 (B, T, Vp), of which columns from V
    on are not read. targets: int32 (B, T), each below V. Raises TypeError
    or ValueError for a wrong dtype or shape, a target outside [0, V) and a
    V outside [1, Vp].
    """
    _fused_forward(*_rows(logits, losses, lse, targets), V)


# %% the fused backward tags=["export"] module="cpu.crossentropy"
@shapes("B T Vp!, B T, B T Vp~, B T, B T of V, 1 to Vp", COMPILED)
def crossentropy_softmax_backward(dlogits, dlosses, logits, lse, targets, V):
    """Write the gradient of the losses by the logits: p - y, scaled.

    dlogits: (B, T, Vp), overwritten (not added to); it may be `logits`
    itself, which then is lost. dlosses, lse: (B, T), lse from the forward
    pass. logits: float32 or float64 (B, T, Vp). targets: int32 (B, T).
    Columns from V on receive 0. Raises as the forward pass does.
    """
    if dlogits is not logits:
        np.copyto(dlogits, logits)
    _fused_backward(*_rows(dlogits, dlosses, lse, targets), V)
    dlogits[..., V:] = 0


# %% [markdown]
# The separate functions follow the same pattern.


# %% the softmax kernel tags=["export"] module="cpu.crossentropy"
@team
def _softmax_forward(part, parts, address):
    probs, V = arguments(address)
    zero, one = probs.dtype.type(0), probs.dtype.type(1)
    mine = share(len(probs), part, parts)
    for n in range(mine.start, mine.stop):
        top, total = probs[n, 0], zero
        for i in range(V):
            top = max(top, probs[n, i])
        for i in range(V):
            probs[n, i] = fast_exp(probs[n, i] - top)
            total += probs[n, i]
        factor = one / total
        for i in range(V):
            probs[n, i] *= factor


# %% the softmax, forward tags=["export"] module="cpu.crossentropy"
@shapes("B T Vp!, B T Vp~, 1 to Vp")
def softmax_forward(probs, logits, V):
    """Probabilities of the first V logits in each row.

    probs, logits: float32 or float64 (B, T, Vp). Columns from V on are
    padding: their logits are not read and their probability is 0. Writes
    `probs`, which may be `logits` itself. Raises TypeError or ValueError
    for a wrong dtype or shape and for V outside [1, Vp].
    """
    if probs is not logits:
        np.copyto(probs, logits)
    _softmax_forward(*_rows(probs), V)
    probs[..., V:] = 0


# %% the softmax, backward tags=["export"] module="cpu.crossentropy"
@team
def _softmax_backward(part, parts, address):
    probs, dlogits, dprobs = arguments(address)
    rows, Vp = probs.shape
    zero, mine = probs.dtype.type(0), share(rows, part, parts)
    for n in range(mine.start, mine.stop):
        inside = zero
        for i in range(Vp):
            inside += probs[n, i] * dprobs[n, i]
        for i in range(Vp):
            dlogits[n, i] += probs[n, i] * (dprobs[n, i] - inside)


@shapes("B T Vp!, B T Vp, B T Vp")
def softmax_backward(dlogits, dprobs, probs):
    """Add the gradient by the logits to `dlogits`.

    dlogits, dprobs, probs: float32 or float64 (B, T, Vp). Padding has
    probability 0, so its columns receive 0. Raises TypeError or ValueError
    for a wrong dtype or shape.
    """
    _softmax_backward(*_rows(probs, dlogits, dprobs))


# %% the cross-entropy, forward tags=["export"] module="cpu.crossentropy"
@team
def _crossentropy_forward(part, parts, address):
    probs, losses, targets, tiny = arguments(address)
    mine = share(losses.size, part, parts)
    for n in range(mine.start, mine.stop):
        losses[n] = -math.log(max(probs[n, targets[n]], tiny))


@shapes("B T!, B T Vp, B T of Vp", COMPILED)
def crossentropy_forward(losses, probs, targets):
    """Surprise at each target, in nats: minus the log of its probability.

    losses: (B, T), written. probs: float32 or float64 (B, T, Vp). targets:
    int32 (B, T). A probability below the smallest normal number counts as
    that number. Raises TypeError or ValueError for a wrong dtype or shape
    and for a target outside [0, Vp).
    """
    rows = _rows(probs, losses, targets)
    _crossentropy_forward(*rows, np.finfo(probs.dtype).tiny)


# %% the cross-entropy, backward tags=["export"] module="cpu.crossentropy"
@team
def _crossentropy_backward(part, parts, address):
    probs, dprobs, dlosses, targets, tiny = arguments(address)
    mine = share(dlosses.size, part, parts)
    for n in range(mine.start, mine.stop):
        k = targets[n]
        dprobs[n, k] -= dlosses[n] / max(probs[n, k], tiny)


@shapes("B T Vp!, B T, B T Vp, B T of Vp", COMPILED)
def crossentropy_backward(dprobs, dlosses, probs, targets):
    """Add the gradient of the losses by the probabilities to `dprobs`.

    dprobs, probs: float32 or float64 (B, T, Vp); dlosses: (B, T); targets:
    int32 (B, T). Only the targets' columns of `dprobs` change. Raises as
    `crossentropy_forward` does.
    """
    rows = _rows(probs, dprobs, dlosses, targets)
    _crossentropy_backward(*rows, np.finfo(probs.dtype).tiny)


# %% [markdown]
# The verdict, in float32 and on sizes that divide nothing:

# %% keep the kernels
cpu = SimpleNamespace(
    softmax_forward=softmax_forward,
    softmax_backward=softmax_backward,
    crossentropy_forward=crossentropy_forward,
    crossentropy_backward=crossentropy_backward,
    fused_forward=crossentropy_softmax_forward,
    fused_backward=crossentropy_softmax_backward,
)


# %% a problem of any size and dtype
def problem(B, T, V, Vp, dtype=np.float32):
    p = SimpleNamespace(V=V)
    p.logits = (3 * rng.normal(size=(B, T, Vp))).astype(dtype)
    p.targets = rng.integers(0, V, (B, T)).astype(np.int32)
    p.dlosses = np.full((B, T), 1 / (B * T), dtype)
    p.losses, p.lse, p.surprise = np.zeros((3, B, T), dtype)
    p.probs, p.dprobs, p.dlogits, p.fused = np.zeros((4, B, T, Vp), dtype)
    return p


def separate(p, layer):
    layer.softmax_forward(p.probs, p.logits, p.V)
    layer.crossentropy_forward(p.surprise, p.probs, p.targets)
    layer.crossentropy_backward(p.dprobs, p.dlosses, p.probs, p.targets)
    layer.softmax_backward(p.dlogits, p.dprobs, p.probs)


def fused(p, layer, out):
    layer.fused_forward(p.losses, p.lse, p.logits, p.targets, p.V)
    layer.fused_backward(out, p.dlosses, p.logits, p.lse, p.targets, p.V)


# %% float32, odd sizes
names = ["losses", "lse", "fused", "probs", "surprise", "dprobs", "dlogits"]
p = problem(3, 37, 331, 384)
results = []
for layer in (cpu, reference):
    p.dprobs[...], p.dlogits[...] = 0, 0
    separate(p, layer)
    fused(p, layer, p.fused)
    results.append({k: getattr(p, k).copy() for k in names})
got, want = results
for k in names:
    compare(k, got[k], want[k])

# %% [markdown]
# `fused` and `dlogits` are the same gradient by two ways, and the kernel
# gives it in place too. A target in the padding is refused:

# %% in place, and a bad target
compare("two ways", got["fused"], got["dlogits"])
fused(p, cpu, p.logits)
verdict("in place", np.array_equal(p.logits, got["fused"]), "same bits")
p.targets[2, 5] = 331
try:
    fused(p, cpu, p.fused)
except ValueError as error:
    print(error)

# %% [markdown]
# Now the time, for 64 positions of GPT-2's vocabulary. Between NumPy and
# the kernel stands one that differs in a single name, `math.exp`. It saves
# the temporaries, and yet it may lose to NumPy's vectors.


# %% with the library's exponential
@team
def library_forward(part, parts, address):
    logits, losses, lse, targets, V = arguments(address)
    zero, mine = logits.dtype.type(0), share(len(logits), part, parts)
    for n in range(mine.start, mine.stop):
        top, total = logits[n, 0], zero
        for i in range(V):
            top = max(top, logits[n, i])
        for i in range(V):
            total += math.exp(logits[n, i] - top)
        lse[n] = top + math.log(total)
        losses[n] = lse[n] - logits[n, targets[n]]


p = problem(1, 64, 50257, 50304)
rows = p.logits[0], p.losses[0], p.lse[0], p.targets[0], p.V
library_forward(*rows)
library = p.losses.copy()
arrays = p.losses, p.lse, p.logits, p.targets, p.V
cpu.fused_forward(*arrays)
compare("both kernels", p.losses, library)

# %% three forward passes, timed tags=["nbval-ignore-output"]
slow = fastest(reference.fused_forward, *arrays, runs=5)
middle = fastest(library_forward, *rows)
fast = fastest(cpu.fused_forward, *arrays)
print(f"{machine()}, {numba.get_num_threads()} threads")
print(f"NumPy               {slow * 1e3:7.2f} ms")
print(f"kernel, math.exp    {middle * 1e3:7.2f} ms, {slow / middle:.1f} x")
print(f"kernel, fast_exp    {fast * 1e3:7.2f} ms, {slow / fast:.1f} x")

# %% forward and backward, timed tags=["nbval-ignore-output"]
numpy_time = fastest(fused, p, reference, p.fused, runs=5)
apart_time = fastest(separate, p, cpu)
fused_time = fastest(fused, p, cpu, p.fused)
print(f"NumPy, fused        {numpy_time * 1e3:7.2f} ms")
print(f"kernels, separate   {apart_time * 1e3:7.2f} ms")
print(f"kernels, fused      {fused_time * 1e3:7.2f} ms")

# %% [markdown]
# ## On a GPU
#
# On the CPU a row stayed in a core's cache between two sweeps, and the
# exponential decided the time. On a GPU it is the memory that decides. By
# NVIDIA's data sheet an H100 computes 67 TFLOP/s in float32 and moves 3,350
# GB/s, 20 operations a byte or 80 for a logit of four bytes. The fused
# forward pass needs for each logit a comparison, a difference, an
# exponential and a sum, where the exponential is a product and an
# instruction for $2^x$. So this section counts what is moved. For the
# softmax the least is 8 bytes an element: each logit read once, each
# probability written once.
#
# The work of a row can be given to one thread, to a warp, or to a block.

# %% who owns what
from llmnb.book.owners import draw_owners

rows, columns = range(3), range(16)
panels = {
    "a thread a row": ([[i for j in columns] for i in rows], None),
    "a warp a row": ([[4 * i + j % 4 for j in columns] for i in rows], 4),
    "vectors of four": ([[4 * i + j // 4 for j in columns] for i in rows], 4),
}
fig, axes = plt.subplots(3, 1, figsize=(6, 4.8), dpi=100)
for ax, (title, (who, group)) in zip(axes, panels.items(), strict=True):
    draw_owners(ax, who, title, group, rows="rows")
axes[2].set_xlabel("columns; the number is the thread's")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.11.2. Three rows of 16 logits, for warps that are drawn with four
# threads instead of 32. Above, threads that run together read a column, one
# element of each row; in the middle, they read neighbours; below, each
# takes four neighbours at a time.*
#
# The arguments are checked as on the CPU, with one exception. The targets
# lie in the GPU's memory; to look at them, the host would have to wait for
# all work before and to copy them back. So the caller checks their range on
# the host, before they are copied to the GPU.


# %% imports of the GPU's kernels tags=["export"] module="cuda.crossentropy"
import math

import numpy as np

from llmnb.gpu.launch import DEVICE, aligned, device, kernel, numbered
from llmnb.gpu.simulator import cuda, load4, store4
from llmnb.gpu.warp import block_max, block_sum, warp_max, warp_sum
from llmnb.shapes import shapes


# %% views as rows tags=["exporti"] module="cuda.crossentropy"
def _device_rows(name, first, *others):
    """The device's arrays with one row, or number, a token."""
    if not first.size:
        raise ValueError(f"{name}: B, T and Vp must not be 0")
    arrays = (first, *others)
    return [x.reshape(-1, *tuple(x.shape)[2:]) for x in arrays]


# %% [markdown]
# Each version gets a verdict on six rows of 101 logits, padded to 128 with
# NaN, and is counted by the simulator of [chapter 3.1](../3_gpu/01_threads.ipynb). No GPU
# has run these kernels yet. The tests compile them for two generations of
# GPU, sm_80 and sm_90, and check what the text says of registers and vector
# loads. Times are missing for that reason: `llmnb bench --backend cuda
# --kernels` measures them where there is a GPU, and the results page shows
# them once they are measured.

# %% a verdict and counts for a version
from llmnb.gpu.launch import empty, simulated, to_device, to_host
from llmnb.gpu.simulator import RaceError, watch

small = problem(2, 3, 101, 128)
small.logits[..., 101:] = np.nan
reference.softmax_forward(small.probs, small.logits, 101)


def try_softmax(run):
    probs = empty((6, 128))
    run(probs, to_device(small.logits.reshape(6, 128)), 101)
    compare("softmax", to_host(probs), small.probs.reshape(6, 128))


def count_softmax(number, run, rows, V, Vp):
    logits = simulated(np.zeros((rows, Vp), np.float32))
    with watch() as seen:
        run(empty((rows, Vp), like=logits), logits, V)
    each = seen.barriers // seen.threads
    print(f"version {number}: {seen.read_bytes:6,} bytes read,", end=" ")
    print(f"{seen.requests:5,} requests,", end=" ")
    print(f"{seen.sectors:6,} sectors, barriers: {each}")


# %% [markdown]
# ### Version 1: a thread a row
#
# The CPU's kernel with the loop over the rows taken off: three sweeps, for
# the maximum, for the sum, and for the probabilities. The last computes
# each exponential again. The CPU's kernel stored it in `probs` and read it
# back, 8 bytes more an element; here arithmetic is what there is plenty of.


# %% version 1 tags=["exporti"] module="cuda.crossentropy"
@kernel
def _softmax_by_threads(probs, logits, V):
    row = cuda.grid(1)
    if row >= len(logits):
        return
    top, total = logits[row, 0], np.float32(0)
    for i in range(1, V):
        top = max(top, logits[row, i])
    for i in range(V):
        total += math.exp(logits[row, i] - top)
    scale = np.float32(1) / total
    for i in range(V):
        probs[row, i] = scale * math.exp(logits[row, i] - top)
    for i in range(V, logits.shape[1]):
        probs[row, i] = np.float32(0)


def _softmax_thread_a_row(probs, logits, V):
    grid = -(-len(logits) // 64)
    _softmax_by_threads[grid, 64](probs, logits, V)


# %% version 1, tried
try_softmax(_softmax_thread_a_row)

# %% [markdown]
# ### Version 2: a warp a row
#
# In version 1 the 32 threads of a warp read one column of 32 rows at once:
# 32 addresses that lie a row apart, each in a sector of its own of which 28
# bytes are not asked for. Let the lanes of a warp share a row instead, lane
# 0 taking columns 0, 32, 64 and so on. One request then covers 128 bytes in
# a row, four sectors.
#
# Each lane ends with the maximum of its own columns. `warp_max` exchanges
# these until all lanes have the largest, and `warp_sum` does the same for
# the sums. A lane that has no column brings `_LOWEST`. On paper this is
# $-\infty$, but fastmath assumes that there is no infinity. The GPU computes
# $e^x$ as $2^{x \log_2 e}$, so the number is chosen such that this product
# is finite too.


# %% version 2 tags=["exporti"] module="cuda.crossentropy"
_LOWEST = np.float32(-1e38)  # below every logit; times log2(e) still finite


@device
def _put_probs(probs, logits, row, V, first, step, top, scale):
    """Write every step-th probability of a row, and 0 in the padding."""
    for i in range(first, logits.shape[1], step):
        p = np.float32(0)
        if i < V:
            p = scale * math.exp(logits[row, i] - top)
        probs[row, i] = p


@kernel
def _softmax_by_warps(probs, logits, V):
    row, lane = cuda.grid(1) // 32, cuda.threadIdx.x % 32
    if row >= len(logits):
        return
    top, total = _LOWEST, np.float32(0)
    for i in range(lane, V, 32):
        top = max(top, logits[row, i])
    top = warp_max(top)
    for i in range(lane, V, 32):
        total += math.exp(logits[row, i] - top)
    scale = np.float32(1) / warp_sum(total)
    _put_probs(probs, logits, row, V, lane, 32, top, scale)


def _softmax_warp_a_row(probs, logits, V):
    grid = -(-len(logits) // 4)
    _softmax_by_warps[grid, 128](probs, logits, V)


# %% version 2, tried and counted
try_softmax(_softmax_warp_a_row)
ladder = _softmax_thread_a_row, _softmax_warp_a_row
for number, run in enumerate(ladder, 1):
    count_softmax(number, run, 32, 125, 128)

# %% [markdown]
# The bytes that the threads ask for are the same. The sectors are about an
# eighth of what they were, because each is now used whole.
#
# ### Version 3: a block a row
#
# GPT-2's rows have 50,257 logits. A lane of version 2 takes 1,571 of them
# one after the other, three times. And a batch of 4 x 64 positions makes 256
# warps, where one multiprocessor of an A100 or H100 has room for 64 (by
# NVIDIA's data sheet): four of them would hold the batch, and the others
# stand idle. With 1,024 threads a row a thread takes 50 logits, and the same
# batch has 8,192 warps.
#
# The price is that 32 warps have to agree. `block_max` and `block_sum`
# pass through shared memory, with two barriers each. A short row gets a
# smaller block, no more threads than it has logits.


# %% version 3 tags=["exporti"] module="cuda.crossentropy"
def _threads(n, most=1024):
    """Threads for n things: whole warps, and no more than `most`."""
    return min(most, -(-n // 32) * 32)


@kernel(launch_bounds=1024)
def _softmax_by_blocks(probs, logits, V):
    row, me = cuda.blockIdx.x, cuda.threadIdx.x
    step, parts = cuda.blockDim.x, cuda.shared.array(32, np.float32)
    top, total = _LOWEST, np.float32(0)
    for i in range(me, V, step):
        top = max(top, logits[row, i])
    top = block_max(top, parts)
    for i in range(me, V, step):
        total += math.exp(logits[row, i] - top)
    scale = np.float32(1) / block_sum(total, parts)
    _put_probs(probs, logits, row, V, me, step, top, scale)


def _softmax_block_a_row(probs, logits, V):
    block = _threads(V)
    _softmax_by_blocks[len(logits), block](probs, logits, V)


# %% version 3, tried
try_softmax(_softmax_block_a_row)

# %% [markdown]
# ### Version 4: maximum and sum in one pass
#
# Versions 1 to 3 read each logit three times and write a probability once,
# 16 bytes an element. A row of GPT-2 has 201 KB and does not fit into the
# 48 KB of shared memory that a block may use here, so the way to read less
# is to need less: the online softmax (1.8.12) of
# [chapter 1.8](08_attention.ipynb). Keep a pair $(m, s)$ of the largest logit
# so far and of the sum $s = \sum e^{z_i - m}$ of those read. One more logit
# $z$ changes it to
#
# $$ (m', s') = \begin{cases}
#    (z,\; s\, e^{-|z - m|} + 1) & z > m, \\
#    (m,\; s + e^{-|z - m|}) & \text{otherwise.} \end{cases} $$
#
# Both cases need the same exponential, so the lanes of a warp do not have
# to part ways.


# %% one more logit tags=["exporti"] module="cuda.crossentropy"
@device
def _with_logit(top, total, x):
    """The pair of some logits, and of one more: one exponential."""
    less = math.exp(-abs(x - top))
    if x > top:
        return x, total * less + np.float32(1)
    return top, total + less


# %% [markdown]
# Lanes and warps now exchange pairs. Two sets of logits with the pairs
# $(m_a, s_a)$ and $(m_b, s_b)$ have together the pair
#
# $$ m = \max(m_a, m_b), \qquad
#    s = s_a\, e^{m_a - m} + s_b\, e^{m_b - m} , \tag{1.11.13} $$
#
# and one of the two exponentials is $e^0$. A lane that has seen nothing
# brings (`_LOWEST`, 0): whatever it is merged with stays as it is. Five
# exchanges merge 32 lanes; in each, a lane meets the one whose number
# differs in one bit. Below, four lanes do it in Python, with the functions
# of the kernel.


# %% two pairs tags=["exporti"] module="cuda.crossentropy"
@device
def _merged(top, total, other, more):
    """The pair of two sets of logits from the pair of each."""
    less = math.exp(-abs(other - top))
    if other > top:
        return other, total * less + more
    return top, total + more * less


@device
def _warp_merged(top, total):
    """The pair of all logits that the lanes of a warp have seen."""
    for step in (16, 8, 4, 2, 1):
        other = cuda.shfl_xor_sync(0xFFFFFFFF, top, step)
        more = cuda.shfl_xor_sync(0xFFFFFFFF, total, step)
        top, total = _merged(top, total, other, more)
    return top, total


# %% pairs of four lanes
logits_of = [[0.5, 1.2], [2.0, -0.5], [-1.0, 1.0], [0.0, -2.0]]
pairs = []
for two in logits_of:
    pair = _LOWEST, np.float32(0)
    for number in np.float32(two):
        pair = _with_logit(*pair, number)
    pairs.append(pair)
stages = [pairs]
for bit in (2, 1):
    last = stages[-1]
    stages.append([_merged(*last[i], *last[i ^ bit]) for i in range(4)])
want = np.exp(np.float32(logits_of) - 2).sum()
compare("sum of eight", np.float32([x[1] for x in stages[-1]]), want.repeat(4))

# %% the merging of pairs, drawn
fig, ax = plt.subplots(figsize=(6, 3.2), dpi=100)
for row, stage in enumerate(stages):
    for lane, (top, total) in enumerate(stage):
        colour = PALETTE["orange" if top == 2 else "blue"]
        box = {"boxstyle": "round", "fc": "white", "ec": colour, "lw": 1.5}
        text = f"({top:.1f}, {total:.3f})"
        ax.text(lane, -row, text, ha="center", va="center", bbox=box)
        for source in (lane, lane ^ (0, 2, 1)[row]) if row else ():
            ends = {"xy": (lane, 0.2 - row), "xytext": (source, 0.8 - row)}
            arrow = {"arrowstyle": "->", "color": PALETTE["ink"], "lw": 0.8}
            ax.annotate("", **ends, arrowprops=arrow)
for lane, two in enumerate(logits_of):
    label = f"lane {lane}\nreads {two[0]}, {two[1]}"
    ax.text(lane, 0.35, label, ha="center", va="bottom")
ax.set(xlim=(-0.5, 3.5), ylim=(-2.3, 0.9))
ax.axis("off")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.11.3. Pairs (m, s) of four lanes that read two logits each. Every
# lane merges its pair with that of the lane two further, then with that of
# its neighbour. The largest logit, 2.0 (orange), has reached every lane,
# and all hold the same sum of eight exponentials.*
#
# Across the warps of a block the pairs pass through shared memory, and one
# barrier is enough: every warp merges the pairs of all for itself.


# %% the pairs of a block tags=["exporti"] module="cuda.crossentropy"
@device
def _block_merged(top, total, tops, totals):
    """The pair of all logits that the threads of a block have seen.

    tops, totals: shared memory, 32 elements each.
    """
    warp, lane = cuda.threadIdx.x // 32, cuda.threadIdx.x % 32
    top, total = _warp_merged(top, total)
    if lane == 0:
        tops[warp], totals[warp] = top, total
    cuda.syncthreads()
    top, total = _LOWEST, np.float32(0)
    if lane < cuda.blockDim.x // 32:
        top, total = tops[lane], totals[lane]
    return _warp_merged(top, total)


# %% version 4 tags=["exporti"] module="cuda.crossentropy"
@kernel(launch_bounds=1024)
def _softmax_online(probs, logits, V):
    row, me, step = cuda.blockIdx.x, cuda.threadIdx.x, cuda.blockDim.x
    tops = cuda.shared.array(32, np.float32)
    totals = cuda.shared.array(32, np.float32)
    top, total = _LOWEST, np.float32(0)
    for i in range(me, V, step):
        top, total = _with_logit(top, total, logits[row, i])
    top, total = _block_merged(top, total, tops, totals)
    scale = np.float32(1) / total
    _put_probs(probs, logits, row, V, me, step, top, scale)


def _softmax_one_pass(probs, logits, V):
    _softmax_online[len(logits), _threads(V)](probs, logits, V)


# %% version 4, tried
try_softmax(_softmax_one_pass)

# %% [markdown]
# ### Version 5: vectors of four
#
# A lane may ask for 16 bytes at once, where its address is a multiple of
# 16. The bytes stay the same, and the requests become a quarter. The online
# sum changes too: four logits rescale it once together, with five
# exponentials of which none waits for another.
#
# A row begins at such an address when Vp is a multiple of 4, which the
# padding to 128 sees to. V is odd: 50,257 logits are 12,564 vectors and one
# more, which a loop over single elements takes. The host counts `whole`, the
# columns that go by vectors: none where Vp is no multiple of 4 or an array
# begins elsewhere. So no vector reaches into the padding, and no number that
# may be NaN enters the arithmetic.


# %% four logits at once tags=["exporti"] module="cuda.crossentropy"
def _whole(V, *arrays):
    """How many of the first V columns can be moved in vectors of four."""
    fits = arrays[0].shape[1] % 4 == 0 and aligned(*arrays)
    return V - V % 4 if fits else 0


@device
def _with_four(top, total, a, b, c, d):
    """The pair of some logits, and of four more: five exponentials."""
    most = max(max(top, max(a, b)), max(c, d))
    total *= math.exp(top - most)
    total += math.exp(a - most) + math.exp(b - most)
    total += math.exp(c - most) + math.exp(d - most)
    return most, total


@device
def _row_pair(logits, row, V, whole, done):
    """The pair of those logits of a row that are this thread's to read.

    done: this many columns were read before, as vectors.
    """
    me, step, Vp = cuda.threadIdx.x, cuda.blockDim.x, logits.shape[1]
    top, total = _LOWEST, np.float32(0)
    for i in range(done + 4 * me, whole, 4 * step):
        a, b, c, d = load4(logits, row * Vp + i)
        top, total = _with_four(top, total, a, b, c, d)
    for i in range(whole + me, V, step):
        top, total = _with_logit(top, total, logits[row, i])
    return top, total


# %% version 5 tags=["exporti"] module="cuda.crossentropy"
@kernel(launch_bounds=1024)
def _softmax_in_fours(probs, logits, V, whole):
    row, me, step = cuda.blockIdx.x, cuda.threadIdx.x, cuda.blockDim.x
    tops = cuda.shared.array(32, np.float32)
    totals = cuda.shared.array(32, np.float32)
    top, total = _row_pair(logits, row, V, whole, 0)
    top, total = _block_merged(top, total, tops, totals)
    scale, Vp = np.float32(1) / total, logits.shape[1]
    for i in range(4 * me, whole, 4 * step):
        a, b, c, d = load4(logits, row * Vp + i)
        a, b = scale * math.exp(a - top), scale * math.exp(b - top)
        c, d = scale * math.exp(c - top), scale * math.exp(d - top)
        store4(probs, row * Vp + i, a, b, c, d)
    _put_probs(probs, logits, row, V, whole + me, step, top, scale)


def _softmax_vectors(probs, logits, V):
    whole = _whole(V, probs, logits)
    block = _threads(-(-V // 4))
    _softmax_in_fours[len(logits), block](probs, logits, V, whole)


# %% versions 3 to 5, counted
try_softmax(_softmax_vectors)
ladder = ladder[1], _softmax_block_a_row, _softmax_one_pass, _softmax_vectors
for number, run in enumerate(ladder, 2):
    count_softmax(number, run, 1, 1021, 1024)

# %% [markdown]
# One row of 1,021 logits. Version 3 moves what version 2 moved and pays
# four barriers; what it buys is not in this table: 32 warps on the row
# instead of one. Version 4 leaves out one of three readings. Version 5 makes
# a little more than a quarter of the requests, for a few sectors more: the
# last logit and the padding go one by one. Two readings are left, because a
# probability needs the sum of all logits before the first of them can be
# written.


# %% the softmax on a GPU tags=["export"] module="cuda.crossentropy"
# a thread a row, a warp a row, a block a row, maximum and sum in one pass,
# vectors of four
SOFTMAX_FORWARD = (
    _softmax_thread_a_row,
    _softmax_warp_a_row,
    _softmax_block_a_row,
    _softmax_one_pass,
    _softmax_vectors,
)


@shapes("B T Vp!, B T Vp~, 1 to Vp", DEVICE)
def softmax_forward(probs, logits, V, version=5):
    """Probabilities of the first V logits in each row.

    probs, logits: device's float32 (B, T, Vp), logits above -1e38. Columns
    from V on are padding: their logits are not read and their probability
    is 0. Writes `probs`, which may be `logits` itself. version: 1 to 5, the
    place in SOFTMAX_FORWARD. Raises TypeError or ValueError for a wrong
    dtype, shape or version and for V outside [1, Vp].
    """
    run = numbered(SOFTMAX_FORWARD, version, "softmax_forward")
    run(*_device_rows("softmax_forward", probs, logits), V)


# %% [markdown]
# Its gradient (1.11.8) has one sum a row and no maximum: a warp a row, and
# then a block a row with vectors of four. It reads two arrays twice and
# `dlogits` once, and writes `dlogits`.


# %% the gradient by warps tags=["exporti"] module="cuda.crossentropy"
@kernel
def _softmax_back_by_warps(dlogits, dprobs, probs):
    row, lane = cuda.grid(1) // 32, cuda.threadIdx.x % 32
    if row >= len(probs):
        return
    inside = np.float32(0)
    for i in range(lane, probs.shape[1], 32):
        inside += probs[row, i] * dprobs[row, i]
    inside = warp_sum(inside)
    for i in range(lane, probs.shape[1], 32):
        dlogits[row, i] += probs[row, i] * (dprobs[row, i] - inside)


def _softmax_back_warp_a_row(dlogits, dprobs, probs):
    grid = -(-len(probs) // 4)
    _softmax_back_by_warps[grid, 128](dlogits, dprobs, probs)


# %% the gradient by blocks tags=["exporti"] module="cuda.crossentropy"
@kernel(launch_bounds=1024)
def _softmax_back_in_fours(dlogits, dprobs, probs, whole):
    row, me, step = cuda.blockIdx.x, cuda.threadIdx.x, cuda.blockDim.x
    parts, Vp = cuda.shared.array(32, np.float32), probs.shape[1]
    inside = np.float32(0)
    for i in range(row * Vp + 4 * me, row * Vp + whole, 4 * step):
        a, b, c, d = load4(probs, i)
        e, f, g, h = load4(dprobs, i)
        inside += a * e + b * f + c * g + d * h
    for i in range(whole + me, Vp, step):
        inside += probs[row, i] * dprobs[row, i]
    inside = block_sum(inside, parts)
    for i in range(row * Vp + 4 * me, row * Vp + whole, 4 * step):
        a, b, c, d = load4(probs, i)
        e, f, g, h = load4(dprobs, i)
        a, b = a * (e - inside), b * (f - inside)
        c, d = c * (g - inside), d * (h - inside)
        e, f, g, h = load4(dlogits, i)
        store4(dlogits, i, e + a, f + b, g + c, h + d)
    for i in range(whole + me, Vp, step):
        dlogits[row, i] += probs[row, i] * (dprobs[row, i] - inside)


def _softmax_back_vectors(dlogits, dprobs, probs):
    arrays, Vp = (dlogits, dprobs, probs), probs.shape[1]
    block = _threads(-(-Vp // 4))
    _softmax_back_in_fours[len(probs), block](*arrays, _whole(Vp, *arrays))


# %% its gradient on a GPU tags=["export"] module="cuda.crossentropy"
# a warp a row; a block a row, vectors of four
SOFTMAX_BACKWARD = (_softmax_back_warp_a_row, _softmax_back_vectors)


@shapes("B T Vp!, B T Vp, B T Vp", DEVICE)
def softmax_backward(dlogits, dprobs, probs, version=2):
    """Add the gradient by the logits to `dlogits`.

    dlogits, dprobs, probs: device's float32 (B, T, Vp). Padding has
    probability 0, so its columns receive 0. version: 1 or 2, the place in
    SOFTMAX_BACKWARD. Raises TypeError or ValueError for a wrong dtype,
    shape or version.
    """
    run = numbered(SOFTMAX_BACKWARD, version, "softmax_backward")
    run(*_device_rows("softmax_backward", dlogits, dprobs, probs))


# %% [markdown]
# The cross-entropy touches one element of a row, so a thread a row is all
# there is to do. The probabilities of the targets lie in sectors of their
# own, whoever reads them.


# %% a thread a target tags=["exporti"] module="cuda.crossentropy"
_TINY = np.finfo(np.float32).tiny


@kernel
def _surprise_by_threads(losses, probs, targets):
    row = cuda.grid(1)
    if row < len(losses):
        losses[row] = -math.log(max(probs[row, targets[row]], _TINY))


@kernel
def _surprise_back_by_threads(dprobs, dlosses, probs, targets):
    row = cuda.grid(1)
    if row < len(dlosses):
        k = targets[row]
        dprobs[row, k] -= dlosses[row] / max(probs[row, k], _TINY)


def _surprise_thread_a_row(losses, probs, targets):
    grid = -(-len(losses) // 128)
    _surprise_by_threads[grid, 128](losses, probs, targets)


def _surprise_back_thread_a_row(dprobs, dlosses, probs, targets):
    grid = -(-len(dlosses) // 128)
    _surprise_back_by_threads[grid, 128](dprobs, dlosses, probs, targets)


# %% the surprise on a GPU tags=["export"] module="cuda.crossentropy"
# a thread a row, each
CROSSENTROPY_FORWARD = (_surprise_thread_a_row,)
CROSSENTROPY_BACKWARD = (_surprise_back_thread_a_row,)


@shapes("B T!, B T Vp, B T of Vp", DEVICE)
def crossentropy_forward(losses, probs, targets, version=1):
    """Surprise at each target, in nats: minus the log of its probability.

    losses: device's float32 (B, T), written. probs: (B, T, Vp). targets:
    device's int32 (B, T), each in [0, Vp): the caller checks that on the
    host. A probability below the smallest normal number counts as that
    number. version: 1. Raises TypeError or ValueError for a wrong dtype,
    shape or version.
    """
    name = "crossentropy_forward"
    run = numbered(CROSSENTROPY_FORWARD, version, name)
    run(*_device_rows(name, losses, probs, targets))


@shapes("B T Vp!, B T, B T Vp, B T of Vp", DEVICE)
def crossentropy_backward(dprobs, dlosses, probs, targets, version=1):
    """Add the gradient of the losses by the probabilities to `dprobs`.

    dprobs, probs: device's float32 (B, T, Vp); dlosses: (B, T); targets:
    device's int32 (B, T), each in [0, Vp). Only the targets' columns of
    `dprobs` change. version and what is raised: as `crossentropy_forward`.
    """
    name = "crossentropy_backward"
    run = numbered(CROSSENTROPY_BACKWARD, version, name)
    run(*_device_rows(name, dprobs, dlosses, probs, targets))


# %% [markdown]
# ### The classifier: loss and lse
#
# For training the fused form is what counts. Its forward pass needs the
# pair of a row and nothing else, $\lambda = m + \log s$. It reads each logit
# once, and writes two numbers a row: with the pieces above, first a warp a
# row, then a block a row with vectors.


# %% loss and lse by warps tags=["exporti"] module="cuda.crossentropy"
@kernel
def _loss_by_warps(losses, lse, logits, targets, V):
    row, lane = cuda.grid(1) // 32, cuda.threadIdx.x % 32
    if row >= len(logits):
        return
    top, total = _LOWEST, np.float32(0)
    for i in range(lane, V, 32):
        top, total = _with_logit(top, total, logits[row, i])
    top, total = _warp_merged(top, total)
    if lane == 0:
        lse[row] = top + math.log(total)
        losses[row] = top + math.log(total) - logits[row, targets[row]]


def _loss_warp_a_row(losses, lse, logits, targets, V):
    grid = -(-len(logits) // 4)
    _loss_by_warps[grid, 128](losses, lse, logits, targets, V)


# %% loss and lse by blocks tags=["exporti"] module="cuda.crossentropy"
@kernel(launch_bounds=1024)
def _loss_in_fours(losses, lse, logits, targets, V, whole):
    row, me = cuda.blockIdx.x, cuda.threadIdx.x
    tops = cuda.shared.array(32, np.float32)
    totals = cuda.shared.array(32, np.float32)
    top, total = _row_pair(logits, row, V, whole, 0)
    top, total = _block_merged(top, total, tops, totals)
    if me == 0:
        lse[row] = top + math.log(total)
        losses[row] = top + math.log(total) - logits[row, targets[row]]


def _loss_vectors(losses, lse, logits, targets, V):
    arrays = losses, lse, logits, targets
    block = _threads(-(-V // 4))
    _loss_in_fours[len(logits), block](*arrays, V, _whole(V, logits))


# %% the fused forward pass tags=["export"] module="cuda.crossentropy"
# a warp a row; a block a row, vectors of four
CROSSENTROPY_SOFTMAX_FORWARD = (_loss_warp_a_row, _loss_vectors)


@shapes("B T!, B T!, B T Vp, B T of V, 1 to Vp", DEVICE)
def crossentropy_softmax_forward(losses, lse, logits, targets, V, version=2):
    """Losses straight from the logits; no probability is stored.

    losses, lse: device's float32 (B, T), written; lse is the log of the sum
    of the exponentials of a row, all that the backward pass needs besides
    the logits. logits: (B, T, Vp), each read once, above -1e38; columns
    from V on are not read. targets: device's int32 (B, T), each in [0, V):
    the caller checks that on the host. version: 1 or 2, the place in
    CROSSENTROPY_SOFTMAX_FORWARD. Raises TypeError or ValueError for a wrong
    dtype, shape or version and for V outside [1, Vp].
    """
    name = "crossentropy_softmax_forward"
    run = numbered(CROSSENTROPY_SOFTMAX_FORWARD, version, name)
    run(*_device_rows(name, losses, lse, logits, targets), V)


# %% [markdown]
# ### The classifier: p - y in place
#
# Backward, (1.11.12) needs its own logit alone and no other: nothing is summed
# and nobody waits. Every element is read once and written once, in place if
# you like, because the thread that writes it is the one that read it. The
# padding is not read, and its zeros are written.


# %% p - y tags=["exporti"] module="cuda.crossentropy"
@device
def _slope(x, shift, scale, hit):
    """The gradient by one logit: (1.11.12)."""
    y = np.float32(1) if hit else np.float32(0)
    return scale * (math.exp(x - shift) - y)


@device
def _put_slopes(out, logits, row, V, first, step, shift, scale, k):
    """Write every step-th gradient of a row, and 0 in the padding."""
    for i in range(first, logits.shape[1], step):
        slope = np.float32(0)
        if i < V:
            slope = _slope(logits[row, i], shift, scale, i == k)
        out[row, i] = slope


# %% dlogits by warps tags=["exporti"] module="cuda.crossentropy"
@kernel
def _slopes_by_warps(dlogits, dlosses, logits, lse, targets, V):
    row, lane = cuda.grid(1) // 32, cuda.threadIdx.x % 32
    if row < len(logits):
        k, shift, scale = targets[row], lse[row], dlosses[row]
        _put_slopes(dlogits, logits, row, V, lane, 32, shift, scale, k)


def _slopes_warp_a_row(dlogits, dlosses, logits, lse, targets, V):
    grid = -(-len(logits) // 4)
    arrays = dlogits, dlosses, logits, lse, targets
    _slopes_by_warps[grid, 128](*arrays, V)


# %% dlogits by blocks tags=["exporti"] module="cuda.crossentropy"
@device
def _put_row(out, logits, row, V, whole, done, shift, scale, k):
    """Write a row's gradient by its block: vectors, the rest, padding.

    done: this many columns are written elsewhere, as vectors.
    """
    me, step, Vp = cuda.threadIdx.x, cuda.blockDim.x, logits.shape[1]
    for i in range(done + 4 * me, whole, 4 * step):
        a, b, c, d = load4(logits, row * Vp + i)
        a = _slope(a, shift, scale, i == k)
        b = _slope(b, shift, scale, i + 1 == k)
        c = _slope(c, shift, scale, i + 2 == k)
        d = _slope(d, shift, scale, i + 3 == k)
        store4(out, row * Vp + i, a, b, c, d)
    _put_slopes(out, logits, row, V, whole + me, step, shift, scale, k)


@kernel(launch_bounds=1024)
def _slopes_in_fours(dlogits, dlosses, logits, lse, targets, V, whole):
    row = cuda.blockIdx.x
    k, shift, scale = targets[row], lse[row], dlosses[row]
    _put_row(dlogits, logits, row, V, whole, 0, shift, scale, k)


def _slopes_vectors(dlogits, dlosses, logits, lse, targets, V):
    block = _threads(-(-V // 4))
    arrays = dlogits, dlosses, logits, lse, targets
    whole = _whole(V, dlogits, logits)
    _slopes_in_fours[len(logits), block](*arrays, V, whole)


# %% the fused backward pass tags=["export"] module="cuda.crossentropy"
# a warp a row; a block a row, vectors of four
CROSSENTROPY_SOFTMAX_BACKWARD = (_slopes_warp_a_row, _slopes_vectors)


@shapes("B T Vp!, B T, B T Vp~, B T, B T of V, 1 to Vp", DEVICE)
def crossentropy_softmax_backward(
    dlogits, dlosses, logits, lse, targets, V, version=2
):
    """Write the gradient of the losses by the logits: p - y, scaled.

    dlogits: device's float32 (B, T, Vp), overwritten (not added to); it may
    be `logits` itself, which then is lost. dlosses, lse: (B, T), lse from
    the forward pass. targets: device's int32 (B, T), each in [0, V).
    Columns from V on receive 0. version: 1 or 2, the place in
    CROSSENTROPY_SOFTMAX_BACKWARD. Raises as the forward pass does.
    """
    name = "crossentropy_softmax_backward"
    run = numbered(CROSSENTROPY_SOFTMAX_BACKWARD, version, name)
    run(*_device_rows(name, dlogits, dlosses, logits, lse, targets), V)


# %% keep the GPU's functions
gpu = SimpleNamespace(
    softmax_forward=softmax_forward,
    softmax_backward=softmax_backward,
    crossentropy_forward=crossentropy_forward,
    crossentropy_backward=crossentropy_backward,
    fused_forward=crossentropy_softmax_forward,
    fused_backward=crossentropy_softmax_backward,
)


# %% all six against NumPy
def on_device(problem):
    known = vars(problem).items()
    arrays = {k: to_device(v) for k, v in known if isinstance(v, np.ndarray)}
    return SimpleNamespace(V=problem.V, **arrays)


there = on_device(small)
for q, layer in (there, gpu), (small, reference):
    separate(q, layer)
    fused(q, layer, q.fused)
for k in names:
    compare(k, to_host(getattr(there, k)), getattr(small, k))

# %% [markdown]
# ### One launch instead of two
#
# llm.c's trainer goes one step further: one kernel computes the loss and
# leaves the gradient where the logits were. In two launches the logits of a
# batch pass by three times, read, read, written. Those of 4 x 1,024
# positions of GPT-2 are 824 MB. By the time the backward launch starts, a
# smaller cache has lost the first rows that the forward launch has read. One
# block that does both for its row asks for them again much earlier, and
# $\lambda$ never leaves it.
#
# There is a race in it. The loss needs $z_k$, and the place of $z_k$ is
# about to be overwritten by whichever thread owns it:


# %% a classifier that reads too late
@kernel
def too_late(losses, logits, dlosses, targets, V, whole):
    row = cuda.blockIdx.x
    tops = cuda.shared.array(32, np.float32)
    totals = cuda.shared.array(32, np.float32)
    top, total = _row_pair(logits, row, V, whole, 0)
    top, total = _block_merged(top, total, tops, totals)
    shift, k = top + math.log(total), targets[row]
    _put_row(logits, logits, row, V, whole, 0, shift, dlosses[row], k)
    if cuda.threadIdx.x == 0:
        losses[row] = shift - logits[row, k]


ones = simulated(np.ones((2, 1), np.float32))
row_of_zeros = simulated(np.zeros((1, 128), np.float32))
fifty = simulated(np.array([50], np.int32))
try:
    with watch():
        too_late[1, 32](ones[0], row_of_zeros, ones[1], fifty, 101, 100)
    caught = False
except RaceError as error:
    print(str(error).replace(": ", ":\n").replace(", and", ",\nand"))
    caught = True
verdict("the race", caught, "is caught")

# %% [markdown]
# The repair is to read $z_k$ at the start. The barrier in `_block_merged`
# then stands between that and every write.


# %% loss and gradient in one launch tags=["exporti"] module="cuda.crossentropy"
@kernel(launch_bounds=1024)
def _classify_in_fours(losses, logits, dlosses, targets, V, whole):
    row, me = cuda.blockIdx.x, cuda.threadIdx.x
    tops = cuda.shared.array(32, np.float32)
    totals = cuda.shared.array(32, np.float32)
    k = targets[row]
    right = logits[row, k]  # before the barrier: it is overwritten below
    top, total = _row_pair(logits, row, V, whole, 0)
    top, total = _block_merged(top, total, tops, totals)
    shift = top + math.log(total)
    if me == 0:
        losses[row] = shift - right
    _put_row(logits, logits, row, V, whole, 0, shift, dlosses[row], k)


def _classify_two_reads(losses, logits, dlosses, targets, V):
    block = _threads(-(-V // 4))
    arrays = losses, logits, dlosses, targets
    _classify_in_fours[len(logits), block](*arrays, V, _whole(V, logits))


# %% [markdown]
# Written like that, the kernel still asks for each logit twice. The second
# time the row may come from a cache; nothing that is counted here can tell.
#
# There is a memory nearer by. A multiprocessor has 65,536 registers (by
# NVIDIA's data sheet), 262 KB, and a row needs 201 KB. But a thread needs
# registers for other things too. With 512 threads a block, of at most 128
# registers each, the compiler finds room for twelve vectors, 48 registers.
# So a block keeps the exponentials of the first 24,576 columns, about half
# of a row of GPT-2, and reads the others twice as before. Each thread has
# taken its exponentials with the maximum $m_a$ of its own columns. When the
# block's $m$ is known, all of them are off by the same factor $e^{m_a - m}$:
# a kept logit needs one exponential instead of two.


# %% a row in registers tags=["exporti"] module="cuda.crossentropy"
_KEEPERS = 512  # threads of a block, constant so that addresses are too
_VECTORS = 12  # that each keeps
_KEPT = 4 * _VECTORS
_DONE = _KEPT * _KEEPERS  # columns that a block keeps: 24,576


@device
def _keep(held, logits, row, whole):
    """Read this thread's vectors of a row, and leave their exponentials.

    Returns the pair of what was read; held: _KEPT numbers of this thread.
    """
    start, top = row * logits.shape[1], _LOWEST
    for j in range(_VECTORS):
        i = 4 * (cuda.threadIdx.x + j * _KEEPERS)
        a, b, c, d = _LOWEST, _LOWEST, _LOWEST, _LOWEST
        if i < whole:
            a, b, c, d = load4(logits, start + i)
        held[4 * j], held[4 * j + 1] = a, b
        held[4 * j + 2], held[4 * j + 3] = c, d
        top = max(max(top, max(a, b)), max(c, d))
    total = np.float32(0)
    for j in range(_KEPT):
        held[j] = math.exp(held[j] - top)
        total += held[j]
    return top, total


# %% the gradient from registers tags=["exporti"] module="cuda.crossentropy"
@device
def _put_kept(logits, row, whole, held, factor, scale, k):
    """Write the gradients of what `_keep` read."""
    start, zero = row * logits.shape[1], np.float32(0)
    for j in range(_VECTORS):
        i = 4 * (cuda.threadIdx.x + j * _KEEPERS)
        if i < whole:
            a = factor * held[4 * j] - (scale if i == k else zero)
            b = factor * held[4 * j + 1] - (scale if i + 1 == k else zero)
            c = factor * held[4 * j + 2] - (scale if i + 2 == k else zero)
            d = factor * held[4 * j + 3] - (scale if i + 3 == k else zero)
            store4(logits, start + i, a, b, c, d)


# %% most of a row read once tags=["exporti"] module="cuda.crossentropy"
@kernel(launch_bounds=_KEEPERS)
def _classify_kept(losses, logits, dlosses, targets, V, whole):
    row, me = cuda.blockIdx.x, cuda.threadIdx.x
    tops = cuda.shared.array(32, np.float32)
    totals = cuda.shared.array(32, np.float32)
    held = cuda.local.array(_KEPT, np.float32)
    k, scale = targets[row], dlosses[row]
    right = logits[row, k]  # before the barrier: it is overwritten below
    mine, total = _keep(held, logits, row, whole)
    other, more = _row_pair(logits, row, V, whole, _DONE)
    top, total = _merged(mine, total, other, more)
    top, total = _block_merged(top, total, tops, totals)
    shift = top + math.log(total)
    if me == 0:
        losses[row] = shift - right
    factor = scale * math.exp(mine - shift)
    _put_kept(logits, row, whole, held, factor, scale, k)
    _put_row(logits, logits, row, V, whole, _DONE, shift, scale, k)


def _classify_one_read(losses, logits, dlosses, targets, V):
    arrays = losses, logits, dlosses, targets
    whole = _whole(V, logits)
    if whole < 4 * _KEEPERS:  # no vector for every thread
        _classify_two_reads(*arrays, V)
    else:
        _classify_kept[len(logits), _KEEPERS](*arrays, V, whole)


# %% the whole classifier tags=["export"] module="cuda.crossentropy"
# each logit read twice; the first 24,576 of a row once
FUSED_CLASSIFIER = (_classify_two_reads, _classify_one_read)


@shapes("B T!, B T Vp!, B T, B T of V, 1 to Vp", DEVICE)
def fused_classifier(losses, logits, dlosses, targets, V, version=2):
    """Write the losses and put their gradient in the logits' place.

    In one launch what `crossentropy_softmax_forward` and then
    `crossentropy_softmax_backward` in place do in two. losses: device's
    float32 (B, T), written. logits: (B, T, Vp), above -1e38, overwritten by
    their gradient; columns from V on are not read and receive 0. dlosses:
    (B, T), known before the losses are. targets: device's int32 (B, T),
    each in [0, V): the caller checks that on the host. version: 1 or 2, the
    place in FUSED_CLASSIFIER; 2 is 1 where V is less than 2048, Vp no
    multiple of 4 or logits not aligned. Raises TypeError or ValueError for a
    wrong dtype, shape or version and for V outside [1, Vp].
    """
    run = numbered(FUSED_CLASSIFIER, version, "fused_classifier")
    arrays = losses, logits, dlosses, targets
    run(*_device_rows("fused_classifier", *arrays), V)


# %% the classifier against NumPy
wide = problem(1, 2, 2101, 2176)
fused(wide, reference, wide.fused)
for version in (1, 2):
    there = on_device(wide)
    arrays = there.losses, there.logits, there.dlosses, there.targets
    fused_classifier(*arrays, wide.V, version=version)
    compare("losses", to_host(there.losses), wide.losses)
    compare("gradient", to_host(there.logits), wide.fused)


# %% what fusing saves, counted on a row of GPT-2
def count_classifier(name, *calls):
    with watch() as seen:
        for call, args in calls:
            call(*args)
    print(f"{name} {len(seen.launches)} launches,", end=" ")
    print(f"{seen.read_bytes:7,} bytes read,", end=" ")
    print(f"{seen.written_bytes:7,} written, {seen.sectors:6,} sectors")


V, Vp = 50257, 50304
z = simulated(np.zeros((1, 1, Vp), np.float32))
k = simulated(np.zeros((1, 1), np.int32))
one = simulated(np.ones((1, 1), np.float32))
loss, lse = empty((1, 1), like=z), empty((1, 1), like=z)
forward = gpu.fused_forward, (loss, lse, z, k, V)
backward = gpu.fused_backward, (z, one, z, lse, k, V)
count_classifier("two calls  ", forward, backward)
for version in (1, 2):
    call = functools.partial(fused_classifier, version=version)
    count_classifier(f"version {version}  ", (call, (loss, z, one, k, V)))

# %% [markdown]
# Each row of the batch needs that much. The bytes read are what threads ask
# for, and they count the target and the three numbers of a row once for
# every thread; the sectors count what moves when no cache helps. Version 1
# saves a launch and the way of $\lambda$ through memory, hardly anything,
# unless a cache keeps the row. Version 2 saves a sixth of the sectors
# whatever a cache does. Its price is in the registers: with more than 64 for
# each of 512 threads a multiprocessor has room for one such block, 16 warps.
# A block of version 1 has 32. Whether the saving outweighs that is for a
# measurement to say.
#
# `llmnb` keeps both forms. A model's forward pass leaves logits to its
# caller: to sample from them, to evaluate a loss that nobody differentiates,
# to look at them. One call for both would overwrite them, and would need
# `dlosses` before the first loss is known. With two calls `backward` decides
# that the logits may go. A trainer that always goes forward and backward
# loses nothing by `fused_classifier`.


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
#
# The traffic of the fused form in place: forward reads the logits, backward
# reads and writes them, 12 bytes an element. The operations, counted in the
# kernels: a comparison, a subtraction, about 25 for `fast_exp` and an
# addition in forward; as many in backward, with a product in place of the
# sum. That is some 55 operations for 12 bytes, several times LayerNorm's
# ratio, so arithmetic has its share in the time and memory alone predicts
# too little.

# %% predicted against measured tags=["nbval-ignore-output"]
a, b = np.ones((2, 1 << 25), np.float32)
bandwidth = 2 * a.nbytes / fastest(np.copyto, a, b, runs=5)


def in_place():
    fused(p, cpu, p.logits)


moved = 12 * p.logits.size
in_place_time = fastest(in_place)
print(f"copy: {bandwidth / 1e9:.1f} GB/s")
print(f"memory alone {moved / bandwidth * 1e3:.2f} ms", end=", ")
print(f"measured {in_place_time * 1e3:.2f} ms")

# %% [markdown]
# ## See it
#
# A row of eight logits goes through the layer. The token that came next is
# the fifth.

# %% one row through the layer
row = np.array([[[0.5, 2.0, -1.0, 0.0, 1.2, -0.5, 1.0, -2.0]]])
target = np.array([[4]])
prob, grad, one = np.empty_like(row), np.empty_like(row), np.ones((1, 1))
reference.softmax_forward(prob, row, 8)
losses, lse = np.empty((1, 1)), np.empty((1, 1))
reference.fused_forward(losses, lse, row, target, 8)
reference.fused_backward(grad, one, row, lse, target, 8)
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
# *Figure 1.11.4. The gradient equals the probabilities except at the token
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
# *Figure 1.11.5. Where the model is wrong (left), cross-entropy pulls with a
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
# - On a GPU the pair of a maximum and a sum can be merged in any grouping, so
#   that one reading of a row is enough for its loss.

# %% [markdown]
# ## Design note
#
# We save $\lambda$, not $m$ and the sum apart. That is one number instead
# of two, at a price: $e^{z - \lambda}$ inherits the rounding of $\lambda$,
# which is $4 \cdot 10^{-6}$ for a $\lambda$ near 100 in float32. Saving two
# numbers would bring that to $10^{-7}$. Such an error scales a whole row of
# the gradient by four parts in a million, far below the noise that a batch
# of random text brings, so one number it is.
#
# Another alternative reads each row once, not twice: keep a running
# maximum and rescale the running sum when it changes, as attention does in
# [chapter 1.8](08_attention.ipynb) and the GPU's kernels above. On a CPU a row
# stays in cache between the two sweeps, and a sweep for the maximum costs
# little beside one for the exponentials. Exercise 4 builds the single sweep.

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
# $H(q, p) = \lambda \sum_i q_i - \sum_i q_i z_i = \lambda - \sum_i q_i z_i$,
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
# **4** (★★★). Compute $\lambda$ in a single pass over the logits, reading
# each once. Keep the largest so far, $m$, and $s = \sum e^{z_i - m}$ over
# those read. What happens to $s$ when $m$ grows?
#
# :::{admonition} Solution to exercise 4
# :class: dropdown
# When the maximum grows from $m$ to $m'$, every term of $s$ must shrink by
# $e^{m - m'}$, and so must $s$.
# :::


# %% exercise 4, one pass tags=["hide-cell"]
def one_pass(z):
    top, total = z[0], 1.0
    for x in z[1:]:
        if x > top:
            total *= np.exp(top - x)
            top = x
        total += np.exp(x - top)
    return top + np.log(total)


# %% exercise 4, checked
z = 500 * rng.normal(size=1000)
losses, lse = np.empty((1, 1)), np.empty((1, 1))
reference.fused_forward(losses, lse, z[None, None], np.array([[0]]), 1000)
compare("one pass", one_pass(z), lse[0, 0], tol=1e-12)

# %% [markdown]
# **5** (★★★). Write a kernel that finds the token with the largest logit of
# each row, a warp a row. Where two are equally large, the first counts. What
# do the lanes exchange, and what makes all of them agree?
#
# :::{admonition} Solution to exercise 5
# :class: dropdown
# They exchange pairs of a logit and its token. Of two pairs the one with the
# larger logit wins, or, where these are equal, the one with the smaller
# token. Any two lanes that meet decide alike, and the winner does not depend
# on the order of the meetings.
# :::


# %% exercise 5, the kernel tags=["hide-cell"]
@kernel
def largest(tokens, logits, V):
    row, lane = cuda.blockIdx.x, cuda.threadIdx.x
    top, token = _LOWEST, 0
    for i in range(lane, V, 32):
        if logits[row, i] > top:
            top, token = logits[row, i], i
    for step in (16, 8, 4, 2, 1):
        other = cuda.shfl_xor_sync(0xFFFFFFFF, top, step)
        theirs = cuda.shfl_xor_sync(0xFFFFFFFF, token, step)
        if other > top or (other == top and theirs < token):
            top, token = other, theirs
    if lane == 0:
        tokens[row] = token


# %% exercise 5, checked
z = rng.integers(0, 20, (9, 64)).astype(np.float32)
tokens = to_device(np.zeros(9, np.int32))
largest[9, 32](tokens, to_device(z), 61)
same = np.array_equal(to_host(tokens), z[:, :61].argmax(-1))
verdict("largest", same, "first of the largest")

# %% [markdown]
# ## Further reading
#
# - Shannon (1948), A Mathematical Theory of Communication: sections 6 and 7
#   for entropy, and section 3 for approximations to English that are
#   language models, by hand.
# - Blanchard, Higham and Higham (2021),
#   [Accurately Computing the Log-Sum-Exp and Softmax Functions](https://arxiv.org/abs/1909.03469):
#   proves that subtracting the maximum is as accurate as one may hope.
# - Milakov and Gimelshein (2018),
#   [Online Normalizer Calculation for Softmax](https://arxiv.org/abs/1805.02867):
#   the single pass of exercise 4, and what it saves on hardware.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("1.11")
