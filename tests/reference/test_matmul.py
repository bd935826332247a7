"""The linear layer: both backends, gradients, threads, bad input."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Problem, assert_threads_change_no_bit

from llmnb.book.verify import numerical_gradient
from llmnb.cpu import matmul as cpu
from llmnb.cpu.panels import work_shape
from llmnb.reference import matmul as reference

quick = settings(max_examples=25, deadline=None, derandomize=True)
size = st.integers(1, 13) | st.sampled_from([37, 48, 49, 51, 97])


@quick
@given(
    B=st.integers(1, 3),
    T=size,
    C=size,
    OC=size,
    bias=st.booleans(),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_cpu_equals_reference(B, T, C, OC, bias, dtype):
    p = Problem(B, T, C, OC, bias, dtype)
    p.assert_close(p.results(cpu), p.results(reference))


@quick
@given(
    T=size,
    C=size,
    OC=size,
    bias=st.booleans(),
    in_place=st.booleans(),
    add=st.tuples(st.booleans(), st.booleans()),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_options(T, C, OC, bias, in_place, add, dtype):
    """A residual, gradients that overwrite, scratch memory of one's own."""
    p = Problem(2, T, C, OC, bias, dtype)
    residual = p.dout.copy()
    want = [p.forward(reference, residual=residual)]
    flags = dict(zip(("add_dinp", "add_dweight"), add, strict=True))
    want += p.backward(reference, **flags)
    if not add[0]:
        p.dinp[...] = np.nan
    if not add[1]:
        p.dweight[...] = np.nan
    if not add[1] and bias:
        p.dbias[...] = np.nan
    work = np.full(work_shape(), np.nan, dtype)
    if in_place:
        p.out = residual
        got = p.forward_in_place(cpu, work)
    else:
        p.out[...] = np.nan
        got = p.forward(cpu, residual=residual, work=work)
    p.assert_close([got, *p.backward(cpu, work=work, **flags)], want)


@pytest.mark.parametrize("C, OC", [(768, 5), (5, 1537), (1600, 64)])
def test_wide_layers(C, OC):
    """More columns than a panel, more rows than a block."""
    p = Problem(1, 50, C, OC, dtype=np.float64)
    pairs = zip(p.results(cpu), p.results(reference), strict=True)
    for got, want in pairs:
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("backend", [cpu, reference])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 1, 1, 1), (1, 7, 5, 6)])
def test_gradients(backend, bias, shape):
    p = Problem(*shape, bias, np.float64)

    def loss():
        return (p.dout * p.forward(backend)).sum()

    p.dinp[...] = p.dweight[...] = 0
    if bias:
        p.dbias[...] = 0
    inputs = [p.inp, p.weight] + ([p.bias] if bias else [])
    for got, x in zip(p.backward(backend), inputs, strict=True):
        want = numerical_gradient(loss, x)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-8)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 7, 5),
        (1, 300, 40, 41),  # all cut by rows but dweight
        (2, 10, 41, 600),  # by columns, dweight by rows
        (1, 100, 801, 49),  # sums of several blocks
    ],
)
def test_threads_change_no_bit(shape, bf16):
    p = Problem(*shape)
    assert_threads_change_no_bit(lambda: p.results(cpu, bf16=bf16))


def test_bf16_wants_float32():
    p = Problem(2, 3, 4, 5, dtype=np.float64)
    for name, call in (("forward", p.forward), ("backward", p.backward)):
        wanted = f"matmul_{name}: bf16 wants float32 arrays, got float64"
        with pytest.raises(TypeError, match=wanted):
            call(cpu, bf16=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rows, C, OC", [(16, 32, 32), (31, 800, 70)])
def test_a_row_has_its_bits_wherever_it_lies(rows, C, OC, dtype):
    """In a whole tile or in one at the edge, with all that is added."""
    rng = np.random.default_rng(rows)
    drawn = [(1, rows, C), (OC, C), (OC,), (1, rows, OC)]
    x, weight, bias, residual = (
        rng.normal(size=shape).astype(dtype) for shape in drawn
    )
    out = np.empty_like(residual)
    cpu.matmul_forward(out, x, weight, bias, residual)
    for i in range(rows):
        alone = np.empty((1, rows - i, OC), dtype)
        rest = [np.ascontiguousarray(y[:, i:]) for y in (x, residual)]
        cpu.matmul_forward(alone, rest[0], weight, bias, rest[1])
        assert np.array_equal(alone, out[:, i:])
