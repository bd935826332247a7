# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       reference.gpt2: "GPT-2 on one page: forward and backward, in plain NumPy."
# ---

# %% [markdown]
# # One page: the whole model, forward and backward
#
# > A hundred lines of NumPy, with nothing behind them, compute a
# > GPT-2's loss and the gradient of every parameter.
#
# *Reading time: 25 minutes. You need: the layers of chapters
# [1.5](05_encoder.ipynb) to [1.11](11_crossentropy.ipynb), AdamW
# ([chapter 1.12](12_adamw.ipynb)) and the block ([chapter 1.13](13_block.ipynb)).*
#
# ## Where we are
#
# All layers are derived, and each is proved alone. They were written to serve a
# real training run: each checks what it is given, and fills arrays that somebody
# else has laid out. Here we put all that aside for once, and write the model as one
# would on a blackboard: a line is an equation, an array is made where it is needed.
# It is the model that [chapter 1.17](17_model.ipynb) makes of those layers: in float64
# the two compute the same bits. You can print [the page as one
# sheet](../../book/poster.pdf), with figure 1.14.1 beside it.
#
# At the end of this chapter you can
#
# - write GPT-2, forward and backward, with paper and NumPy;
# - follow a gradient from the loss to any parameter, array by array;
# - find all places where gradients add up, and say what each mistake there does;
# - prove the gradient of a whole model.
#
# ## Setup

# %% setup
import ast
from pathlib import Path

import matplotlib.pyplot as plt

from llmnb import reference
from llmnb.book.diagram import PALETTE
from llmnb.book.verify import compare, numerical_gradient, verdict
from llmnb.book.wiring import wiring_figure
from llmnb.config import GPT2Config
from llmnb.model.tensors import parameter_shapes
from llmnb.reference.adamw import AdamW, adamw_update

# %% imports of the page tags=["export"]
import math

import numpy as np

# %% [markdown]
# ## The parameters
#
# `p` maps the names of the [notation page](../../book/notation.md) to arrays,
# and `g` maps the same names to their gradients. The $L$ blocks' weights of one kind
# are one array, so `p["qkvw"][i]` are block `i`'s. A layer is told a name and a
# number: `linear(x, p, "qkv", i)` reads `p["qkvw"][i]` and `p["qkvb"][i]`. The last
# LayerNorm is in no block; its number is `...`, Python's word for "all there is", and
# indexing with it gives the array itself.
#
# ## The layers, once more
#
# Every layer is a function that returns what it computes, and its twin with
# `_back` in its name takes `dy`, the gradient of what was computed, and returns
# the gradient of what was read. On the way it writes the gradients of the
# layer's weights into `g`.
#
# **LayerNorm**, [chapter 1.6](06_layernorm.ipynb). `hat` normalises the rows. The
# backward pass calls it again, so that nothing needs to be kept but the input. The
# weights' gradients are sums over sequences and positions, the axes `(0, 1)`. The last
# line is (1.6.10): it takes two parts out of the gradient, its mean, and its share
# along the normalised row.


# %% LayerNorm tags=["exporti"]
def hat(x):
    centred = x - x.mean(-1, keepdims=True)
    rstd = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return centred * rstd, rstd


def layernorm(x, p, name, i=...):
    return hat(x)[0] * p[name + "w"][i] + p[name + "b"][i]


def layernorm_back(dy, x, p, g, name, i=...):
    xhat, rstd = hat(x)
    g[name + "w"][i] = (dy * xhat).sum((0, 1))
    g[name + "b"][i] = dy.sum((0, 1))
    dhat = dy * p[name + "w"][i]
    mean = dhat.mean(-1, keepdims=True)
    along = (dhat * xhat).mean(-1, keepdims=True)
    return rstd * (dhat - mean - xhat * along)


# %% [markdown]
# **The linear layer**, [chapter 1.7](07_matmul.ipynb): one product forward, two
# backward. The gradient of a weight is a sum over all $BT$ rows, so the rows of
# all sequences are put one after the other first.


# %% linear tags=["exporti"]
def linear(x, p, name, i):
    return x @ p[name + "w"][i].T + p[name + "b"][i]


