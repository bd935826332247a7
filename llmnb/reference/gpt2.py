# Written by `make export` from notebooks/1_by_hand/14_page.py: edit that file.

"""GPT-2 on one page: forward and backward, in plain NumPy."""

__all__ = ["backward", "forward"]


# imports of the page
import math

import numpy as np


# LayerNorm
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


# linear
def linear(x, p, name, i):
    return x @ p[name + "w"][i].T + p[name + "b"][i]


def linear_back(dy, x, p, g, name, i):
    rows, drows = (a.reshape(-1, a.shape[-1]) for a in (x, dy))
    g[name + "w"][i] = drows.T @ rows
    g[name + "b"][i] = drows.sum(0)
    return dy @ p[name + "w"][i]


# GELU
ROOT, CUBIC = math.sqrt(2 / math.pi), 0.044715


def gelu(x):
    return 0.5 * x * (1 + np.tanh(ROOT * (x + CUBIC * x**3)))


def gelu_back(dy, x):
    t = np.tanh(ROOT * (x + CUBIC * x**3))
    du = ROOT * (1 + 3 * CUBIC * x**2)
    return dy * 0.5 * (1 + t + x * (1 - t**2) * du)


# attention's weights
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


# attention
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


# forward
def forward(p, tokens, targets, NH, V):
    """The mean loss of a batch, and what `backward` needs: two things.

    p: the parameters, a dict of arrays by llm.c's names. tokens, targets:
    integers (B, T), each below V, the number of tokens. NH: heads.

    Derived in chapter 1.14.
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


# backward
def backward(p, tokens, targets, NH, kept):
    """The gradients of the loss, a dict of arrays like p.

    The arguments are those of `forward`; kept is what it returned.

    Derived in chapter 1.14.
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
