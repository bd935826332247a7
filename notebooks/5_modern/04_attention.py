# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       reference.local: "Attention with a window, a scale and a soft cap; norms of heads; in NumPy."
#       reference.softcap: "Soft caps of logits in NumPy, and cross-entropy through them."
#       cpu.local: "Attention with a window, a scale and a soft cap; compiled."
#       cuda.local: "Attention with a window, a scale and a soft cap; on a GPU."
# ---

# %% [markdown]
# # Attention since GPT-2: fewer keys, a window, scores that stay small
#
# > Heads share keys and values, some blocks look back a window only, and two
# > ways keep a score from running away: a soft cap, and a norm of queries and
# > keys.
#
# *Reading time: 30 minutes. You need: attention
# ([chapter 1.8](../1_by_hand/08_attention.ipynb)) and RMSNorm
# ([chapter 5.1](01_rmsnorm.ipynb)); for the last two sections chapters
# [2.5](../2_cpu/05_attention.ipynb) and [3.9](../3_gpu/09_attention.ipynb).*
#
# ## Where we are
#
# Attention computes what it computed in GPT-2. Five things around it are new, each
# against a trouble that came with size. At the end of this chapter you can
#
# - count the cache of a model, and say what sharing keys saves of it;
# - say how far a stack of blocks sees of which each looks back a window;
# - derive the slope of a soft cap, and say which gradients it multiplies;
# - take a gradient through the norms of queries and keys;
# - tell the size of a head from the width of the stream.

# %% setup
from functools import partial

import matplotlib.pyplot as plt
import numpy as np

from llmnb.book.diagram import PALETTE
from llmnb.book.verify import compare, numerical_gradient, verdict

rng = np.random.default_rng(4)

# %% [markdown]
# ## Keys that heads share
#
# A model that writes keeps the keys and values of all positions
# ([chapter 4.19](../4_practice/19_cache.ipynb)). With $NKV$ heads of them (*kv heads*), of
# $hs$ channels each, a position leaves behind
#
# $$ 2\, L \cdot \mathrm{NKV} \cdot hs \text{ numbers} . \tag{5.4.1} $$
#
# In Llama 2 7B every head of queries has its own: 32 blocks, 32 heads, 128
# channels. With numbers of 16 bits this takes, for a token and for a text of 4,096:

# %% the cache of some models
#        blocks, heads of queries, of keys, size of a head
models = {
    "GPT-2 124M": (12, 12, 12, 64),
    "Llama 2 7B": (32, 32, 32, 128),
    "Llama 3 8B": (32, 32, 8, 128),
    "SmolLM2 135M": (30, 9, 3, 64),
    "Gemma 2B": (18, 8, 1, 256),
}
print(f"{'':<14} bytes a token   4,096 tokens   heads to a key")
for name, (L, NH, NKV, hs) in models.items():
    token = 2 * 2 * L * NKV * hs
    size = token * 4096 / 1e6
    print(f"{name:<14} {token:13,} {size:11,.0f} MB {NH // NKV:16}")

# %% [markdown]
# 2 GB for one text, beside weights of 13 GB; with eight texts at once the cache is
# larger than the model. And all of it is read for each token.
#
# So let several heads of queries read the same keys and values. These are *grouped
# queries*, GQA; with one head of keys for all they are called *multi-query*, MQA. [Chapter
# 1.8](../1_by_hand/08_attention.ipynb) has it for any $NKV$ that divides $NH$. Head $h$
# of the queries reads head $\lfloor h \cdot NKV / NH \rfloor$ of the keys. Backward, a key
# that several heads read gets the sum of what each would give it, (1.8.10).


