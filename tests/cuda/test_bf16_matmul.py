"""The linear layer in bfloat16: simulated, and its machine code."""

import numpy as np
import pytest
from gpu import check_machine_code, error, half, single, tensor_instructions
from gpu import wide_half as wide

from llmnb.cuda import bf16_matmul, matmul_backward_bf16, matmul_forward_bf16
from llmnb.cuda.matmul import Product
from llmnb.gpu.launch import empty, simulated
from llmnb.gpu.simulator import watch

LAYOUTS = (True, True), (True, False), (False, False)


def layer(B, T, C, OC, add=False, residual=False, most=2e-3):
    """All of the layer, watched; its errors against float64."""
    x, dy = half(B, T, C, seed=0), half(B, T, OC, seed=2)
    w = half(OC, C, seed=1)
    bias = np.linspace(-1, 1, OC, dtype=np.float32)
    start = half(B, T, OC, seed=3)
    there = [simulated(z) for z in (x, w, bias, dy, start)]
    out, dx = empty((B, T, OC), np.uint16), simulated(half(B, T, C, seed=4))
    dw, db = simulated(np.ones((OC, C), np.float32)), simulated(bias)
    dx0 = wide(dx) * add
    with watch() as seen:
        matmul_forward_bf16(out, *there[:3], there[4] if residual else None)
        matmul_backward_bf16(dx, dw, db, there[3], *there[:2], add, add)
    x, w, dy = wide(x), wide(w), wide(dy)
    rows = dy.reshape(-1, OC)
    y = x @ w.T + bias + (wide(start) if residual else 0)
    assert error(out, y) < most
    assert error(dx, dy @ w + dx0) < most
    assert error(dw, rows.T @ x.reshape(-1, C) + add) < 1e-6
    assert error(db, rows.sum(axis=0) + bias * add) < 1e-6
    return seen


def test_sizes_that_divide_nothing_and_small_ones():
    """Of a few numbers, any may be off by the most: half of 2**-7."""
    layer(1, 67, 40, 72, add=True, residual=True)
    layer(2, 1, 8, 8, most=2**-8)


@pytest.mark.parametrize("along", LAYOUTS)
def test_the_large_tile(along):
    a, b = half(136, 40, seed=0), half(152, 40, seed=1)
    out = empty((136, 152), np.uint16)
    there = [
        simulated(x if way else x.T)
        for x, way in zip((a, b), along, strict=True)
    ]
    bf16_matmul.tensor_product(Product(out, *there, *along), 128)
    assert error(out, wide(a) @ wide(b).T) < 2e-3


def launches():
    """Every kernel of the layer, with both tiles."""
    seen = layer(1, 3, 8, 16, add=True, residual=True, most=2**-8)
    more = layer(1, 3, 8, 16, most=2**-8)
    with watch() as large:
        for along in LAYOUTS:
            for kind in (np.uint16, np.float32):
                out, a = empty((8, 8), kind), simulated(half(8, 8))
                product = Product(out, a, a, *along)
                bf16_matmul.tensor_product(product, 128)
    seen.launches += more.launches + large.launches
    return seen


def test_machine_code():
    """Compiled: nothing spilled, tensor cores, two blocks of 256 threads."""
    seen = launches()
    for name, made in check_machine_code(seen).items():
        if name.startswith("matmul_bf16"):
            assert made.registers <= 128
    for found in tensor_instructions(seen, "matmul_bf16"):
        assert min(found["HMMA"], found["LDSM"], found["LDGSTS"]) >= 8


def test_what_is_refused():
    """Rows that are no eights, and arrays of another type."""
    x, few = simulated(half(1, 2, 8)), simulated(half(1, 2, 4))
    w, wide_w = simulated(half(8, 8)), simulated(single(8, 8))
    for kind, says, given in (
        (ValueError, "8 numbers, got 4", (x, few, simulated(half(8, 4)))),
        (ValueError, "8 numbers, got 4", (few, x, simulated(half(4, 8)))),
        (TypeError, "weight must be uint16, got float32", (x, x, wide_w)),
        (TypeError, "bias must be float32", (x, x, w, x)),
    ):
        with pytest.raises(kind, match=says):
            matmul_forward_bf16(*given, *[None] * (4 - len(given)))
