"""The layers of rows in bfloat16: simulated, and their machine code."""

import numpy as np
import pytest
from gpu import check_half as check
from gpu import check_machine_code, wide_half

from llmnb import cuda as gpu
from llmnb import reference
from llmnb.gpu.launch import empty, simulated, to_host
from llmnb.gpu.simulator import watch
from llmnb.reference.bfloat16 import from_bfloat16, to_bfloat16

B, T, C, V, Vp = 1, 3, 72, 61, 64
rng = np.random.default_rng(0)


def half(*shape):
    return to_bfloat16(rng.normal(size=shape).astype(np.float32))


def single(*shape):
    return rng.normal(size=shape).astype(np.float32)


def test_encoder():
    tokens = rng.integers(0, V, (B, T)).astype(np.int32)
    arrays = half(B, T, C), tokens, single(Vp, C), single(T + 2, C)
    check("encoder_forward", arrays, [0])


def layernorm():
    inp, weight = half(B, T, C), single(C)
    stats = [np.zeros((B, T)) for _ in range(2)]
    arrays = wide_half(inp), wide_half(weight), np.zeros(C)
    reference.layernorm_forward(np.zeros((B, T, C)), *stats, *arrays)
    return inp, weight, *(x.astype(np.float32) for x in stats)


def test_layernorm_forward():
    inp, weight, mean, rstd = layernorm()
    arrays = half(B, T, C), mean * 0, rstd * 0, inp, weight, single(C)
    check("layernorm_forward", arrays, [0, 1, 2], exact=[1, 2])


def test_layernorm_backward():
    inp, weight, mean, rstd = layernorm()
    sums = single(C), single(C)
    arrays = half(B, T, C), *sums, half(B, T, C), inp, weight, mean, rstd
    check("layernorm_backward", arrays, [0, 1, 2], exact=[1, 2])


def test_gelu():
    check("gelu_forward", (half(T, C), half(T, C)), [0])
    arrays = half(T, C), half(T, C), half(T, C)
    check("gelu_backward", arrays, [0])
    check("gelu_backward", arrays, [0], add=False)


def test_classifier():
    """V is odd, so that a pair is half padding, which is NaN here."""
    logits = half(B, T, Vp)
    logits[..., V:] = 0x7FC0
    targets = np.array([[0, V - 1, 5]], np.int32)
    losses, lse = single(B, T), single(B, T)
    arrays = losses, lse, logits, targets, V
    check("crossentropy_softmax_forward", arrays, [0, 1], exact=[0, 1])
    clean = np.where(np.isnan(wide_half(logits)), 0, wide_half(logits))
    reference.crossentropy_softmax_forward(
        np.zeros((B, T)), sums := np.zeros((B, T)), clean, targets, V
    )
    arrays = half(B, T, Vp), losses, logits, sums.astype(np.float32)
    check("crossentropy_softmax_backward", (*arrays, targets, V), [0])


def test_fused_classifier():
    """The bits of the two launches, in one, which reads what it overwrites."""
    logits, targets = half(B, T, Vp), np.array([[0, V - 1, 5]], np.int32)
    logits[..., V:] = 0x7FC0
    k, scale = simulated(targets), simulated(single(B, T))
    two, one = (
        [empty((B, T)), empty((B, T)), simulated(logits)] for _ in range(2)
    )
    with watch() as seen:
        gpu.crossentropy_softmax_forward_bf16(*two, k, V)
        gpu.crossentropy_softmax_backward_bf16(
            two[2], scale, two[2], two[1], k, V
        )
        gpu.fused_classifier_bf16(*one, scale, k, V)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(to_host(a), to_host(b))
    assert not wide_half(one[2])[..., V:].any()
    check_machine_code(seen)


def test_rounding_and_widening():
    x = single(40)
    half, wide = empty(40, np.uint16), empty(40)
    with watch() as seen:
        gpu.round_bf16(half, simulated(x))
        gpu.widen_bf16(wide, half)
    np.testing.assert_array_equal(to_host(half), to_bfloat16(x))
    want = from_bfloat16(to_bfloat16(x))
    np.testing.assert_array_equal(to_host(wide), want)
    check_machine_code(seen)


def test_rows_that_are_no_eights_are_refused():
    arrays = simulated(half(1, 2, 4)), simulated(half(1, 2, 4))
    with pytest.raises(ValueError, match="gelu_forward_bf16.* got 4"):
        gpu.gelu_forward_bf16(*arrays)