# %% heads and the keys that they read tags=["hide-input"]
def draw_heads(ax, NH, NKV):
    box = partial(plt.Rectangle, width=1, height=0.7, ec="white", lw=2)
    for h in range(NH):
        ax.add_patch(box((h, 1.6), fc=PALETTE["blue"]))
        middle = (h * NKV // NH + 0.5) * NH / NKV
        ax.plot((h + 0.5, middle), (1.6, 0.7), color=PALETTE["grey"])
    for h in range(NKV):
        place = (h + 0.5) * NH / NKV - 0.5
        ax.add_patch(box((place, 0), fc=PALETTE["orange"]))
        ax.add_patch(box((place, -0.7), fc=PALETTE["green"]))
    ax.set(xlim=(0, NH), ylim=(-0.8, 2.4), aspect="equal")
    ax.set_title(f"NH = {NH}, NKV = {NKV}", size=10)
    ax.axis("off")


fig, axes = plt.subplots(1, 3, figsize=(8.4, 1.8), dpi=100)
for ax, NKV in zip(axes, (6, 2, 1), strict=True):
    draw_heads(ax, 6, NKV)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 5.4.1. Queries (blue) and the keys and values (orange, green) that they read.
# Only the lower two rows are kept in a cache: all, a third, a sixth.*
#
# ## A sliding window
#
# The other factor of the cache is the length. In a block with a *window* $W$ a
# position sees itself and the $W - 1$ before it:
#
# $$ o_{ti} = \sum_{t - W < u \le t} a_{tu}\, v_{ui} , \qquad
#    a_{tu} = 0 \text{ elsewhere} . \tag{5.4.2} $$
#
# Nothing else changes, neither forward nor backward, for every sum of chapter 1.8 runs
# over the positions that are seen. But what is kept, and what is computed, no longer
# grows with the text. Of a text of $T \ge W$ positions each sees $W$, but the first
# misses $W - 1$ of them, the next $W - 2$, and so on down to 1, so that
#
# $$ \sum_{t=0}^{T-1} \min(t + 1,\, W) = W T - \tfrac12 W (W - 1) \tag{5.4.3} $$
#
# pairs are left of $\frac12 T (T + 1)$, and a cache needs $W$ places: what leaves
# the window is never read again.
#
# Does the model forget everything beyond? A position of block 2 reads positions of
# block 1, which have read $W - 1$ positions further back: a stack of $L$ sees
# $L\,(W - 1) + 1$ positions, though through many hands. Mistral 7B v0.1 has $W = 4096$
# in all its blocks. Gemma 2 has a window in every other block only, Gemma 3 in five of
# six, of 512 or 1,024 positions, and the sixth sees all.

# %% by hand, and with three blocks
W, T = 3, 12
seen = np.tri(T, dtype=bool) & ~np.tri(T, k=-W, dtype=bool)
pairs = W * T - W * (W - 1) // 2
verdict("(5.4.3)", seen.sum() == pairs, f"{pairs} pairs of {T * (T + 1) // 2}")
reach = [np.linalg.matrix_power(seen.astype(int), n) > 0 for n in (1, 2, 3)]
for n, r in enumerate(reach, 1):
    far = r[-1].sum()
    verdict(f"{n} blocks", far == n * (W - 1) + 1, f"see {far} positions")

# %% draw it tags=["hide-input"]
fig, axes = plt.subplots(1, 3, figsize=(8.4, 3.1), dpi=100)
for n, (ax, r) in enumerate(zip(axes, reach, strict=True), 1):
    for t, u in np.argwhere(r):
        colour = PALETTE["orange" if seen[t, u] else "blue"]
        box = plt.Rectangle((u, t), 1, 1, fc=colour, ec="white")
        ax.add_patch(box)
    ax.set(xlim=(0, T), ylim=(T, 0), aspect="equal", xticks=[], yticks=[])
    ax.set(xlabel="position read", title=f"{n} block{'s' * (n > 1)}")
axes[0].set_ylabel("position that reads")
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 5.4.2. What a position reads with a window of 3: by itself (orange) and
# through earlier blocks (blue). Three blocks see seven positions.*
#
# ## Scores that run away
#
# Let all queries of a head grow, and soon one weight is 1 and the others are 0. Then
# $a\,(1 - a)$ is 0 for all, by (1.8.8) no gradient comes back, and nothing pulls the
# queries down again. Watch the largest weight as a query and its 20 keys grow:


# %% queries that grow
def row(q, keys, norm=False, softcap=None):
    """The largest weight, and the gradient by the products' size."""
    if norm:
        q = q / np.sqrt((q**2).mean())
        keys = keys / np.sqrt((keys**2).mean(axis=1, keepdims=True))
    s, slope = keys @ q / np.sqrt(q.size), 1.0
    if softcap:
        s = softcap * np.tanh(s / softcap)
        slope = 1 - (s / softcap) ** 2
    a = np.exp(s - s.max())
    a /= a.sum()
    g = np.cos(np.arange(a.size))  # of the weights, from above
    return a.max(), np.abs(a * (g - a @ g) * slope).max()


q, keys = rng.normal(size=64), rng.normal(size=(20, 64))
factors = (1, 2, 4, 8, 16)
kinds = {"plain": {}, "soft cap 5": {"softcap": 5}, "norms": {"norm": True}}
runs = {
    name: np.array([row(f * q, f * keys, **how) for f in factors])
    for name, how in kinds.items()
}
print(f"largest weight, queries and keys times {factors}")
for name, found in runs.items():
    print(f"{name:<12}", *[f"{x:6.3f}" for x in found[:, 0]])
plain, cap, norms = (x[-1] for x in runs.values())
died = plain[0] > 0.999 and plain[1] < 1e-6
verdict("plain", died, "one weight, no gradient")
verdict("soft cap", cap[0] < 0.5, "several weights")
verdict("norms", np.allclose(runs["norms"], runs["norms"][0]), "do not see it")

# %% [markdown]
# ### A soft cap
#
# Gemma 2 bends the scores. With $\tilde s_{tu}$ for the scaled product of (1.8.1), and
# a *cap* $c$,
#
# $$ s_{tu} = c \tanh \frac{\tilde s_{tu}}{c} . \tag{5.4.4} $$
#
# Near 0 it does nothing, and no score leaves $(-c, c)$. In Gemma 2 $c$ is 50 for
# scores and 30 for the logits. Its slope: with $x$ for any number,
# $\tanh x = (e^x - e^{-x}) / (e^x + e^{-x})$, and the quotient rule gives
#
# $$ \begin{aligned} \tanh' x &= \frac{(e^x + e^{-x})^2 - (e^x - e^{-x})^2}
#    {(e^x + e^{-x})^2} \\ &= 1 - \tanh^2 x . \end{aligned} \tag{5.4.5} $$
#
# In (5.4.4) the inner $1/c$ and the outer $c$ cancel, and by (5.4.4) again the
# $\tanh$ is $s / c$, so that the slope needs the capped score only:
#
# $$ d\tilde s_{tu} = \Bigl( 1 - \tanh^2 \frac{\tilde s_{tu}}{c} \Bigr)\, ds_{tu}
#    = \Bigl( 1 - \frac{s_{tu}^2}{c^2} \Bigr)\, ds_{tu} . \tag{5.4.6} $$
#
# $ds_{tu}$ is (1.8.8), and in (1.8.10) $d\tilde s_{tu}$ takes its place. So a cap is no
# cure for a gradient that has died: where a score is near $c$, its slope is near 0 as
# well; in the last column of the table every positive score has come there. What a cap
# gives is that a few scores which run ahead stop at $c$, and the others still count.
# The mask comes after the cap: $c \tanh(-\infty / c)$ would be $-c$, the future visible.
#
# ### Norms of queries and keys
#
# Qwen 3 and Gemma 3 take the other way: RMSNorm, over the $hs$ channels of each head of
# queries and of keys, before they are turned by their position. One head of one
# position is a row of (5.1.3), with weights $w$ that all heads share:
#
# $$ \begin{aligned} \hat q_{ti} &= r_t\, q_{ti} , \qquad
#    q'_{ti} = w_i\, \hat q_{ti} , \\ r_t &= \Bigl( \tfrac{1}{hs} \sum_i q_{ti}^2 +
#    \epsilon \Bigr)^{-1/2} . \end{aligned} \tag{5.4.7} $$
#
# A row so normed has the length $\sqrt{hs}$ at most, so a product of two is at most
# $hs$, and the score, over $\sqrt{hs}$, at most
#
# $$ |s_{tu}| \le \sqrt{hs}\; \max_i |w_i|^2 \tag{5.4.8} $$
#
# where queries and keys have the same $w$. It bounds the score as a cap does, and
# unlike that it lets the gradient live: it removes only what would make a query longer.
# The gradient is (5.1.9), per head, with $d\hat q_{ti} = w_i\, dq'_{ti}$:
#
# $$ \begin{aligned} dq_{ti} &= r_t \Bigl( d\hat q_{ti} - \hat q_{ti}\;
#    \tfrac{1}{hs} \sum_j d\hat q_{tj}\, \hat q_{tj} \Bigr) , \\
# dw_i &= \sum_t dq'_{ti}\, \hat q_{ti} , \end{aligned} \tag{5.4.9} $$
#
# where the second sum runs over the heads of queries too, for they share $w$.
# Saved is $r_t$, one number a head and position.
#
# ### The size of a head, and the scale
#
# In GPT-2 the heads together are as wide as the stream, $NH \cdot hs = C$. Nothing asks
# for that: the first linear layer of attention makes $(NH + 2 NKV)\, hs$ numbers of
# $C$, the last one $C$ of $NH \cdot hs$. Most Gemmas have heads of 256 channels, Qwen 3
# of 128, whatever $C$ is. Nor need the scale be $1/\sqrt{hs}$: Gemma 2 27B has heads of
# 128 and divides by $\sqrt{144}$.
#
# ## Forward
#
# | tensor | shape | what it holds |
# |---|---|---|
# | `inp` | (B, T, (NH + 2 NKV) hs) | heads of queries, of keys, of values |
# | `out`, `lse` | (B, T, NH hs), (B, NH, T) | as in chapter 1.8 |
# | `rstd` | (B, T, NH + NKV) | of the norms: $r_t$ of each head |
#
# One function has all of it. A *rule* is a window, a scale and a cap, and each may be
# missing. The scores keep their slope for the way back: the scale, times (5.4.6) where
# there is a cap.

# %% imports tags=["export"] module="reference.local"
import numpy as np

from llmnb.reference.attention import count_heads, split_heads, split_qkv
from llmnb.shapes import check_number, shapes


# %% a rule, and its scores tags=["exporti"] module="reference.local"
def check_rule(layer, window, scale, softcap):
    """The rule, its window an int; raise for one that no attention has."""
    whole = isinstance(window, (int, np.integer))
    if window is not None and (not whole or window < 1):
        raise ValueError(
            f"{layer}: window must be None or a positive integer, got "
            f"{window!r}"
        )
    for name, value in (("scale", scale), ("softcap", softcap)):
        if value is not None:
            check_number(f"{layer}: {name}", value, "above 0")
    window = window and min(int(window), 2**31)  # no text is longer
    return window, scale, softcap


def _local_scores(q, k, window, scale, softcap):
    """Scores, and their slope by the products; what is unseen: -inf.

    q, k: (..., T, hs). window: a query sees itself and the window - 1 keys
    before it; None is all. The slope is the scale if there is no soft cap.
    """
    T, hs = q.shape[-2:]
    number = q.dtype.type
    scale = number(1 / np.sqrt(hs) if scale is None else scale)
    scores, slope = (q @ k.swapaxes(-1, -2)) * scale, number(1)
    if softcap is not None:
        tanh = np.tanh(scores / number(softcap))
        scores, slope = number(softcap) * tanh, 1 - tanh**2
    seen = np.tri(T, dtype=bool)
    if window is not None:
        seen &= ~np.tri(T, k=-window, dtype=bool)
    scores[..., ~seen] = -np.inf
    return scores, slope * scale


# %% attention with a window, forward tags=["export"] module="reference.local"
@shapes("B T C!, B NH|C T!, B T QKV")
def local_attention_forward(
    out, lse, inp, window=None, scale=None, softcap=None
):
    """Causal self-attention that looks back a window only.

    inp: (B, T, (NH + 2 NKV) * hs), the heads of queries, of keys and of
    values; NKV divides NH. Writes out (B, T, NH * hs) and lse (B, NH, T),
    the log-sum-exp of each row of scores, which the backward pass needs.
    All of one float dtype. window: how many positions a query sees, its own
    the last of them; None for all. scale: of the products, 1 / sqrt(hs)
    where None. softcap: c where scores become c tanh(score / c), or None.
    """
    layer = "local_attention_forward"
    heads = count_heads(layer, out, lse, inp)
    rule = check_rule(layer, window, scale, softcap)
    q, k, v = split_qkv(inp, heads)
    scores, _ = _local_scores(q, k, *rule)
    top = scores.max(axis=-1, initial=-np.inf)
    total = top + np.log(np.exp(scores - top[..., None]).sum(axis=-1))
    att = np.exp(scores - total[..., None])
    split_heads(out, heads.NKV, heads.hs)[...] = att @ v
    lse[...] = total.reshape(lse.shape)


# %% [markdown]
# ## Backward
#
# (1.8.5) to (1.8.10) with the slope in between. What is not seen has the gradient 0.


# %% attention with a window, backward tags=["export"] module="reference.local"
@shapes("B T QKV!, B T C, B T QKV, B T C, B NH|C T")
def local_attention_backward(
    dinp, dout, inp, out, lse, add=True, window=None, scale=None, softcap=None
):
    """Add the gradient of attention with a window to dinp.

    dinp, inp: (B, T, (NH + 2 NKV) * hs). dout, out: (B, T, NH * hs). lse:
    (B, NH, T). out and lse are as the forward pass left them. All of one
    float dtype. add: False overwrites dinp instead of adding. window,
    scale, softcap: as in the forward pass.
    """
    layer = "local_attention_backward"
    heads = count_heads(layer, out, lse, inp)
    rule = check_rule(layer, window, scale, softcap)
    if not add:
        dinp.fill(0)
    q, k, v = split_qkv(inp, heads)
    dq, dk, dv = split_qkv(dinp, heads)
    o, do = (split_heads(x, heads.NKV, heads.hs) for x in (out, dout))
    scores, slope = _local_scores(q, k, *rule)
    att = np.exp(scores - lse.reshape(*q.shape[:-1], 1))
    dv += (att.swapaxes(-1, -2) @ do).sum(axis=2, keepdims=True)
    datt = do @ v.swapaxes(-1, -2)
    D = (do * o).sum(axis=-1, keepdims=True)
    dproducts = att * (datt - D) * slope
    dq += dproducts @ k
    dk += (dproducts.swapaxes(-1, -2) @ q).sum(axis=2, keepdims=True)


# %% [markdown]
# The norms of heads are (5.4.7) and (5.4.9); backward works in place.


# %% which heads have norms tags=["exporti"] module="reference.local"
def key_heads(layer, inp, rstd, hs):
    """NKV, from a row of NH + 2 NKV heads of which NH + NKV have a norm."""
    width, normed = inp.shape[2], rstd.shape[2]
    NKV = width // max(1, hs) - normed
    if not hs or width % hs or not 0 < NKV < normed:
        raise ValueError(
            f"{layer}: inp must have shape (B, T, (NH + 2 NKV) hs), where "
            f"hs = {hs} and NH + NKV = {normed}, got {inp.shape}"
        )
    return NKV


# %% norms of heads tags=["export"] module="reference.local"
def _normed(x, hs, rstd):
    """The heads that have a norm, (B, T, n, hs), and the rest of the row."""
    B, T, width = x.shape
    heads = x.reshape(B, T, width // hs, hs)
    return heads[:, :, : rstd.shape[2]], heads[:, :, rstd.shape[2] :]


def _both_weights(qweight, kweight, NKV, n, offset):
    """A row of weights for each of the n heads that have a norm."""
    queries = np.broadcast_to(qweight, (n - NKV, qweight.size))
    keys = np.broadcast_to(kweight, (NKV, kweight.size))
    return np.concatenate([queries, keys]) + float(offset)


@shapes(
    "B T QKV!, B T N!, B T QKV, hs, hs", eps="above 0", offset="at least 0"
)
def headnorm_forward(out, rstd, inp, qweight, kweight, eps=1e-6, offset=0.0):
    """RMSNorm over the channels of each head of queries and of keys.

    out, inp: (B, T, (NH + 2 NKV) * hs); values are copied. rstd: (B, T,
    NH + NKV), saved for the backward pass. qweight, kweight: (hs,), used
    for all heads. eps, offset: as for rmsnorm_forward. All of one float
    dtype; out and rstd are overwritten.
    """
    hs = qweight.size
    NKV = key_heads("headnorm_forward", inp, rstd, hs)
    x, values = _normed(inp, hs, rstd)
    y, copied = _normed(out, hs, rstd)
    rstd[...] = 1 / np.sqrt((x**2).mean(axis=-1) + float(eps))
    weights = _both_weights(qweight, kweight, NKV, rstd.shape[2], offset)
    y[...] = x * rstd[..., None] * weights
    copied[...] = values


@shapes("B T QKV!, hs!, hs!, B T QKV, hs, hs, B T N", offset="at least 0")
def headnorm_backward(
    dinp, dqweight, dkweight, inp, qweight, kweight, rstd, offset=0.0
):
    """Take the gradient of headnorm_forward's output to its input, in place.

    dinp: (B, T, (NH + 2 NKV) * hs) holds the gradient of the output and
    receives that of the input. dqweight, dkweight: (hs,), added to. inp,
    qweight, kweight, rstd, offset: as in the forward pass.
    """
    hs = qweight.size
    NKV = key_heads("headnorm_backward", inp, rstd, hs)
    hat = _normed(inp, hs, rstd)[0] * rstd[..., None]
    dx, _ = _normed(dinp, hs, rstd)
    dweights = (dx * hat).sum(axis=(0, 1))
    dqweight += dweights[:-NKV].sum(axis=0)
    dkweight += dweights[-NKV:].sum(axis=0)
    weights = _both_weights(qweight, kweight, NKV, rstd.shape[2], offset)
    dhat = dx * weights
    mean = (dhat * hat).mean(axis=-1, keepdims=True)
    dx[...] = rstd[..., None] * (dhat - hat * mean)


# %% [markdown]
# The logits' cap is (5.4.4) for every logit. Its slope multiplies the gradient of
# [chapter 1.11](../1_by_hand/11_crossentropy.ipynb), $p - y$.

# %% soft caps of logits tags=["export"] module="reference.softcap"
import numpy as np

from llmnb.shapes import shapes


@shapes("B T Vp!", softcap="above 0")
def softcap_forward(x, softcap):
    """Turn each logit x, (B, T, Vp), into c tanh(x / c); softcap: c."""
    x[...] = float(softcap) * np.tanh(x / float(softcap))


@shapes("B T Vp!, B T, B T Vp~, B T, B T of V, 1 to Vp", softcap="above 0")
def capped_crossentropy_backward(
    dlogits, dlosses, logits, lse, targets, V, softcap
):
    """Write the gradient of the losses by the logits before their cap.

    dlogits: float (B, T, Vp), overwritten; it may be `logits` itself, which
    then is lost. logits: after the cap. dlosses, lse: (B, T), lse from the
    forward pass. targets: int (B, T). Columns from V on receive 0.
    """
    slope = 1 - (logits[..., :V] / float(softcap)) ** 2
    b, t = np.indices(targets.shape)
    dlogits[..., :V] = np.exp(logits[..., :V] - lse[..., None])
    dlogits[b, t, targets] -= 1
    dlogits[..., :V] *= dlosses[..., None] * slope
    dlogits[..., V:] = 0


# %% [markdown]
# ## Proof
#
# Central differences in float64, $h = 10^{-5}$, tolerance $10^{-8}$: four heads of
# queries with two of keys; a window, a scale and a cap that bends these scores. Then
# the norms of heads, and logits with a cap, one of their five columns padding.

# %% attention against central differences
NH, NKV, hs, T = 4, 2, 3, 7
inp = rng.normal(size=(2, T, (NH + 2 * NKV) * hs))
g, out = rng.normal(size=(2, 2, T, NH * hs))
lse = np.empty((2, NH, T))


def loss(rule):
    local_attention_forward(out, lse, inp, **rule)
    return (g * out).sum()


def gradient(rule, backward=local_attention_backward):
    loss(rule)
    dinp = np.ones_like(inp)
    backward(dinp, g, inp, out, lse, **rule)
    return dinp - 1


rules = {"window": 3}, {"softcap": 0.5}, {"window": 2, "scale": 0.9}
for rule in rules:
    want = numerical_gradient(partial(loss, rule), inp)
    name = ", ".join(rule)
    compare(name, gradient(rule), want, tol=1e-8)

# %% the norms of heads
weights, rstd = rng.normal(size=(2, hs)), np.empty((2, T, NH + NKV))
normed, up = np.empty_like(inp), rng.normal(size=inp.shape)


def norm_loss():
    headnorm_forward(normed, rstd, inp, *weights, offset=1.0)
    return (up * normed).sum()


norm_loss()
q = inp.reshape(2, T, -1, hs)[:, :, :NH]
hat = q / np.sqrt((q**2).mean(axis=-1, keepdims=True) + 1e-6)
by_hand = (hat * (1 + weights[0])).reshape(2, T, -1)
compare("queries", normed[..., : NH * hs], by_hand, tol=1e-12)
dinp, dweights = up.copy(), np.zeros((2, hs))
headnorm_backward(dinp, *dweights, inp, *weights, rstd, offset=1.0)
compare("heads", dinp, numerical_gradient(norm_loss, inp), tol=1e-8)
want = numerical_gradient(norm_loss, weights)
compare("their weights", dweights, want, tol=1e-8)

# %% the capped logits
from llmnb.reference.crossentropy import crossentropy_softmax_forward

z, targets = 3 * inp[..., :5], np.arange(2 * T).reshape(2, T) % 4
capped, dz = np.empty((2, *z.shape))
dlosses, (losses, lse_z) = up[..., 0].copy(), np.empty((2, 2, T))


def capped_loss():
    capped[...] = z
    softcap_forward(capped, 2.0)
    crossentropy_softmax_forward(losses, lse_z, capped, targets, 4)
    return (dlosses * losses).sum()


want = numerical_gradient(capped_loss, z)
capped_loss()
capped_crossentropy_backward(dz, dlosses, capped, lse_z, targets, 4, 2.0)
compare("logits", dz, want, tol=1e-8)

# %% [markdown]
# A plausible mistake: the cap is forgotten backward. With the $c = 50$ of Gemma 2 and
# scores near 1 it changes a score by some $1/7500$. A tolerance of a hundredth would
# see nothing; ours does.


# %% a gradient made wrong on purpose
def without_the_cap(*arrays, softcap):
    local_attention_backward(*arrays)


rule = {"softcap": 50.0}
want = numerical_gradient(partial(loss, rule), inp)
wrong = gradient(rule, without_the_cap)
compare("loosely", wrong, want, tol=1e-2)
try:
    compare("dinp", wrong, want, tol=1e-8)
    caught = False
except AssertionError:
    caught = True
verdict("the mistake", caught, "is caught")

# %% [markdown]
# ## See it
#
# What (5.4.4) does to a score, and what (5.4.6) to its gradient:

# %% draw it tags=["hide-input"]
fig, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.1), dpi=100)
x = np.linspace(-150, 150, 301)
left.plot(x, x, ":", color=PALETTE["grey"], label="no cap")
for c, colour in ((30, "blue"), (50, "orange")):
    y = x[None, None].copy()
    softcap_forward(y, c)
    left.plot(x, y[0, 0], color=PALETTE[colour], label=f"c = {c}")
    right.plot(x, 1 - (y[0, 0] / c) ** 2, color=PALETTE[colour])