def linear_back(dy, x, p, g, name, i):
    rows, drows = (a.reshape(-1, a.shape[-1]) for a in (x, dy))
    g[name + "w"][i] = drows.T @ rows
    g[name + "b"][i] = drows.sum(0)
    return dy @ p[name + "w"][i]


# %% [markdown]
# **GELU**, [chapter 1.9](09_gelu.ipynb), forward (1.9.2) and backward (1.9.7). `t` is
# $\tanh \xi$, and `du` is $d\xi / dx$, (1.9.6): for once a `d` that is no gradient of
# the loss.

# %% GELU tags=["exporti"]
ROOT, CUBIC = math.sqrt(2 / math.pi), 0.044715


def gelu(x):
    return 0.5 * x * (1 + np.tanh(ROOT * (x + CUBIC * x**3)))


def gelu_back(dy, x):
    t = np.tanh(ROOT * (x + CUBIC * x**3))
    du = ROOT * (1 + 3 * CUBIC * x**2)
    return dy * 0.5 * (1 + t + x * (1 - t**2) * du)


# %% [markdown]
# **Attention**, [chapter 1.8](08_attention.ipynb). `to_heads` turns $(B, T, C)$ into
# $(B, NH, T, hs)$ and `from_heads` turns it back. `attend` computes what both
# passes need: queries, keys, values, and the weights, which are the softmax of the
# scores with the future masked (`np.tri` is true where $u \le t$), taken by way of
# its logarithm, (1.8.4). The loss will call `log_sum_exp` again.
#
# `attention_back` goes through (1.8.5) to (1.8.10), only with the row sum $D$ of
# (1.8.9), which is `row`, before the scores that need it: the values, the weights, $D$,
# the scores, and then queries and keys. The scale
# $1 / \sqrt{hs}$ of the last two is multiplied into `dscores` once for both.


# %% attention's weights tags=["exporti"]
def log_sum_exp(x):
    top = x.max(-1, keepdims=True)
    return top + np.log(np.exp(x - top).sum(-1, keepdims=True))


def to_heads(x, NH):
    return x.reshape(*x.shape[:2], NH, -1).swapaxes(1, 2)


def from_heads(x):
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)


def attend(qkv, NH):
    q, k, v = (to_heads(x, NH) for x in np.split(qkv, 3, -1))
    scale = 1 / math.sqrt(q.shape[-1])
    scores = q @ k.swapaxes(-1, -2) * scale
    scores[..., ~np.tri(q.shape[-2], dtype=bool)] = -np.inf
    return q, k, v, np.exp(scores - log_sum_exp(scores)), scale


# %% attention tags=["exporti"]
def attention(qkv, NH):
    q, k, v, att, scale = attend(qkv, NH)
    return from_heads(att @ v)


def attention_back(dy, y, qkv, NH):
    q, k, v, att, scale = attend(qkv, NH)
    y, dy = to_heads(y, NH), to_heads(dy, NH)
    dv = att.swapaxes(-1, -2) @ dy
    datt = dy @ v.swapaxes(-1, -2)
    row = (dy * y).sum(-1, keepdims=True)
    dscores = att * (datt - row) * scale
    dq, dk = dscores @ k, dscores.swapaxes(-1, -2) @ q
    return np.concatenate([from_heads(x) for x in (dq, dk, dv)], -1)


# %% [markdown]
# ## Forward
#
# Now the model. `x` is the stream; the lines `x + linear(...)` and
# `a["residual2"] + linear(...)` are the residual sums ([chapter
# 1.10](10_residual.ipynb)). `a` keeps one block's arrays by name, for the way back.
# The last lines are the loss of [chapter 1.11](11_crossentropy.ipynb): log-sum-exp
# minus the logit of the token that came true, which is `hit`.


