"""Softmax and cross-entropy: kernels, gradients, threads, bad input."""

import math
from types import SimpleNamespace

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnb.book.verify import numerical_gradient
from llmnb.cpu import crossentropy as cpu
from llmnb.reference import crossentropy as reference

DTYPES = {np.float32: 1e-5, np.float64: 1e-12}
BACKENDS = pytest.mark.parametrize("layer", [reference, cpu])

drawn = settings(max_examples=25, deadline=None, derandomize=True)
shapes = given(
    B=st.integers(1, 3),
    T=st.integers(1, 9),
    V=st.sampled_from([1, 2, 3, 7, 31, 257, 331]),
    padding=st.sampled_from([0, 1, 53]),
    dtype=st.sampled_from(list(DTYPES)),
    seed=st.integers(0, 99),
)


def problem(B, T, V, Vp, dtype, seed=0):
    rng = np.random.default_rng(seed)
    p = SimpleNamespace(V=V, shape=(B, T, Vp), dtype=dtype)
    p.logits = (4 * rng.normal(size=p.shape) + 20).astype(dtype)
    p.logits[..., V:] = 1e30  # must never be read
    p.targets = rng.integers(0, V, (B, T)).astype(np.int32)
    p.dlosses = rng.normal(size=(B, T)).astype(dtype)
    p.g = rng.normal(size=p.shape).astype(dtype)
    return p


def run(layer, p):
    """Every output of a backend; what is added to starts at 2 or 3."""
    o = SimpleNamespace()
    o.losses, o.lse, o.surprise = np.zeros((3, *p.targets.shape), p.dtype)
    o.probs, o.fused = np.zeros((2, *p.shape), p.dtype)
    o.dprobs = np.full(p.shape, 2, p.dtype)
    o.dlogits = np.full(p.shape, 3, p.dtype)
    layer.softmax_forward(o.probs, p.logits, p.V)
    layer.crossentropy_forward(o.surprise, o.probs, p.targets)
    # well inside (0, 1), so that 1/p stays comparable in float32
    mild = np.ascontiguousarray((o.probs + 0.5) / 2)
    layer.crossentropy_backward(o.dprobs, p.dlosses, mild, p.targets)
    layer.softmax_backward(o.dlogits, p.g, o.probs)
    layer.crossentropy_softmax_forward(
        o.losses, o.lse, p.logits, p.targets, p.V
    )
    layer.crossentropy_softmax_backward(
        o.fused, p.dlosses, p.logits, o.lse, p.targets, p.V
    )
    return vars(o)


@drawn
@shapes
def test_kernels_equal_reference(B, T, V, padding, dtype, seed):
    p = problem(B, T, V, V + padding, dtype, seed)
    got, want = run(cpu, p), run(reference, p)
    for name in want:
        scale = max(1, abs(want[name]).max())
        error = abs(got[name] - want[name]).max() / scale
        assert error < DTYPES[dtype], name
        assert got[name].dtype == dtype