left.set(ylim=(-80, 80), xlabel="score", ylabel="capped score")
left.legend(frameon=False)
right.set(xlabel="score", ylabel="slope")
for ax in (left, right):
    ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 5.4.3. Left, a soft cap leaves small scores alone and lets none past c. Right,
# its slope: near the cap little of the gradient comes back.*
#
# ## Count it
#
# Sharing keys leaves the operations of attention as they are, and spares weights:
# `qkvw` has $(NH + 2 NKV)\, hs$ rows. A window of 4,096, of 32,768 positions, leaves an
# eighth of the places in a cache, and by (5.4.3) 23 % of the pairs.
#
# ## On a CPU
#
# The kernels of [chapter 2.5](../2_cpu/05_attention.ipynb) do this. A block of keys
# that no row of a block sees is never read; at the window's edge a row's scores begin
# later. A product becomes a score by the rule, in vectors, with
# $\tanh x = (1 - e^{-2x}) / (1 + e^{-2x})$ of the fast exponential.

# %% imports of the CPU module tags=["export"] module="cpu.local"
from llmnb.cpu.attention import prepared, team_backward, team_forward
from llmnb.cpu.panels import WORK
from llmnb.reference.local import check_rule
from llmnb.shapes import shapes


# %% attention with a window, compiled tags=["export"] module="cpu.local"
@shapes("B T C!, B NH|C T!, B T QKV", work=WORK)
def local_attention_forward(
    out, lse, inp, window=None, scale=None, softcap=None, work=None,
    bf16=False,
):  # fmt: skip
    """Causal self-attention that looks back a window only.

    inp: (B, T, (NH + 2 NKV) * hs), the heads of queries, of keys and of
    values; NKV divides NH. Writes out (B, T, NH * hs) and lse (B, NH, T),
    the log-sum-exp of each row of scores, which the backward pass needs.
    window: how many positions a query sees, its own the last of them; None
    for all. scale: of the products, 1 / sqrt(hs) where None. softcap: c
    where scores become c tanh(score / c), or None. work, bf16: as for
    attention_forward. All float32 or all float64 and C-contiguous. Raises
    TypeError or ValueError before it computes anything.
    """
    layer = "local_attention_forward"
    rule = check_rule(layer, window, scale, softcap)
    made = prepared(layer, (out, lse, inp), rule, work, bf16)
    team_forward(out.reshape(-1), lse, inp.reshape(-1), *made)


