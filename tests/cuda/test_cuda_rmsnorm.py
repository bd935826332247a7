"""RMSNorm on a GPU: right for any shape, what it moves, its machine code."""

import numpy as np
import pytest
from gpu import PLACES, check_layer, check_machine_code, there
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnb import reference
from llmnb.cuda import rmsnorm
from llmnb.cuda.rmsnorm import (
    rmsnorm_backward,
    rmsnorm_forward,
    rmsnorm_scratch,
)
from llmnb.gpu.launch import simulated, to_host

sizes = st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 140))
drawn = settings(max_examples=12, deadline=None, derandomize=True)


def draw(B, T, C, offset=0.0, add=True):
    """The arguments of both directions, in order, by name."""
    rng = np.random.default_rng(0)

    def some(*shape):
        return rng.normal(size=shape).astype(np.float32)

    inp, weight = some(B, T, C), some(C)
    rstd = 1 / np.sqrt((inp**2).mean(axis=-1) + np.float32(1e-3))
    none = np.full((B, T, C), np.nan, np.float32)
    forward = {"out": none, "rstd": none[..., 0].copy(), "inp": inp}
    forward |= {"weight": weight, "eps": 1e-3, "offset": offset}
    dinp = some(B, T, C) if add else none
    backward = {"dinp": dinp, "dweight": some(C), "dout": some(B, T, C)}
    backward |= {"inp": inp, "weight": weight, "rstd": rstd}
    return forward, backward | {"offset": offset, "add": add}


def check(B, T, C, offset=0.0, add=True):
    """Both directions against the reference; what the simulator saw."""
    forward, backward = draw(B, T, C, offset, add)
    results = ["out", "rstd"], ["dinp", "dweight"]
    return (
        check_layer(
            rmsnorm_forward, reference.rmsnorm_forward, forward, results[0]
        ),
        check_layer(
            rmsnorm_backward,
            reference.rmsnorm_backward,
            backward,
            results[1],
            tol=1e-5,
        ),
    )


def names(seen):
    return [launch[0].__name__ for launch in seen.launches]


@drawn
@given(sizes, st.sampled_from((0.0, 1.0)), st.booleans())
def test_layers_equal_the_reference(shape, offset, add):
    forward, backward = check(*shape, offset, add)
    assert names(forward) == ["_forward"]
    assert names(backward) == ["_backward", "_add_table"]


@pytest.mark.parametrize("C", [255, 256, 257, 1030])
def test_rows_longer_than_a_block(C):
    check(1, 2, C)


def test_the_order_of_blocks_changes_no_bit():
    straight = np.ndindex
    for C in (33, 36):
        for layer, arrays in zip(
            (rmsnorm_forward, rmsnorm_backward), draw(2, 19, C), strict=True
        ):
            found = []
            for backwards in (False, True):
                given = there(arrays)
                with pytest.MonkeyPatch.context() as patch:
                    if backwards:
                        patch.setattr(
                            "llmnb.gpu.simulator.np.ndindex",
                            lambda size: reversed([*straight(size)]),
                        )
                    layer(*given.values())
                found.append([to_host(given[k]) for k in list(arrays)[:2]])
            for got, want in zip(*found, strict=True):
                np.testing.assert_array_equal(got, want)


def test_machine_code():
    for seen in check(1, 1, 33, 1.0):
        check_machine_code(seen)


def test_what_forward_moves():
    """An array of 256 channels is 32 sectors, asked for in 8 requests."""
    rows = 8
    seen, _ = check(1, rows, 256)
    assert seen.sectors == rows * (4 * 32 + 1)
    assert seen.requests == rows * (4 * 8 + 1)
    assert seen.barriers == 0
    assert seen.exchanges == 32 * rows * 5


def test_what_backward_moves():
    rows, parts = 8, 2
    _, seen = check(1, rows, 256)
    # inp, dout and weight in both sweeps; dinp and the block's sums are read
    # and written; each of 8 warps reads rstd
    row = 6 * 32 + 2 * 32 + 2 * 32 + 8
    table = parts * 2 * 32 + 64  # zeros, and the sum; dweight
    assert seen.sectors == rows * row + table
    assert seen.atomics == 0 and len(seen.launches) == 2
    _, over = check(1, rows, 256, add=False)
    assert over.sectors == seen.sectors - rows * 32  # dinp is not read


@pytest.mark.parametrize("rows", [3, 4, 5, 31, 32, 33, 50])
@pytest.mark.parametrize("C", [3, 4])
def test_every_row_is_counted_once(monkeypatch, rows, C):
    """The rows are cut into parts, here up to 8; none is lost."""
    monkeypatch.setattr(rmsnorm, "_parts", lambda n: min(8, -(-n // 4)))
    ones = np.ones((1, rows, C), np.float32)
    dinp, dout, inp = (simulated(ones) for _ in range(3))
    dweight, weight = (simulated(ones[0, 0]) for _ in range(2))
    rstd = simulated(ones[..., 0])
    rmsnorm_backward(dinp, dweight, dout, inp, weight, rstd)
    np.testing.assert_array_equal(to_host(dweight), 1 + rows)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("C", [5, 8])
def test_scratch_of_ones_own(place, C):
    """Exactly as many floats as are asked for do; one less is refused."""
    size, arrays = rmsnorm_scratch(21, C), draw(3, 7, C)[1]
    work, given = place(np.full(size + 1, np.nan, "f4")), there(arrays, place)
    rmsnorm_backward(*given.values(), work=work[:size])
    written = np.isfinite(to_host(work))
    assert written[:size].all() and not written[size]
    with pytest.raises(ValueError, match="backward: work must hold"):
        rmsnorm_backward(*given.values(), work=work[: size - 1])


def test_scratch():
    assert rmsnorm_scratch(1, 5) == 5
    assert rmsnorm_scratch(9, 5) == 3 * 5
    assert rmsnorm_scratch(1 << 20, 768) == 512 * 768