@drawn
@shapes
def test_properties(B, T, V, padding, dtype, seed):
    p = problem(B, T, V, V + padding, dtype, seed)
    o = run(cpu, p)
    assert not o["probs"][..., V:].any()
    assert not o["fused"][..., V:].any()
    assert np.all(o["dlogits"][..., V:] == 3), "padding hears nothing"
    np.testing.assert_allclose(o["probs"].sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(o["fused"].sum(-1), np.zeros((B, T)), atol=1e-4)
    others = np.ones(p.shape, bool)
    np.put_along_axis(others, p.targets[..., None], False, -1)
    assert np.all(o["dprobs"][others] == 2), "only the target's column"


@BACKENDS
def test_gradients(layer):
    p = problem(2, 3, 5, 8, np.float64)
    p.logits[...] -= 20
    p.logits[..., 5:] = 0
    rng = np.random.default_rng(1)
    probs, dlogits, dprobs = np.zeros((3, *p.shape))
    losses, lse = np.zeros((2, 2, 3))

    def softmax_loss():
        layer.softmax_forward(probs, p.logits, p.V)
        return (p.g * probs).sum()

    want = numerical_gradient(softmax_loss, p.logits)
    softmax_loss()
    layer.softmax_backward(dlogits, p.g, probs)
    np.testing.assert_allclose(dlogits, want, atol=1e-8)

    mild = rng.uniform(0.5, 1, p.shape)

    def crossentropy_loss():
        layer.crossentropy_forward(losses, mild, p.targets)
        return (p.dlosses * losses).sum()

    want = numerical_gradient(crossentropy_loss, mild)
    layer.crossentropy_backward(dprobs, p.dlosses, mild, p.targets)
    np.testing.assert_allclose(dprobs, want, atol=1e-8)

    def fused_loss():
        layer.crossentropy_softmax_forward(
            losses, lse, p.logits, p.targets, p.V
        )
        return (p.dlosses * losses).sum()

    want = numerical_gradient(fused_loss, p.logits)
    fused_loss()
    layer.crossentropy_softmax_backward(
        dlogits, p.dlosses, p.logits, lse, p.targets, p.V
    )
    np.testing.assert_allclose(dlogits, want, atol=1e-8)


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place(layer, dtype):
    p = problem(2, 5, 331, 384, dtype)
    o = run(layer, p)
    logits = p.logits.copy()
    layer.softmax_forward(logits, logits, p.V)
    assert np.array_equal(logits, o["probs"])
    logits = p.logits.copy()
    layer.crossentropy_softmax_backward(
        logits, p.dlosses, logits, o["lse"], p.targets, p.V
    )
    assert np.array_equal(logits, o["fused"])
    # another view of the same memory
    logits = p.logits.copy()
    layer.crossentropy_softmax_backward(
        logits[:], p.dlosses, logits, o["lse"], p.targets, p.V
    )
    assert np.array_equal(logits, o["fused"])


@BACKENDS
def test_uniform_guess(layer):
    losses, lse = np.empty((1, 2), np.float32), np.empty((1, 2), np.float32)
    logits = np.full((1, 2, 50304), -3, np.float32)
    targets = np.array([[0, 50256]], np.int32)
    layer.crossentropy_softmax_forward(losses, lse, logits, targets, 50257)
    np.testing.assert_allclose(losses, math.log(50257), rtol=1e-5)


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_logits(layer, dtype, sign):
    """One logit of 1e4 (or all others of -1e4): exact, finite, no warning."""
    logits = np.zeros((1, 2, 6), dtype)
    logits[0, :, 1] = 1e4
    if sign < 0:
        logits -= dtype(1e4)
    targets = np.array([[1, 2]], np.int32)
    ones = np.ones((1, 2), dtype)
    losses, lse, surprise = np.empty((3, 1, 2), dtype)
    dlogits, probs = np.empty((2, 1, 2, 6), dtype)
    dprobs, separate = np.zeros((2, 1, 2, 6), dtype)
    layer.crossentropy_softmax_forward(losses, lse, logits, targets, 5)
    layer.crossentropy_softmax_backward(dlogits, ones, logits, lse, targets, 5)
    assert losses.tolist() == [[0, 1e4]]
    assert dlogits.tolist() == [[[0] * 6, [0, 1, -1, 0, 0, 0]]]
    layer.softmax_forward(probs, logits, 5)
    assert probs.tolist() == [[[0, 1, 0, 0, 0, 0]] * 2]
    layer.crossentropy_forward(surprise, probs, targets)
    floor = -math.log(np.finfo(dtype).tiny)
    np.testing.assert_allclose(surprise, [[0, floor]], rtol=1e-6)
    layer.crossentropy_backward(dprobs, ones, probs, targets)
    layer.softmax_backward(separate, dprobs, probs)
    assert np.isfinite(dprobs).all()
    assert np.isfinite(separate).all()


@pytest.mark.skipif(
    numba.config.NUMBA_NUM_THREADS < 2, reason="needs two threads"
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_matter(dtype):
    p = problem(3, 37, 331, 384, dtype)
    before = numba.get_num_threads()
    outputs = []
    try:
        for threads in (1, 2):
            numba.set_num_threads(threads)
            outputs.append(run(cpu, p))
    finally:
        numba.set_num_threads(before)
    for name in outputs[0]:
        assert np.array_equal(outputs[0][name], outputs[1][name]), name


def fused_forward(**changes):
    p = problem(2, 3, 5, 8, np.float32)
    a = {
        "losses": np.zeros((2, 3), np.float32),
        "lse": np.zeros((2, 3), np.float32),
        "logits": p.logits,
        "targets": p.targets,
        "V": 5,
    }
    cpu.crossentropy_softmax_forward(**(a | changes))


def bad_targets(value):
    targets = np.zeros((2, 3), np.int32)
    targets[1, 2] = value
    return targets


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"losses": np.zeros((2, 4), np.float32)}, ValueError,
         r"losses must have shape \(2, 3\), got \(2, 4\)"),
        ({"lse": np.zeros((2, 3))}, TypeError,
         "lse must be float32, got float64"),
        ({"logits": np.zeros((2, 3, 8), np.int64)}, TypeError,
         "logits must be float32 or float64, got int64"),
        ({"logits": np.zeros((3, 8), np.float32)}, ValueError,
         r"logits must have shape \(B, T, Vp\), got \(3, 8\)"),
        ({"logits": np.zeros((2, 3, 16), np.float32)[..., ::2]}, ValueError,
         "logits must be C-contiguous"),
        ({"logits": [[[1.0]]]}, TypeError, "logits must be"),
        ({"targets": np.zeros((2, 3), np.int64)}, TypeError,
         "targets must be int32, got int64"),
        ({"targets": bad_targets(5)}, ValueError,
         r"targets must lie in \[0, 5\), got 5 at \(1, 2\)"),
        ({"targets": bad_targets(-1)}, ValueError,
         r"targets must lie in \[0, 5\), got -1 at \(1, 2\)"),
        ({"V": 9}, ValueError, r"V must lie in \[1, 8\], got 9"),
        ({"V": 0}, ValueError, r"V must lie in \[1, 8\], got 0"),
    ],
)  # fmt: skip
def test_bad_input(changes, error, message):
    fused_forward()
    prefix = "crossentropy_softmax_forward: "
    with pytest.raises(error, match=prefix + message):
        fused_forward(**changes)


def test_bad_input_of_the_others():
    wide, small = np.zeros((2, 3, 8), np.float32), np.zeros((2, 3, 7))
    narrow = np.zeros((2, 3), np.float32)
    k = np.zeros((2, 3), np.int32)
    small = small.astype(np.float32)
    with pytest.raises(ValueError, match="softmax_forward: probs must"):
        cpu.softmax_forward(small, wide, 5)
    with pytest.raises(ValueError, match="softmax_forward: V must"):
        cpu.softmax_forward(wide, wide, 9)
    with pytest.raises(ValueError, match="softmax_backward: dprobs must"):
        cpu.softmax_backward(wide, small, wide)
    with pytest.raises(ValueError, match="forward: targets must lie"):
        cpu.crossentropy_forward(narrow, wide, k + np.int32(8))
    with pytest.raises(ValueError, match="backward: dprobs must"):
        cpu.crossentropy_backward(small, narrow, wide, k)
    with pytest.raises(ValueError, match="softmax_backward: dlogits must"):
        cpu.crossentropy_softmax_backward(small, narrow, wide, narrow, k, 5)