# %% forward tags=["export"]
def forward(p, tokens, targets, NH, V):
    """The mean loss of a batch, and what `backward` needs: two things.

    p: the parameters, a dict of arrays by llm.c's names. tokens, targets:
    integers (B, T), each below V, the number of tokens. NH: heads.
    """
    x = p["wte"][tokens] + p["wpe"][: tokens.shape[1]]
    blocks = []
    for i in range(len(p["qkvw"])):
        a = {"x": x}
        a["ln1"] = layernorm(x, p, "ln1", i)
        a["qkv"] = linear(a["ln1"], p, "qkv", i)
        a["atty"] = attention(a["qkv"], NH)
        a["residual2"] = x + linear(a["atty"], p, "attproj", i)
        a["ln2"] = layernorm(a["residual2"], p, "ln2", i)
        a["fch"] = linear(a["ln2"], p, "fc", i)
        a["fch_gelu"] = gelu(a["fch"])
        x = a["residual2"] + linear(a["fch_gelu"], p, "fcproj", i)
        blocks.append(a)
    lnf = layernorm(x, p, "lnf")
    logits = (lnf @ p["wte"].T)[..., :V]
    lse = log_sum_exp(logits)
    hit = np.take_along_axis(logits, targets[..., None], -1)
    kept = {"x": x, "lnf": lnf, "logits": logits, "lse": lse}
    return (lse - hit).mean(), kept | {"blocks": blocks}


# %% [markdown]
# Run it at once. GPT-2 begins with matrices and tables of random numbers, normal with
# mean 0 and standard deviation 0.02; the next chapter says why so small. (Those that
# write into the stream begin smaller, (1.10.6); the page does without.) LayerNorm's
# weights begin at 1, and all biases at 0.
#
# Such a model knows nothing, so its first loss should be about $\log V$, what an even
# guess pays. How near, with a batch so small? The last LayerNorm's rows have mean
# square 1, and a logit is the product of such a row with a row of `wte`: a sum of $C$
# terms, with standard deviation $0.02 \sqrt C$, here 0.04. The mean loss should be off
# by less. If yours is not, look for the mistake before you train. (A loss well *under*
# $\log V$ on fresh weights means that targets leak into the input.)


# %% the first weights
def first_weights(cfg, rng):
    """Random matrices and tables; LayerNorms that only normalise."""
    p = {}
    for name, shape in parameter_shapes(cfg).items():
        if name.endswith("b"):
            p[name] = np.zeros(shape)
        elif name.startswith("ln"):
            p[name] = np.ones(shape)
        else:
            p[name] = rng.normal(scale=0.02, size=shape)
    return p


# %% a first loss
cfg = GPT2Config(
    max_seq_len=6, vocab_size=7, num_layers=2, num_heads=2, channels=4
)
NH, V = cfg.num_heads, cfg.vocab_size
rng = np.random.default_rng(12)
p = first_weights(cfg, rng)
tokens, targets = rng.integers(0, V, (2, 2, 5))
loss, kept = forward(p, tokens, targets, NH, V)
verdict("first loss", abs(loss - np.log(V)) < 0.04, "is near log 7")
for name, array in kept["blocks"][0].items():
    print(f"{name:<10} {array.shape}")

# %% [markdown]
# ## The wiring
#
# Plain arrows are the forward pass, orange ones the gradients that flow back along
# the same roads. Every array on a road has the name that it has in the code.

# %% the wiring of GPT-2 tags=["hide-input"]
wiring_figure("model")