@shapes("B T QKV!, B T C, B T QKV, B T C, B NH|C T", work=WORK)
def local_attention_backward(
    dinp, dout, inp, out, lse, add=True, window=None, scale=None,
    softcap=None, work=None, bf16=False,
):  # fmt: skip
    """Add the gradient of attention with a window to dinp.

    dinp, inp: (B, T, (NH + 2 NKV) * hs). dout, out: (B, T, NH * hs). lse:
    (B, NH, T). out and lse are as the forward pass left them. add: False
    overwrites dinp instead of adding. window, scale, softcap, work, bf16:
    as in the forward pass. All float32 or all float64 and C-contiguous.
    Raises TypeError or ValueError before it computes anything.
    """
    layer = "local_attention_backward"
    rule = check_rule(layer, window, scale, softcap)
    made = prepared(layer, (out, lse, inp), rule, work, bf16)
    flat = (x.reshape(-1) for x in (dinp, dout, inp, out, lse))
    team_backward(*flat, add, *made)


# %% float32, a window that divides nothing, several blocks
from types import SimpleNamespace

from llmnb import cpu, reference


def problem(T, heads, dtype="f4"):
    NH, NKV, hs = heads
    p = SimpleNamespace(lse=np.zeros((1, NH, T), dtype))
    p.inp = rng.normal(size=(1, T, (NH + 2 * NKV) * hs)).astype(dtype)
    p.dout = rng.normal(size=(1, T, NH * hs)).astype(dtype)
    p.out, p.dinp = np.zeros_like(p.dout), np.zeros_like(p.inp)
    return p


