"""Attention in bfloat16: simulated, and its machine code."""

import numpy as np
import pytest
from gpu import check_machine_code, error, half, tensor_instructions
from gpu import wide_half as wide

from llmnb.cuda import attention_backward_bf16, attention_forward_bf16
from llmnb.gpu.launch import empty, simulated, to_host
from llmnb.gpu.simulator import watch
from llmnb.reference import attention as reference
from llmnb.reference.bfloat16 import to_bfloat16

MOST = 2e-3  # of any result's norm; rounding the result is 1.7e-3 of it


def by_hand(inp, dout, out, lse, hs, start):
    """The gradient in float64, rounded once, as it is written."""
    B, NH, T = lse.shape
    x, dy, y = (
        z.reshape(B, T, -1, hs).swapaxes(1, 2) for z in (inp, dout, out)
    )
    NKV = (x.shape[1] - NH) // 2
    q, k, v = x[:, :NH], x[:, NH : NH + NKV], x[:, NH + NKV :]
    k, v = (z.repeat(NH // NKV, 1) for z in (k, v))
    s = np.where(np.tri(T), q @ k.swapaxes(2, 3) / np.sqrt(hs), -np.inf)
    a = np.exp(s - lse[..., None])
    ds = a * (dy @ v.swapaxes(2, 3) - (dy * y).sum(-1, keepdims=True))
    dq, dk = (z / np.sqrt(hs) for z in (ds @ k, ds.swapaxes(2, 3) @ q))
    dk, dv = (
        z.reshape(B, NKV, -1, T, hs).sum(2)
        for z in (dk, a.swapaxes(2, 3) @ dy)
    )
    found = np.concatenate([dq, dk, dv], 1).swapaxes(1, 2)
    return rounded(found.reshape(inp.shape) + start)


def rounded(x):
    return wide(to_bfloat16(x.astype(np.float32)))


def passes(B, T, NH, hs, NKV=1, add=False, races=True, seed=0):
    """Both passes, their errors checked; returns what was seen."""
    width = (NH + 2 * NKV) * hs
    inp = half(B, T, width, seed=seed)
    dout = half(B, T, NH * hs, seed=seed + 1)
    want, want_lse = np.empty(dout.shape), np.empty((B, NH, T))
    reference.attention_forward(want, want_lse, wide(inp))
    before = wide(half(B, T, width, seed=2)) * add
    grads = before.copy()
    start = half(B, T, width, seed=2) if add else np.full_like(inp, 0x7FC0)
    reference.attention_backward(grads, wide(dout), wide(inp), want, want_lse)
    there, dinp = simulated(inp), simulated(start)
    out, rest = (empty(dout.shape, np.uint16) for _ in range(2))
    lse, grad = empty((B, NH, T)), simulated(dout)
    with watch(races) as seen:
        attention_forward_bf16(out, lse, there, rest)
        attention_backward_bf16(dinp, grad, there, out, lse, add, rest=rest)
    assert error(out, want) < MOST
    assert error(wide(out) + wide(rest), want) < 1e-5
    assert np.abs(to_host(lse) - want_lse).max() < 2e-6
    found = wide(dinp)
    ends = NH * hs, (NH + NKV) * hs  # of queries, and of keys
    pairs = (np.split(x, ends, -1) for x in (found, grads))
    assert all(error(*pair) < MOST for pair in zip(*pairs, strict=True))
    hand = by_hand(wide(inp), wide(dout), want, want_lse, hs, before)
    assert error(found, hand) < 3e-4  # nothing else is rounded
    return seen


@pytest.mark.parametrize(
    ("shape", "how"),
    [
        ((1, 67, 2, 16), {"add": True}),  # heads that share keys
        ((1, 130, 1, 64), {"races": False}),  # a part of dq from three strips
        ((2, 3, 2, 32), {"NKV": 2}),
        ((1, 66, 1, 64), {"races": False, "seed": 10}),
        ((1, 66, 1, 64), {"races": False, "seed": 20}),
    ],
)
def test_both_passes(shape, how):
    passes(*shape, **how)


def test_the_output_alone_has_not_the_rows_sums():
    """Without what rounding left of it dq is further from float64."""
    x = half(1, 66, 48, seed=3), half(1, 66, 16, seed=4)
    inp, dout = (simulated(z) for z in x)
    want, want_lse = np.empty((1, 66, 16)), np.empty((1, 1, 66))
    grads = np.zeros((1, 66, 48))
    reference.attention_forward(want, want_lse, wide(x[0]))
    reference.attention_backward(grads, wide(x[1]), wide(x[0]), want, want_lse)
    out, rest = (empty((1, 66, 16), np.uint16) for _ in range(2))
    lse, dinp, errors = empty((1, 1, 66)), empty(grads.shape, np.uint16), []
    with watch(races=False):
        attention_forward_bf16(out, lse, inp, rest)
        for kept in (None, rest):
            given = dinp, dout, inp, out, lse, False
            attention_backward_bf16(*given, rest=kept)
            errors.append(error(wide(dinp)[..., :16], grads[..., :16]))
    assert errors[0] > 1.15 * errors[1]


def test_strips_of_several_tiles(monkeypatch):
    """One strip walks over both tiles of keys, and adds as two do."""
    monkeypatch.setattr("llmnb.cuda.bf16_attention.BLOCKS", 1)
    passes(1, 70, 1, 16)


@pytest.mark.parametrize("hs", (16, 64))
def test_machine_code(hs):
    """Nothing spilled; as many products as the chapter's table has."""
    seen = passes(1, 2, 1, hs, races=False)
    check_machine_code(seen)
    found = list(tensor_instructions(seen, "attention_"))
    assert len(found) == 4  # two kernels, two generations
    steps = hs // 16
    assert [x["HMMA"] for x in found] == 2 * [24 * steps] + 2 * [28 * steps]
    assert [x["LDSM"] for x in found] == 2 * [9 * steps] + 2 * [8 + 10 * steps]
    assert all(x["LDGSTS"] >= 4 for x in found)


def test_heads_of_other_widths_are_refused():
    out, inp = simulated(half(1, 2, 24)), simulated(half(1, 2, 72))
    with pytest.raises(ValueError, match="16, 32, 64 channels, got 24"):
        attention_forward_bf16(out, empty((1, 1, 2), like=out), inp)
