"""The linear layer: both backends, gradients, threads, bad input."""

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnb.book.verify import numerical_gradient
from llmnb.cpu import matmul as cpu
from llmnb.cpu.panels import work_shape
from llmnb.reference import matmul as reference

quick = settings(max_examples=25, deadline=None, derandomize=True)
size = st.integers(1, 13) | st.sampled_from([37, 48, 49, 51, 97])
TOLERANCE = {np.float32: 2e-6, np.float64: 1e-13}


class Problem:
    """Random arrays of the layer; outputs begin at drawn values."""

    def __init__(self, B, T, C, OC, bias=True, dtype=np.float32, seed=0):
        rng = np.random.default_rng(seed)

        def draw(*shape):
            return rng.normal(size=shape).astype(dtype)

        self.inp, self.weight = draw(B, T, C), draw(OC, C)
        self.bias = draw(OC) if bias else None
        self.out, self.dout = draw(B, T, OC), draw(B, T, OC)
        self.dinp, self.dweight = draw(B, T, C), draw(OC, C)
        self.dbias = draw(OC) if bias else None

    def forward(self, backend, **how):
        out = self.out.copy()
        arrays = out, self.inp, self.weight, self.bias
        backend.matmul_forward(*arrays, **how)
        return out

    def forward_in_place(self, backend, work):
        """The output written over the residual."""
        out = self.out.copy()
        arrays = out, self.inp, self.weight, self.bias
        backend.matmul_forward(*arrays, residual=out, work=work)
        return out

    def backward(self, backend, **how):
        grads = [self.dinp.copy(), self.dweight.copy()]
        grads.append(None if self.dbias is None else self.dbias.copy())
        arrays = *grads, self.dout, self.inp, self.weight
        backend.matmul_backward(*arrays, **how)
        return [grad for grad in grads if grad is not None]

    def results(self, backend, **how):
        return [self.forward(backend, **how), *self.backward(backend, **how)]

    def assert_close(self, got, want):
        """Equal but for the rounding of sums as long as the layer's."""
        dtype = self.inp.dtype
        tokens = self.inp.size // self.inp.shape[-1]
        longest = max(*self.weight.shape, tokens)
        for x, y in zip(got, want, strict=True):
            assert x.dtype == dtype
            scale = np.sqrt(longest) * max(1, np.abs(y).max())
            assert np.abs(x - y).max() < TOLERANCE[dtype.type] * scale


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


@pytest.mark.parametrize("backend", [cpu, reference])
def test_backward_adds(backend):
    p = Problem(2, 3, 4, 5, dtype=np.float64)
    before = [p.dinp.copy(), p.dweight.copy(), p.dbias.copy()]
    once = p.backward(backend)
    p.dinp, p.dweight, p.dbias = (grad.copy() for grad in once)
    twice = p.backward(backend)
    for zero, one, two in zip(before, once, twice, strict=True):
        np.testing.assert_allclose(two - one, one - zero, atol=1e-12)
        assert np.abs(one - zero).max() > 0.1


@pytest.mark.skipif(
    numba.config.NUMBA_NUM_THREADS < 2, reason="needs two threads"
)
@pytest.mark.parametrize(
    "shape", [(1, 1, 7, 5), (2, 37, 51, 331), (1, 100, 800, 49)]
)
def test_threads_change_no_bit(shape):
    p = Problem(*shape)
    before = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        alone = p.results(cpu)
        numba.set_num_threads(2)
        together = p.results(cpu)
    finally:
        numba.set_num_threads(before)
    for one, two in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, two)


def test_inputs_are_not_written():
    p = Problem(2, 5, 6, 7)
    before = [a.copy() for a in (p.inp, p.weight, p.bias, p.dout)]
    p.results(cpu)
    after = p.inp, p.weight, p.bias, p.dout
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)


FORWARD = {
    "out": (lambda a: a[:, :2], ValueError, r"shape \(2, 3, 5\), got"),
    "inp": (lambda a: a[0], ValueError, r"shape \(B, T, C\), got \(3, 4\)"),
    "weight": (lambda a: a[:, 1:], ValueError, r"shape \(5, 4\), got \(5, 3"),
    "bias": (lambda a: a[:4], ValueError, r"shape \(5,\), got \(4,\)"),
}
WRONG_TYPE = {
    "out": (lambda a: a.astype(np.float64), TypeError, "must be float32"),
    "inp": (lambda a: a.astype(int), TypeError, "float32 or float64"),
    "weight": (lambda a: a.astype(np.float64), TypeError, "must be float32"),
    "bias": (lambda a: a.tolist(), TypeError, "must be a NumPy array"),
}


@pytest.mark.parametrize("cases", [FORWARD, WRONG_TYPE])
@pytest.mark.parametrize("name", FORWARD)
def test_forward_refuses(cases, name):
    spoil, error, message = cases[name]
    p = Problem(2, 3, 4, 5)
    setattr(p, name, spoil(getattr(p, name)))
    args = p.out, p.inp, p.weight, p.bias
    with pytest.raises(error, match=f"matmul_forward: {name} .*{message}"):
        cpu.matmul_forward(*args)


@pytest.mark.parametrize("name", ["dinp", "dweight", "dbias", "dout"])
def test_backward_refuses(name):
    p = Problem(2, 3, 4, 5)
    good = getattr(p, name)
    before = p.dinp.copy(), p.dweight.copy()

    def call():
        args = p.dinp, p.dweight, p.dbias, p.dout, p.inp, p.weight
        cpu.matmul_backward(*args)

    spoilt = [
        (good[..., :-1], ValueError, "must have shape"),
        (np.repeat(good, 2, -1)[..., ::2], ValueError, "must be C-contig"),
        (good.astype(np.float64), TypeError, "must be float32"),
    ]
    for bad, error, message in spoilt:
        setattr(p, name, bad)
        with pytest.raises(error, match=f"matmul_backward: {name} {message}"):
            call()
    for old, label in zip(before, ("dinp", "dweight"), strict=True):
        if label != name:
            np.testing.assert_array_equal(getattr(p, label), old)


def test_a_weight_with_three_axes_is_refused():
    p = Problem(2, 3, 4, 5)
    with pytest.raises(ValueError, match=r"weight must have shape \(OC, C\)"):
        cpu.matmul_forward(p.out, p.inp, p.weight[None], p.bias)


@pytest.mark.parametrize(
    ("work", "error", "message"),
    [
        (np.empty((1, 3), np.float32), ValueError, "must have shape"),
        (np.empty(work_shape(), np.float64), TypeError, "must be float32"),
    ],
)
def test_wrong_scratch_memory_is_refused(work, error, message):
    p = Problem(2, 3, 4, 5)
    for name, call in (("forward", p.forward), ("backward", p.backward)):
        with pytest.raises(error, match=f"matmul_{name}: work {message}"):
            call(cpu, work=work)


def test_a_residual_of_another_shape_is_refused():
    p = Problem(2, 3, 4, 5)
    with pytest.raises(ValueError, match="residual must have shape"):
        p.forward(cpu, residual=p.out[:1])


def test_bf16_wants_float32():
    p = Problem(2, 3, 4, 5, dtype=np.float64)
    for name, call in (("forward", p.forward), ("backward", p.backward)):
        wanted = f"matmul_{name}: bf16 wants float32 arrays, got float64"
        with pytest.raises(TypeError, match=wanted):
            call(cpu, bf16=True)