# %% [markdown]
# *Figure 1.14.1. GPT-2 with every array named. A circle is a place where arrays add
# up: dark ones in the forward pass, orange ones on the way back. Each orange circle
# stands where the forward pass read one array more than once: the stream is read by
# every half block and by the sum that follows it, `ln1` becomes queries, keys and
# values, and `wte` is read at both ends of the model. The way back begins with the
# loss's gradient by itself, which is 1.*
#
# The rule behind the orange circles is the chain rule for several roads. Let an array
# $x$ be read by layers $f_1, f_2, \dots$, and move one of its numbers, $x_j$, a little.
# The element $o$ of what layer $i$ computes then moves $\partial f_{i,o} / \partial
# x_j$ times as far, and the loss $df_{i,o}$ times as far as that. All these shares come
# together in the loss:
#
# $$ dx_j = \sum_i \sum_o df_{i,o}\, \frac{\partial f_{i,o}}{\partial x_j} .
#    \tag{1.14.1} $$
#
# The inner sum is what one layer's backward pass hands back; the outer one is the
# circle.
#
# [Chapter 1.13](13_block.ipynb) named the three kinds of array that are read so. On
# the page the sums are these:
#
# 1. **The stream**: `dx = dx + layernorm_back(...)`.
# 2. **`ln1`**: $dq\, W_q + dk\, W_k + dv\, W_v$ is one product, `dqkv @ qkvw`, the last
#    line of `linear_back`.
# 3. **`wte`**: `g["wte"] += ...` at the logits, `np.add.at(g["wte"], ...)` at the encoder.
#
# A gradient of a parameter is a sum as well, for the same reason: every token's
# row reads the same weights. That is the sum over rows in `drows.T @ rows`, the
# `.sum(0)` of a bias, and the sum over sequences for a position's vector. And within
# attention a key and a value are read by their own position and all later ones: the
# products with `att` and `dscores` turned round are those sums.
#
# ## Backward
#
# Read `forward` from its last line to its first, and write down the twin of each
# call. The gradient of the mean loss by the logits is (1.11.9) with $d\ell = 1 /
# BT$: the softmax, minus 1 at the target (`hit` here is a mask, true there), over
# the number of tokens. The padding of the table has no part in it and stays 0.
# `np.add.at` adds a row of `dx` to the table for each token, however often a token
# occurs.


# %% backward tags=["export"]
def backward(p, tokens, targets, NH, kept):
    """The gradients of the loss, a dict of arrays like p.

    The arguments are those of `forward`; kept is what it returned.
    """
    g = {name: np.zeros_like(array) for name, array in p.items()}
    lnf, logits, lse = kept["lnf"], kept["logits"], kept["lse"]
    (B, T, V), (Vp, C) = logits.shape, p["wte"].shape
    hit = targets[..., None] == np.arange(V)
    dlogits = np.zeros((B, T, Vp), logits.dtype)
    dlogits[..., :V] = (np.exp(logits - lse) - hit) * (1 / (B * T))
    g["wte"] += dlogits.reshape(-1, Vp).T @ lnf.reshape(-1, C)
    dlnf = dlogits @ p["wte"]
    dx = layernorm_back(dlnf, kept["x"], p, g, "lnf")
    for i, a in reversed([*enumerate(kept["blocks"])]):
        dfch_gelu = linear_back(dx, a["fch_gelu"], p, g, "fcproj", i)
        dfch = gelu_back(dfch_gelu, a["fch"])
        dln2 = linear_back(dfch, a["ln2"], p, g, "fc", i)
        dx = dx + layernorm_back(dln2, a["residual2"], p, g, "ln2", i)
        datty = linear_back(dx, a["atty"], p, g, "attproj", i)
        dqkv = attention_back(datty, a["atty"], a["qkv"], NH)
        dln1 = linear_back(dqkv, a["ln1"], p, g, "qkv", i)
        dx = dx + layernorm_back(dln1, a["x"], p, g, "ln1", i)
    np.add.at(g["wte"], tokens, dx)
    g["wpe"][:T] = dx.sum(0)
    return g


# %% [markdown]
# That is all of GPT-2. No library differentiates for it: every derivative on the page
# is one that you took.
#
# ## Proof
#
# Every element of every parameter, against central differences
# ([appendix A.11](../appendix/11_proofs.ipynb)) in float64 with $h = 10^{-5}$. We
# draw the weights wide, so that in no tensor the gradient is too small to test: the
# largest element of each is 100,000 times what may be wrong, at the least. `wte` has
# rows for padding, which no token names; their gradient is 0 and must be.

# %% every parameter of every tensor
p = {n: rng.normal(scale=0.5, size=x.shape) for n, x in p.items()}
_, kept = forward(p, tokens, targets, NH, V)
g = backward(p, tokens, targets, NH, kept)
numeric = {
    name: numerical_gradient(
        lambda: forward(p, tokens, targets, NH, V)[0], array
    )
    for name, array in p.items()
}
for name in p:
    compare(f"d{name}", g[name], numeric[name], tol=1e-8)