def both_ways(layer, p, **rule):
    layer.local_attention_forward(p.out, p.lse, p.inp, **rule)
    arrays = p.dinp, p.dout, p.inp, p.out, p.lse
    layer.local_attention_backward(*arrays, add=False, **rule)


p = problem(301, (4, 2, 20))
rule = {"window": 70, "softcap": 2.0, "scale": 0.3}
both_ways(cpu, p, **rule)
got = {name: getattr(p, name).copy() for name in ("out", "lse", "dinp")}
both_ways(reference, p, **rule)
for name, x in got.items():
    compare(name, x, getattr(p, name), tol=1e-5)

# %% [markdown]
# What is not seen takes no time. A window of 256 in a text of 2,048 positions:

# %% its time tags=["nbval-ignore-output"]
from llmnb.timing import fastest, machine

p = problem(2048, (8, 2, 64))
whole = fastest(both_ways, cpu, p, runs=5)
near = fastest(partial(both_ways, cpu, p, window=256), runs=5)
capped = fastest(partial(both_ways, cpu, p, softcap=50.0), runs=5)
print(machine())
print(f"window: {near / whole:.2f} of the time, cap: {capped / whole:.2f}")

# %% [markdown]
# ## On a GPU
#
# The two walks of figure 3.9.1 become shorter, and the owners stay: a block of threads
# that owns queries begins at the first tile of keys that its first row sees, one that
# owns keys ends at the last query that sees its last key. The rule is a constant of the
# kernels. Where there is no cap no tanh is compiled into them, and a model of two
# kinds of blocks has two sets of kernels.

