"""The layers of rows in bfloat16: simulated, and their machine code."""

import numpy as np
import pytest
from gpu import check_half, check_machine_code, half, single, wide_half
from layers import NAMED, problem

from llmnb import cuda as gpu
from llmnb.cuda.bf16_modern import rotary_forward_bf16
from llmnb.gpu.launch import empty, simulated, to_host
from llmnb.gpu.simulator import watch
from llmnb.reference.bfloat16 import to_bfloat16

B, T, V, Vp = 1, 3, 61, 64
TARGETS = np.array([[0, V - 1, 5]], np.int32)
# rows of tests/layers.py: sizes that vectors of eight fit, and options
ROWS = [
    ("encoder", (1, 3, 72, 64), {}),
    ("embedding", (2, 3, 72, 9), {"scale": 3.0}),
    ("layernorm", (1, 3, 72), {}),
    ("rmsnorm", (2, 3, 72), {"offset": 0.0, "add": True}),
    ("rmsnorm", (2, 3, 72), {"offset": 0.0, "add": False}),
    ("rmsnorm", (2, 3, 72), {"offset": 1.0, "add": True}),
    ("rmsnorm", (2, 3, 72), {"offset": 1.0, "add": False}),
    ("rotary", (2, 3, 8, 3, 2, 2), {}),
    ("gelu", (1, 3, 72), {"add": True}),
    ("gelu", (1, 3, 72), {"add": False}),
    ("swiglu", (2, 3, 40), {}),
    ("geglu", (2, 3, 40), {}),
    ("crossentropy_softmax", (B, T, V, Vp - V), {}),
]


@pytest.mark.parametrize(("name", "sizes", "options"), ROWS)
def test_layers_are_the_references_but_for_rounding(name, sizes, options):
    layer = NAMED[name]
    check_half(
        layer, problem(layer, np.float32, layer.sized(*sizes), **options)
    )


def padded():
    """Logits; V is odd, so that a pair is half padding, which is NaN here."""
    logits = half(B, T, Vp)
    logits[..., V:] = 0x7FC0
    return logits


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
    few, x = simulated(half(1, 2, 4)), simulated(half(1, 2, 24))
    with pytest.raises(ValueError, match="gelu_forward_bf16.* got 4"):
        gpu.gelu_forward_bf16(few, few)
    with pytest.raises(ValueError, match="rotary_forward_bf16.* got 12"):
        rotary_forward_bf16(x, simulated(single(2, 12)), 1)
