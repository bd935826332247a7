"""Attention in bfloat16: simulated, and its machine code."""

import numpy as np
import pytest
from gpu import check_machine_code, tensor_instructions

from llmnb.cuda import attention_backward_bf16, attention_forward_bf16
from llmnb.gpu.launch import empty, simulated, to_host
from llmnb.gpu.simulator import watch
from llmnb.reference import attention as reference
from llmnb.reference.bfloat16 import from_bfloat16, to_bfloat16

MOST = 2e-3  # of any result's norm; rounding the result is 1.7e-3 of it


def half(*shape, seed=0):
    draw = np.random.default_rng(seed).normal(size=shape)
    return to_bfloat16(draw.astype(np.float32))


def wide(x):
    return from_bfloat16(x).astype(float)


def error(got, want):
    assert np.isfinite(got).all()
    return np.linalg.norm(got - want) / np.linalg.norm(want)


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


def parts(x, NH, hs):
    """Of queries, keys and values."""
    width = NH * hs
    rest = (x.shape[-1] - width) // 2
    return x[..., :width], x[..., width:-rest], x[..., -rest:]


def passes(B, T, NH, hs, NKV=None, add=False, races=True, seed=0):
    """Both passes, their errors checked; returns dinp and what was seen."""
    width = (NH + 2 * (NKV or NH)) * hs
    inp, dout = (
        half(B, T, width, seed=seed),
        half(B, T, NH * hs, seed=seed + 1),
    )
    want, want_lse = np.empty(dout.shape), np.empty((B, NH, T))
    reference.attention_forward(want, want_lse, wide(inp))
    before = wide(half(B, T, width, seed=2)) * add
    grads = before.copy()
    start = half(B, T, width, seed=2) if add else np.full_like(inp, 0x7FC0)
    reference.attention_backward(grads, wide(dout), wide(inp), want, want_lse)
    there, dinp = simulated(inp), simulated(start)
    out, lse = empty(dout.shape, np.uint16), empty((B, NH, T))
    more = {"rest": empty(dout.shape, np.uint16)}
    with watch(races) as seen:
        attention_forward_bf16(out, lse, there, **more)
        grad = simulated(dout)
        attention_backward_bf16(dinp, grad, there, out, lse, add, **more)
    out, rest = wide(to_host(out)), wide(to_host(more["rest"]))
    assert error(out, want) < MOST
    assert error(out + rest, want) < 1e-5
    assert np.abs(to_host(lse) - want_lse).max() < 2e-6
    found = wide(to_host(dinp))
    for got, right in zip(
        parts(found, NH, hs), parts(grads, NH, hs), strict=True
    ):
        assert error(got, right) < MOST
    hand = by_hand(wide(inp), wide(dout), want, want_lse, hs, before)
    assert error(found, hand) < 3e-4  # nothing else is rounded
    return to_host(dinp), seen


def test_two_tiles_and_heads_that_share_keys():
    passes(1, 67, 2, 16, NKV=1, add=True)


def test_a_width_of_64_over_three_tiles():
    """The third tile's part of dq comes from three strips."""
    passes(1, 130, 1, 64, races=False)


def test_few_rows_and_several_sequences():
    passes(2, 3, 2, 32)


@pytest.mark.parametrize("seed", (10, 20))
def test_two_tiles_of_64_channels(seed):
    passes(1, 66, 1, 64, races=False, seed=seed)


def test_the_output_alone_has_not_the_rows_sums():
    """Without what rounding left of it dq is further from float64."""
    x = half(1, 66, 48, seed=3), half(1, 66, 16, seed=4)
    inp, dout = (simulated(z) for z in x)
    want, want_lse = np.empty((1, 66, 16)), np.empty((1, 1, 66))
    grads = np.zeros((1, 66, 48))
    reference.attention_forward(want, want_lse, wide(x[0]))
    reference.attention_backward(grads, wide(x[1]), wide(x[0]), want, want_lse)
    out, rest, lse = (
        empty(*how) for how in [((1, 66, 16), np.uint16)] * 2 + [((1, 1, 66),)]
    )
    dinp, errors = empty(grads.shape, np.uint16), []
    with watch(races=False):
        attention_forward_bf16(out, lse, inp, rest)
        for more in ({}, {"rest": rest}):
            attention_backward_bf16(dinp, dout, inp, out, lse, False, **more)
            dq = wide(to_host(dinp))[..., :16]
            errors.append(error(dq, grads[..., :16]))
    assert errors[0] > 1.15 * errors[1]


def test_strips_of_several_tiles(monkeypatch):
    """One strip walks over both tiles of keys, and adds as two do."""
    monkeypatch.setattr("llmnb.cuda.bf16_attention.BLOCKS", 1)
    passes(1, 70, 1, 16)


@pytest.mark.parametrize("hs", (16, 64))
def test_machine_code(hs):
    """Nothing spilled; as many products as the chapter's table has."""
    _, seen = passes(1, 2, 1, hs, races=False)
    check_machine_code(seen)
    found = list(tensor_instructions(seen, "attention_"))
    assert len(found) == 4  # two kernels, two generations
    steps = hs // 16
    assert [x["HMMA"] for x in found] == 2 * [24 * steps] + 2 * [28 * steps]
    assert [x["LDSM"] for x in found] == 2 * [9 * steps] + 2 * [8 + 10 * steps]
    assert all(x["LDGSTS"] >= 4 for x in found)


def test_heads_of_other_widths_are_refused():
    out, lse, inp = half(1, 2, 24), np.zeros((1, 1, 2), np.float32), None
    inp = half(1, 2, 72)
    there = [simulated(x) for x in (out, lse, inp)]
    with pytest.raises(ValueError, match="16, 32, 64 channels, got 24"):
        attention_forward_bf16(*there)