# %% imports of the GPU module tags=["export"] module="cuda.local"
import functools
import math

import numpy as np

from llmnb.cuda.attention import (
    check_heads, launch_backward, launch_forward, plain_score,
)  # fmt: skip
from llmnb.gpu.launch import DEVICE, device, given_work
from llmnb.reference.local import check_rule
from llmnb.shapes import shapes

# %% a rule as a kernel's constants tags=["exporti"] module="cuda.local"
ONE, TWO = np.float32(1), np.float32(2)


@device
def soft_tanh(x):
    """tanh(x), to its last digits near 0 too."""
    less = math.expm1(-TWO * abs(x))
    t = -less / (TWO + less)
    return t if x > 0 else -t


@functools.cache
def _capped_score(scale, softcap):
    INNER, CAP = np.float32(scale / softcap), np.float32(softcap)
    SCALE = np.float32(scale)

    @device
    def score(product):
        t = soft_tanh(product * INNER)
        return CAP * t, (ONE - t * t) * SCALE

    return score


def _rule(layer, hs, window, scale, softcap):
    """The rule of chapter 3.9 that these make."""
    window, scale, softcap = check_rule(layer, window, scale, softcap)
    if scale is None:
        scale = 1 / math.sqrt(hs)
    if softcap is None:
        score = plain_score(float(scale))
    else:
        score = _capped_score(float(scale), float(softcap))
    return window or 0, score