least = min(np.abs(x).max() for x in g.values())
verdict("each tensor", least > 1e5 * 1e-8, "has a gradient to test")

# %% [markdown]
# Would the proof notice a mistake? Here are five that a careful person makes. Each is
# one edit of the text of the page, `gpt2.py`, which is run again as edited. None of
# them raises an error, and each must be off by more than $10^{-3}$ somewhere, where
# the proof allows $10^{-8}$.
#
# - The second half's share replaces the stream's gradient, where it should be added.
# - `g["wte"][tokens] += dx` looks like `np.add.at` and is not: where a token occurs
#   twice in the batch, NumPy adds only the last of its rows.
# - The values' share of the gradient of `ln1` is lost.
# - The scale $1/\sqrt{hs}$ is forgotten on the way back.
# - LayerNorm's last term is forgotten.

# %% five mistakes
page = Path(reference.__file__).with_name("gpt2.py").read_text("utf-8")
MISTAKES = {
    "share lost": ("dx + layernorm_back(dln2", "layernorm_back(dln2"),
    "added once": ('np.add.at(g["wte"], tokens, dx)',
                   'g["wte"][tokens] += dx'),
    "no values": ("(dq, dk, dv)", "(dq, dk, 0 * dv)"),
    "no scale": ("(datt - row) * scale", "(datt - row)"),
    "no last term": (" - xhat * along", ""),
}  # fmt: skip


def edited(old, new, *batch):
    """The gradients of the page with one edit; batch: as for `forward`."""
    assert page.count(old) == 1
    names = {}
    exec(page.replace(old, new), names)
    _, kept = names["forward"](*batch)
    return names["backward"](*batch[:-1], kept)


for name, edit in MISTAKES.items():
    wrong = edited(*edit, p, tokens, targets, NH, V)
    far = max(np.abs(wrong[n] - numeric[n]).max() for n in p)
    verdict(name, far > 1e-3, "is caught")

# %% [markdown]
# Central differences say that the backward pass fits the forward pass, not that the
# forward pass is the one we want. Causality has to be seen directly: change the last
# token, and no logit before it may move, not by a single bit.

# %% the future is not read
_, kept = forward(p, tokens, targets, NH, V)
changed = tokens.copy()
changed[:, -1] = (changed[:, -1] + 1) % V
_, other = forward(p, changed, targets, NH, V)
same = kept["logits"] == other["logits"]
verdict("the future", same[:, :-1].all(), "does not reach the past")
verdict("the present", not same[:, -1].any(), "does move")

# %% [markdown]
# ## It learns
#
# The text to learn is the page itself, byte by byte: its bytes are below 128, and
# each is a token. The loop is that of [chapter 1.1](01_learns.ipynb) with AdamW's
# step in it. (`ravel` gives flat views, so the update writes into `p`, `m` and `v`. Its
# decay of 0.01 falls on all tensors here; in 500 steps it takes 1.5 %.)

# %% the page, as a text
text = np.frombuffer(page.encode(), np.uint8).astype(np.int64)
own = GPT2Config(32, 128, num_layers=2, num_heads=4, channels=32)
p = {n: x.astype(np.float32) for n, x in first_weights(own, rng).items()}
m, v = ({n: np.zeros_like(x) for n, x in p.items()} for _ in "mv")

# %% five hundred steps
B, T, losses = 8, 32, []
for step in range(1, 501):
    starts = rng.integers(0, len(text) - T, B)
    rows = text[starts[:, None] + np.arange(T + 1)]
    tokens, targets = rows[:, :-1], rows[:, 1:]
    loss, kept = forward(p, tokens, targets, own.num_heads, own.vocab_size)
    g = backward(p, tokens, targets, own.num_heads, kept)
    for n in p:
        arrays = [x[n].ravel() for x in (p, g, m, v)]
        adamw_update(*arrays, AdamW(3e-3, step=step))
    losses.append(loss)

