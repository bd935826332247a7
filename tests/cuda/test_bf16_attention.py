"""Attention in bfloat16: simulated, and its machine code."""

import numpy as np
import pytest
from gpu import check_machine_code, error, half, tensor_instructions
from gpu import wide_half as wide

from llmnb.cuda import attention_backward_bf16, attention_forward_bf16
from llmnb.gpu.launch import empty, simulated, to_host
from llmnb.gpu.simulator import watch
from llmnb.reference import attention as reference

MOST = 2e-3  # of any result's norm; rounding the result is 1.7e-3 of it


def passes(B, T, NH, hs, NKV=1, add=False, races=True, seed=0):
    """Both passes, their errors checked; returns what was seen."""
    width = (NH + 2 * NKV) * hs
    inp = half(B, T, width, seed=seed)
    dout = half(B, T, NH * hs, seed=seed + 1)
    want, want_lse = np.empty(dout.shape), np.empty((B, NH, T))
    reference.attention_forward(want, want_lse, wide(inp))
    grads = wide(half(B, T, width, seed=2)) * add
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
    ends = NH * hs, (NH + NKV) * hs  # of queries, and of keys
    pairs = (np.split(x, ends, -1) for x in (wide(dinp), grads))
    assert all(error(*pair) < MOST for pair in zip(*pairs, strict=True))
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