# %% attention with a window on a GPU tags=["export"] module="cuda.local"
@shapes("B T C!, B NH|C T!, B T QKV", DEVICE)
def local_attention_forward(
    out, lse, inp, window=None, scale=None, softcap=None
):
    """Causal self-attention that looks back a window only.

    inp: (B, T, (NH + 2 NKV) * hs), the heads of queries, of keys and of
    values; NKV divides NH, and hs is at most 256. Writes out (B, T, NH * hs)
    and lse (B, NH, T), the log-sum-exp of each row of scores, which the
    backward pass needs. window: how many positions a query sees, its own
    the last of them; None for all. scale: of the products, 1 / sqrt(hs)
    where None. softcap: c where scores become c tanh(score / c), or None. A
    kernel is compiled for each rule. All float32 on a device. Raises
    TypeError or ValueError before it launches anything.
    """
    layer = "local_attention_forward"
    heads = check_heads(layer, out, lse, inp)
    rule = _rule(layer, heads.hs, window, scale, softcap)
    launch_forward(heads, rule, out, lse, inp)


@shapes("B T QKV!, B T C, B T QKV, B T C, B NH|C T", DEVICE, work="W!?")
def local_attention_backward(
    dinp, dout, inp, out, lse, add=True, window=None, scale=None,
    softcap=None, work=None,
):  # fmt: skip
    """Add the gradient of attention with a window to dinp.

    dinp, inp: (B, T, (NH + 2 NKV) * hs). dout, out: (B, T, NH * hs). lse:
    (B, NH, T). out and lse are as the forward pass left them. add: False
    overwrites dinp instead of adding. window, scale, softcap: as in the
    forward pass. work: as for attention_backward. All float32 on a device.
    Raises TypeError or ValueError before it launches anything.
    """
    layer = "local_attention_backward"
    heads = check_heads(layer, out, lse, inp)
    rule = _rule(layer, heads.hs, window, scale, softcap)
    work = given_work(layer, work, lse.size, inp)
    launch_backward(heads, rule, (dinp, dout, inp, out, lse), add, work)