# %% [markdown]
# A model that knows how often each byte occurs, and nothing else, pays at least the
# entropy of these shares, (1.11.3): the *unigram* loss. The first loss
# should lie within $0.02 \sqrt{32}$, about 0.1, of $\log 128$.

# %% what counting pays, and what the model pays
counts = np.bincount(text)
share = counts[counts > 0] / len(text)
unigram = -(share * np.log(share)).sum()
verdict("first", abs(losses[0] - np.log(128)) < 0.1, "is near log 128")
last = np.mean(losses[-20:])
verdict("last", last < 0.6 * unigram, "below 0.6 of the unigram's")

# %% the curve tags=["hide-input"]
fig, ax = plt.subplots(figsize=(7, 3.2), dpi=100)
ax.plot(losses, color=PALETTE["blue"], lw=1)
for height, what in ((np.log(128), "log 128"), (unigram, "single bytes")):
    ax.axhline(height, color=PALETTE["grey"], lw=1, ls="--")
    ax.text(300, height + 0.07, what, ha="right", color=PALETTE["ink"])
ax.set(xlabel="step", ylabel="loss, nats a byte", ylim=(0, 5.4))
ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.14.2. A GPT-2 learns the text of its own source, in 500 steps of 256
# bytes. Within the first hundred steps the loss falls below what counting single bytes
# can reach, and it goes on falling: the rest it can only have from the bytes before.*
#
# ## What the page leaves out
#
# A model that is trained for days is the same arithmetic with some care around it,
# and each piece of that care has its chapter.
#
# | the page | the model of chapter 1.17 |
# |---|---|
# | draws its weights by one rule | draws them as PyTorch does, and so that depth does not spoil them, [chapter 1.15](15_weights.ipynb) |
# | makes a new array on each line | all arrays lie in one block that was measured beforehand, [chapter 1.16](16_memory.ipynb) |
# | keeps $16 C$ numbers a token and block | keeps $10 C$, and computes the others again |
# | knows one kind of norm and of feed-forward layer | takes the parts that its configuration names, [chapter 1.13](13_block.ipynb) |
# | believes its caller | checks each batch before it computes, [appendix A.9](../appendix/09_checks.ipynb) |
# | one batch, one gradient | adds the gradients of several batches |
# | NumPy | any backend: any set of layers with the same names |
#
# What must not differ is the result, and chapter 1.17 asks for it bit by bit.
#
# ## Count it
#
# The page in numbers, counted from its own text and its own arrays:

# %% lines, and numbers kept tags=["hide-input"]
tree = ast.parse(page)
lines = {
    line
    for node in ast.walk(tree)
    if isinstance(node, ast.stmt) and not isinstance(node, ast.FunctionDef)
    and not (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    )
    for line in range(node.lineno, node.end_lineno + 1)
}  # fmt: skip
heads = sum(isinstance(node, ast.FunctionDef) for node in ast.walk(tree))
print(len(lines) + heads, "lines of code in", heads, "functions")
numbers = sum(array.size for array in kept["blocks"][0].values())
print(numbers / (B * T * own.channels), "C numbers a token and block")

# %% [markdown]
# The $16 C$ are `x`, `ln1`, `atty`, `residual2` and `ln2` of width $C$, `qkv` of $3C$,
# and `fch` and `fch_gelu` of $4C$ each. Forward, a block does $24 C^2$ operations a
# token for its four products, besides what attention does (each weight is multiplied
# once and its product added once; there are $3C^2 + C^2 + 4C^2 + 4C^2 = 12 C^2$), and
# twice as many backward, where each product has two twins.
#
# ## Take away
#
# - GPT-2 is eight lines a block; its backward pass is the eight twins in reverse.
# - What is read more than once receives a sum of gradients: the stream, `ln1` through
#   queries, keys and values, and `wte`.
# - Central differences on the whole model watch over every wire, and mistakes that
#   raise no error are caught.
#
# ## Design note
#
# The page could have been shorter. A tape that records every operation and plays it
# back differentiates any forward pass: that is *automatic differentiation*, and with
# it the whole second half of this page is one call. It would be the better tool for a
# model that changes every day. This book wants you to own the second half.
#
# The page could also have called the functions of the layers' chapters. They want
# their outputs laid out beforehand, and half the page would have been `np.empty`.
#
# ## Exercises
#
# **1** (★). Cover `backward` and write it from `forward`. Then do the same for
# `attention_back` alone, with the shapes beside each line.
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# Put yours in the place of the page's, and run the cells of the proof again. If a
# gradient has the wrong shape, a transpose is missing; if it has the right shape and
# the wrong value, look for a sum.
# :::
#
# **2** (★★). The gradient of `wte` is a sum of two. Compute the encoder's share and
# the logits' share apart, and show that they add up. Which of the two reaches tokens
# that do not occur in the batch?
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# Without its line `np.add.at` the backward pass gives the logits' share, and without
# the line `g["wte"] += ...` the encoder's. The softmax gives every token some
# probability, so the logits' share reaches every token of the vocabulary; the
# encoder's only those that were read.
# :::

