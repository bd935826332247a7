"""A weight that learns with its gradient: as product and update do."""

import numpy as np
import pytest
from problems import assert_threads_change_no_bit

from llmnb import cpu, reference
from llmnb.reference.adamw import AdamW

RULE = AdamW(learning_rate=1e-2, weight_decay=0.1, step=2)
# rows, columns and tokens: inside a tile, beyond a block, and in between
SIZES = [
    (1, 1, 1), (5, 7, 3), (48, 48, 48), (300, 100, 40), (530, 800, 17),
    (70, 90, 769), (2300, 30, 1600),
]  # fmt: skip
KINDS = {
    "numpy-float32": (reference, np.float32, {}),
    "numpy-float64": (reference, np.float64, {}),
    "cpu-float32": (cpu, np.float32, {}),
    "cpu-float64": (cpu, np.float64, {}),
    "cpu-bf16": (cpu, np.float32, {"bf16": True}),
}


def problem(OC, C, N, dtype=np.float32):
    """weight, m, v, dout and inp."""
    rng = np.random.default_rng(OC + C + N)
    shapes = (OC, C), (OC, C), (OC, C), (1, N, OC), (1, N, C)
    drawn = [rng.normal(size=shape).astype(dtype) for shape in shapes]
    np.square(drawn[2], out=drawn[2])
    return drawn


def in_two_steps(backend, weight, m, v, dout, inp, **how):
    """The gradient; weight, m and v learn."""
    grads, dinp = np.zeros_like(weight), np.zeros_like(inp)
    arrays = dinp, grads, None, dout, inp, weight
    backend.matmul_backward(*arrays, **how)
    flat = [x.reshape(-1) for x in (weight, grads, m, v)]
    backend.adamw_update(*flat, RULE)
    return grads


def in_one(backend, weight, m, v, dout, inp, aside=None, **how):
    """The sums of squares, and what was set aside; the others learn."""
    OC, C = weight.shape
    few = np.full((3, C), np.nan, weight.dtype)
    squares = np.full(OC, np.nan, weight.dtype)
    factors = np.array(RULE.factors("test"), weight.dtype)
    arrays = weight, m, v, squares, dout, inp, factors
    backend.matmul_learn(*arrays, aside, few, **how)
    return squares, few


@pytest.mark.parametrize("OC, C, N", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_a_product_and_an_update(kind, OC, C, N):
    backend, dtype, how = KINDS[kind]
    if how and not cpu.has_bf16():
        pytest.skip("this processor has no products of bfloat16")
    ours, plain = problem(OC, C, N, dtype), problem(OC, C, N, dtype)
    squares, _ = in_one(backend, *ours, **how)
    grads = in_two_steps(backend, *plain, **how)
    for x, want in zip(ours, plain, strict=True):
        assert np.array_equal(x, want)
    want = np.square(grads, dtype=np.float64).sum(axis=1)
    np.testing.assert_allclose(squares, want, rtol=1e-5)


@pytest.mark.parametrize("backend", [reference, cpu])
def test_rows_that_are_set_aside(backend):
    ours, plain = problem(300, 850, 9), problem(300, 850, 9)
    before = [x.copy() for x in ours[:3]]
    aside = np.full(300, -1, np.int32)
    aside[[0, 170, 299]] = 2, 0, 1
    squares, few = in_one(backend, *ours, aside)
    grads = in_two_steps(backend, *plain)
    for x, old, new in zip(ours, before, plain, strict=False):
        want = np.where((aside < 0)[:, None], new, old)
        assert np.array_equal(x, want)
    assert np.array_equal(few, grads[[170, 299, 0]])
    assert not squares[aside >= 0].any() and squares[aside < 0].all()


@pytest.mark.parametrize("OC, C, N", SIZES[2:])
def test_threads_change_no_bit(OC, C, N):
    def work():
        given = problem(OC, C, N)
        return in_one(cpu, *given)[0], *given

    assert_threads_change_no_bit(work)


@pytest.mark.parametrize("backend", [reference, cpu])
def test_what_does_not_fit_is_refused(backend):
    weight, m, v, dout, inp = problem(6, 4, 5)
    for wrong, message in (
        ((weight, m[:, :3], v, dout, inp), r"matmul_learn: m must have shape"),
        ((weight, m, v, dout[..., :5], inp), r"dout must .*\(1, 5, 6\)"),
        ((weight, weight, v, dout, inp), "weight and m must not share"),
    ):
        before = weight.copy()
        with pytest.raises(ValueError, match=message):
            in_one(backend, *wrong)
        assert np.array_equal(weight, before)


@pytest.mark.parametrize("backend", [reference, cpu])
@pytest.mark.parametrize(
    "aside, error, message",
    [
        ([0, 1, 2, 3, -1, -1], ValueError, r"in \[-1, 3\), .*, got -1 to 3"),
        ([-2, 0, 0, 0, 0, 0], ValueError, r"in \[-1, 3\), .*, got -2 to 0"),
        ([0, 0], ValueError, r"aside must have shape \(6,\)"),
        ([0.0] * 6, TypeError, "aside must be int32"),
    ],
)
def test_rows_that_cannot_be_set_aside(backend, aside, error, message):
    weight, *others = problem(6, 4, 5)
    before = weight.copy()
    aside = np.array(aside, np.int32 if isinstance(aside[0], int) else None)
    with pytest.raises(error, match=message):
        in_one(backend, weight, *others, aside)
    assert np.array_equal(weight, before)
