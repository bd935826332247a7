"""The layers of rows in bfloat16: simulated, and their machine code."""

import numpy as np
import pytest
from gpu import check_half as check
from gpu import check_machine_code, half, single, wide_half

from llmnb import cuda as gpu
from llmnb import reference
from llmnb.gpu.launch import empty, simulated, to_host
from llmnb.gpu.simulator import watch
from llmnb.reference.bfloat16 import to_bfloat16

B, T, C, V, Vp = 1, 3, 72, 61, 64
TARGETS = np.array([[0, V - 1, 5]], np.int32)


def test_encoder():
    arrays = half(B, T, C), TARGETS, single(Vp, C), single(T + 2, C)
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


def padded():
    """Logits; V is odd, so that a pair is half padding, which is NaN here."""
    logits = half(B, T, Vp)
    logits[..., V:] = 0x7FC0
    return logits


def test_classifier():
    # the largest slopes, of the targets, decide over the whole norm's error
    logits, losses, lse = padded(), single(B, T, seed=0), single(B, T)
    arrays = losses, lse, logits, TARGETS, V
    check("crossentropy_softmax_forward", arrays, [0, 1], exact=[0, 1])
    x = wide_half(logits)[..., :V]
    lse = np.log(np.exp(x).sum(-1)).astype(np.float32)
    arrays = half(B, T, Vp), losses, logits, lse, TARGETS, V
    check("crossentropy_softmax_backward", arrays, [0])


def test_fused_classifier():
    """The bits of the two launches, in one, which reads what it overwrites."""
    logits, k, scale = padded(), simulated(TARGETS), simulated(single(B, T))
    two, one = (
        [empty((B, T)), empty((B, T)), simulated(logits)] for _ in range(2)
    )
    back = two[2], scale, two[2], two[1], k, V
    with watch() as seen:
        gpu.crossentropy_softmax_forward_bf16(*two, k, V)
        gpu.crossentropy_softmax_backward_bf16(*back)
        gpu.fused_classifier_bf16(*one, scale, k, V)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(to_host(a), to_host(b))
    assert not wide_half(one[2])[..., V:].any()
    check_machine_code(seen)


def test_rounding_and_widening():
    x, narrow, wide = single(40), empty(40, np.uint16), empty(40)
    with watch() as seen:
        gpu.round_bf16(narrow, simulated(x))
        gpu.widen_bf16(wide, narrow)
    np.testing.assert_array_equal(to_host(narrow), to_bfloat16(x))
    np.testing.assert_array_equal(to_host(wide), wide_half(to_bfloat16(x)))
    check_machine_code(seen)


def test_rows_that_are_no_eights_are_refused():
    arrays = simulated(half(1, 2, 4)), simulated(half(1, 2, 4))
    with pytest.raises(ValueError, match="gelu_forward_bf16.* got 4"):
        gpu.gelu_forward_bf16(*arrays)
