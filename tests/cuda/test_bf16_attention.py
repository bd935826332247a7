"""Attention in bfloat16: simulated, and its machine code."""

import numpy as np
import pytest
from gpu import check_machine_code, tensor_instructions

from llmnb.cuda import attention_backward_bf16, attention_forward_bf16
from llmnb.gpu.launch import empty, simulated, to_host
from llmnb.gpu.simulator import watch
from llmnb.reference import attention as reference
from llmnb.reference.bfloat16 import from_bfloat16, to_bfloat16

ROUNDING = 2**-8  # of one number; the errors are of whole arrays


def half(*shape, seed=0):
    draw = np.random.default_rng(seed).normal(size=shape)
    return to_bfloat16(draw.astype(np.float32))


def wide(x):
    return from_bfloat16(x).astype(float)


def error(got, want):
    assert np.isfinite(got).all()
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def by_hand(inp, dout, out, lse, hs, start):
    """The gradient in float64, but for the roundings that 3.15 names."""
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
    a, ds = rounded(a), rounded(ds)
    dq, dk = (z / np.sqrt(hs) for z in (ds @ k, ds.swapaxes(2, 3) @ q))
    dk, dv = (
        z.reshape(B, NKV, -1, T, hs).sum(2)
        for z in (dk, a.swapaxes(2, 3) @ dy)
    )
    found = np.concatenate([dq, dk, dv], 1).swapaxes(1, 2)
    return rounded(found.reshape(inp.shape) + start)


def rounded(x):
    return wide(to_bfloat16(x.astype(np.float32)))


def passes(B, T, NH, hs, NKV=None, add=False, races=True):
    """Both passes, their errors checked; returns dinp and what was seen."""
    width = (NH + 2 * (NKV or NH)) * hs
    inp, dout = half(B, T, width), half(B, T, NH * hs, seed=1)
    want, want_lse = np.empty(dout.shape), np.empty((B, NH, T))
    reference.attention_forward(want, want_lse, wide(inp))
    before = wide(half(B, T, width, seed=2)) * add
    grads = before.copy()
    start = half(B, T, width, seed=2) if add else np.full_like(inp, 0x7FC0)
    reference.attention_backward(grads, wide(dout), wide(inp), want, want_lse)
    there, dinp = simulated(inp), simulated(start)
    out, lse = empty(dout.shape, np.uint16), empty((B, NH, T))
    with watch(races) as seen:
        attention_forward_bf16(out, lse, there)
        attention_backward_bf16(dinp, simulated(dout), there, out, lse, add)
    assert error(wide(to_host(out)), want) < ROUNDING / 2
    assert np.abs(to_host(lse) - want_lse).max() < 2e-6
    assert error(wide(to_host(dinp)), grads) < ROUNDING
    got = wide(to_host(out)), to_host(lse).astype(float)
    hand = by_hand(wide(inp), wide(dout), *got, hs, before)
    assert error(wide(to_host(dinp)), hand) < 3e-4  # nothing else is rounded
    return to_host(dinp), seen


def test_two_tiles_and_heads_that_share_keys():
    passes(1, 67, 2, 16, NKV=1, add=True)


def test_a_width_of_64_over_three_tiles():
    """The third tile's part of dq comes from three strips."""
    passes(1, 130, 1, 64, races=False)


def test_few_rows_and_several_sequences():
    passes(2, 3, 2, 32)


def test_strips_of_several_tiles(monkeypatch):
    """One strip walks over both tiles of keys, and adds as two do."""
    monkeypatch.setattr("llmnb.cuda.bf16_attention.BLOCKS", 1)
    passes(1, 70, 1, 16)


@pytest.mark.parametrize("hs", (16, 64))
def test_machine_code(hs):
    """Nothing spilled, and all products on tensor cores."""
    _, seen = passes(1, 2, 1, hs, races=False)
    check_machine_code(seen)
    found = list(tensor_instructions(seen, "attention_"))
    assert len(found) == 4  # two kernels, two generations
    for counts in found:
        assert counts["HMMA"] >= 16
        assert counts["LDSM"] >= 9
        assert counts["LDGSTS"] >= 4


def test_heads_of_other_widths_are_refused():
    out, lse, inp = half(1, 2, 24), np.zeros((1, 1, 2), np.float32), None
    inp = half(1, 2, 72)
    there = [simulated(x) for x in (out, lse, inp)]
    with pytest.raises(ValueError, match="16, 32, 64 channels, got 24"):
        attention_forward_bf16(*there)