# %% the same on the simulator, and what it reads
from llmnb import cuda as on_gpu
from llmnb.gpu.launch import simulated, to_host
from llmnb.gpu.simulator import watch

reads = []
for rule in ({"window": 20, "softcap": 5.0, "scale": 0.5}, {"softcap": 5.0}):
    p = problem(130, (2, 1, 8))
    there = SimpleNamespace(**{k: simulated(x) for k, x in vars(p).items()})
    with watch() as seen:
        both_ways(on_gpu, there, **rule)
    both_ways(reference, p, **rule)
    for name in ("out", "lse", "dinp"):
        got = to_host(getattr(there, name))
        compare(name, got, getattr(p, name), tol=1e-5)
    reads.append(seen.shared_requests)
verdict("tiles", reads[0] < 0.7 * reads[1], "fewer with a window")

# %% [markdown]
# These kernels have been simulated and compiled, and not run on a GPU. The kernels of
# the norms of heads and of the logits' cap are in
# [appendix A.14](../appendix/14_heads.ipynb).
#
# ## Take away
#
# - A cache is $2 L \cdot NKV \cdot hs$ numbers a position: sharing keys makes the
#   factor small, a window bounds the positions.
# - Windows add up: $L$ blocks see $L (W - 1) + 1$ positions.
# - A soft cap's slope is $1 - (s/c)^2$; it multiplies the gradient of the scores.
# - A norm of queries and keys bounds the scores too, and lets the gradient live.
#
# ## Design note
#
# A window and a cap could have been two layers; Gemma 2 has both in one block. GPT-2's
# `attention_forward` stays, without arguments that Part 1 does not need.
#
# ## Exercises
#
# **1** (★). Gemma 3 1B has 26 blocks, one head of keys of 256 channels, a window of 512
# in five blocks of six. How many bytes, at 2 a number, does a text of 32,768
# tokens take in its cache, and how many without windows?
#
# **2** (★★). Show that grouped queries are ordinary attention with keys and values
# written out for each head, forward and backward.
#
# :::{admonition} Solutions to exercises 1 and 2
# :class: dropdown
# 1: 146 MB and 872 MB. Every sixth block sees all, four of 26; 22 keep 512 places (in
# llmnb a little more, up to whole blocks). 2: the gradients of all copies are added up.
# :::

# %% exercises 1 and 2, checked tags=["hide-cell"]
places = [512 if (i + 1) % 6 else 32768 for i in range(26)]
found = 2 * 2 * 256 * np.array([sum(places), 26 * 32768]) / 1e6
verdict("1: MB", found.round().tolist() == [146, 872], "146 and 872")

p, group = problem(9, (4, 2, 6), "f8"), 2
both_ways(reference, p, window=4)
q, k, v = np.split(p.inp.reshape(1, 9, 8, 6), (4, 6), axis=2)
wide = np.concatenate([q, *(x.repeat(group, axis=2) for x in (k, v))], axis=2)
w = problem(9, (4, 4, 6), "f8")
w.inp[...], w.dout[...] = wide.reshape(w.inp.shape), p.dout
both_ways(reference, w, window=4)
compare("2: out", w.out, p.out, tol=1e-12)
dq, dk, dv = np.split(w.dinp.reshape(1, 9, 12, 6), 3, axis=2)
dk, dv = (x.reshape(1, 9, 2, group, 6).sum(axis=3) for x in (dk, dv))
added = np.concatenate([dq, dk, dv], axis=2).reshape(p.dinp.shape)
compare("2: dinp", added, p.dinp, tol=1e-12)

# %% [markdown]
# ## Further reading
#
# - Ainslie et al. (2023), [GQA](https://arxiv.org/abs/2305.13245): fewer heads of keys.
# - Jiang et al. (2023), [Mistral 7B](https://arxiv.org/abs/2310.06825), section 2:
#   windows. Gemma Team (2024), [Gemma 2](https://arxiv.org/abs/2408.00118), section 2.
# - Henry et al. (2020), [Query-Key Normalization](https://arxiv.org/abs/2010.04245).
#
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("5.4")