# %% exercise 2 tags=["hide-cell"]
small = GPT2Config(5, 9, num_layers=1, num_heads=2, channels=4)
q = {n: rng.normal(size=s) for n, s in parameter_shapes(small).items()}
batch = np.array([[0, 1, 2, 1, 0]])
how = batch, batch[:, ::-1], 2
_, kept = forward(q, *how, 9)
whole = backward(q, *how, kept)["wte"]
foot = 'np.add.at(g["wte"], tokens, dx)'
logits_share = edited(foot, "pass", q, *how, 9)["wte"]
head = 'g["wte"] += dlogits.reshape(-1, Vp).T @ lnf.reshape(-1, C)'
encoder_share = edited(head, "pass", q, *how, 9)["wte"]

# %% exercise 2, checked
compare("their sum", encoder_share + logits_share, whole, tol=1e-12)
reached = [np.flatnonzero(np.abs(x).max(1) > 1e-9) for x in
           (encoder_share, logits_share)]  # fmt: skip
print("the encoder's share reaches", reached[0])
print("the logits' share reaches  ", reached[1])

# %% [markdown]
# **3** (★★★). Give the model a seventeenth tensor: weights `headw` of its own for
# the logits, instead of `wte`. Which lines change? What becomes of the sum in the
# gradient of `wte`?
#
# :::{admonition} Solution to exercise 3
# :class: dropdown
# Three lines: the logits in `forward`, and the two lines in `backward` that name
# `wte` next to `dlogits`. The sum is gone: each table has one reader. The model
# has $V_p C$ parameters more.
# :::

# %% exercise 3 tags=["hide-cell"]
untied = {}
exec(
    page.replace('(lnf @ p["wte"].T)', '(lnf @ p["headw"].T)')
    .replace('g["wte"] += dlogits', 'g["headw"] += dlogits')
    .replace('dlogits @ p["wte"]', 'dlogits @ p["headw"]'),
    untied,
)
q["headw"] = rng.normal(size=q["wte"].shape)

# %% exercise 3, checked
_, kept = untied["forward"](q, *how, 9)
got = untied["backward"](q, *how, kept)
for name in ("wte", "headw"):
    want = numerical_gradient(
        lambda: untied["forward"](q, *how, 9)[0], q[name]
    )
    compare(f"d{name}", got[name], want, tol=1e-8)
verdict("headw", got["headw"].any(), "makes the logits")
reached = np.flatnonzero(got["wte"].any(1))
verdict("wte", list(reached) == [0, 1, 2], "hears of the batch's tokens")

# %% [markdown]
# ## Further reading
#
# - Press and Wolf (2017), [Using the Output Embedding to Improve Language
#   Models](https://arxiv.org/abs/1608.05859): why one table may serve at both ends.
# - Karpathy (2024), [llm.c](https://github.com/karpathy/llm.c): `train_gpt2.c`
#   has the same list of calls in C; compare it with `forward` and `backward`.
# - Baydin et al. (2018), [Automatic Differentiation in Machine Learning: a
#   Survey](https://www.jmlr.org/papers/v18/17-468.html): what the design note calls a
#   tape.
#
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("1.14")
