"""Attention with a window and a soft cap, norms of heads: all backends."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import TOLERANCE, assert_threads_change_no_bit

from llmnb import cpu, reference
from llmnb.book.verify import numerical_gradient
from llmnb.cpu.panels import work_shape

drawn = settings(max_examples=40, deadline=None, derandomize=True)
BOTH = pytest.mark.parametrize("layer", (reference, cpu))
FLOATS = st.sampled_from((np.float32, np.float64))


def problem(B, T, heads, dtype=np.float64, large=1.0):
    """inp and dout of (NH, NKV, hs) heads."""
    NH, NKV, hs = heads
    rng = np.random.default_rng(1)
    inp = rng.normal(size=(B, T, (NH + 2 * NKV) * hs)) * large
    dout = rng.normal(size=(B, T, NH * hs))
    return inp.astype(dtype), dout.astype(dtype)


def run(layer, inp, dout, NH, rule, **how):
    """out, lse and dinp; dinp starts at 1 to show that backward adds."""
    B, T, _ = inp.shape
    out, lse = np.full_like(dout, 7), np.full((B, NH, T), 7, inp.dtype)
    dinp = np.ones_like(inp)
    layer.local_attention_forward(out, lse, inp, **rule, **how)
    arrays = dinp, dout, inp, out, lse
    layer.local_attention_backward(*arrays, **rule, **how)
    return out, lse, dinp


def assert_close(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        scale = max(1, np.abs(b).max(initial=0))
        assert np.abs(a - b).max(initial=0) / scale < tolerance


def by_definition(inp, heads, window=None, scale=None, softcap=None):
    """Output and log-sum-exp by plain loops over positions."""
    (B, T, _), (NH, NKV, hs) = inp.shape, heads
    x = inp.reshape(B, T, NH + 2 * NKV, hs)
    out, lse = np.zeros((B, T, NH, hs)), np.zeros((B, NH, T))
    for b, h, t in np.ndindex(B, NH, T):
        k = NH + h // (NH // NKV)
        past = x[b, max(0, t + 1 - (window or T)) : t + 1]
        scores = past[:, k] @ x[b, t, h] * (scale or hs**-0.5)
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        e = np.exp(scores)
        lse[b, h, t] = np.log(sum(e))
        out[b, t, h] = e / sum(e) @ past[:, k + NKV]
    return out.reshape(B, T, NH * hs), lse


HEADS = st.sampled_from(((1, 1), (2, 2), (4, 2), (3, 1)))


@st.composite
def rules(draw):
    """Windows of one key, about a block's size, and wider than the text."""
    near = st.integers(1, 9) | st.sampled_from([95, 96, 97, 130, 192, 1000])
    found = {
        "window": draw(near | st.none()),
        "scale": draw(st.sampled_from((None, 0.1))),
        "softcap": draw(st.sampled_from((None, 2.0, 50.0))),
    }
    return {k: v for k, v in found.items() if v is not None}


@drawn
@given(HEADS, rules(), st.integers(1, 12))
def test_forward_by_definition(heads, rule, T):
    heads = *heads, 5
    inp, dout = problem(2, T, heads)
    want = by_definition(inp, heads, **rule)
    for layer in (reference, cpu):
        got = run(layer, inp, dout, heads[0], rule)[:2]
        assert_close(got, want, 1e-13)


@drawn
@given(HEADS, st.integers(1, 40), st.integers(1, 300), rules(), FLOATS)
def test_cpu_against_reference(heads, hs, T, rule, dtype):
    inp, dout = problem(1, T, (*heads, hs), dtype)
    double = inp.astype(np.float64), dout.astype(np.float64)
    want = run(reference, *double, heads[0], rule)
    got = run(cpu, inp, dout, heads[0], rule)
    assert all(x.dtype == dtype for x in got)
    # a soft cap of 50 leaves a score the rounding of 50
    tol = TOLERANCE[dtype] * (3 if "softcap" in rule else 1)
    assert_close(got, want, tol)


@pytest.mark.parametrize("window", (1, 64, 96, 97, 300))
def test_wide_heads_and_large_scores(window):
    """Heads of 256 channels take smaller blocks; scores far beyond the cap."""
    inp, dout = problem(1, 210, (2, 1, 256), large=3.0)
    rule = {"window": window, "softcap": 20.0}
    want = run(reference, inp, dout, 2, rule)
    assert_close(run(cpu, inp, dout, 2, rule), want, 1e-12)


@drawn
@given(st.integers(1, 250), rules())
def test_backward_overwrites(T, rule):
    """Every number of dinp, with scratch memory of one's own."""
    inp, dout = problem(2, T, (4, 2, 7))
    out, lse, added = run(cpu, inp, dout, 4, rule)
    got, work = np.full_like(inp, np.nan), np.empty(work_shape())
    how = {"add": False, "work": work, **rule}
    cpu.local_attention_backward(got, dout, inp, out, lse, **how)
    assert_close([got], [added - 1], 1e-13)


@BOTH
@pytest.mark.parametrize("rule", (
    {"window": 1}, {"window": 3}, {"scale": 0.3}, {"softcap": 1.5},
    {"window": 2, "scale": 0.7, "softcap": 0.8},
))  # fmt: skip
def test_gradient(layer, rule):
    inp, dout = problem(2, 6, (4, 2, 3))
    out, lse = np.empty_like(dout), np.empty((2, 4, 6))

    def loss():
        layer.local_attention_forward(out, lse, inp, **rule)
        return (dout * out).sum()

    want = 1 + numerical_gradient(loss, inp)
    assert_close(run(layer, inp, dout, 4, rule)[2:], [want], 1e-8)


def test_without_a_rule_it_is_attention_bit_by_bit():
    inp, dout = problem(1, 200, (4, 2, 16), np.float32)
    plain = np.empty_like(dout), np.empty((1, 4, 200), np.float32)
    cpu.attention_forward(*plain, inp)
    dinp = np.ones_like(inp)
    cpu.attention_backward(dinp, dout, inp, *plain)
    for rule in ({}, {"window": 200}, {"scale": 0.25}):
        got = run(cpu, inp, dout, 4, rule)
        for a, b in zip(got, (*plain, dinp), strict=True):
            assert np.array_equal(a, b)


@BOTH
def test_what_is_outside_the_window_changes_nothing(layer):
    inp, dout = problem(1, 250, (2, 1, 8))
    dout[:, :200] = 0
    rule = {"window": 30}
    out, _, dinp = run(layer, inp, dout, 2, rule)
    assert (dinp[:, :171] == 1).all()
    assert (dinp[:, 171:200, 16:] != 1).any()
    inp[:, :171] = 1e3
    assert np.array_equal(
        out[:, 200:], run(layer, inp, dout, 2, rule)[0][:, 200:]
    )


def test_blocks_outside_the_window_are_not_read():
    """Their keys may be no numbers at all: nothing multiplies them."""
    inp, dout = problem(1, 400, (1, 1, 8))
    want = run(cpu, inp, dout, 1, {"window": 20})[0]
    inp[:, :96] = np.nan
    got = run(cpu, inp, dout, 1, {"window": 20})[0]
    assert np.array_equal(got[:, 192:], want[:, 192:])


def test_bf16_is_as_near_as_attentions():
    inp, dout = problem(1, 150, (4, 2, 64), np.float32)
    double = inp.astype(np.float64), dout.astype(np.float64)
    if not cpu.has_bf16():
        pytest.skip("this processor has no bfloat16 products")
    for rule in ({"window": 40}, {"softcap": 30.0}, {"window": 100}):
        want = run(reference, *double, 4, rule)
        got = run(cpu, inp, dout, 4, rule, bf16=True)
        assert_close(got, want, 2e-2)
        exact = run(cpu, inp, dout, 4, rule)
        assert not np.array_equal(got[0], exact[0])
    with pytest.raises(TypeError, match="local_attention_forward: bf16"):
        run(cpu, *double, 4, {}, bf16=True)


def test_threads_change_no_bit():
    inp, dout = problem(2, 130, (4, 2, 16), np.float32)
    rule = {"window": 50, "softcap": 5.0}
    assert_threads_change_no_bit(lambda: run(cpu, inp, dout, 4, rule))


@BOTH
@pytest.mark.parametrize("rule, error, what", (
    ({"window": 0}, ValueError, "window must be None or a positive integer"),
    ({"window": 2.0}, ValueError, "window must be .* got 2.0"),
    ({"scale": -1.0}, ValueError, "scale must be above 0, got -1.0"),
    ({"softcap": 0}, ValueError, "softcap must be above 0, got 0"),
    ({"softcap": "no"}, TypeError, "softcap must be a number, got str"),
))  # fmt: skip
def test_a_rule_that_none_has(layer, rule, error, what):
    inp, dout = problem(1, 3, (1, 1, 4))
    lse = np.zeros((1, 1, 3))
    with pytest.raises(error, match=f"local_attention_forward: {what}"):
        layer.local_attention_forward(dout.copy(), lse, inp, **rule)
    arrays = np.zeros_like(inp), dout, inp, dout.copy(), lse
    with pytest.raises(error, match=f"local_attention_backward: {what}"):
        layer.local_attention_backward(*arrays, **rule)


# norms of heads


def normed(layer, B, T, heads, dtype, eps=1e-3, offset=0.0):
    """All that both directions write; gradients begin at 1."""
    NH, NKV, hs = heads
    inp, _ = problem(B, T, heads, dtype)
    dinp = problem(B, T, heads, dtype)[0][:, ::-1].copy()
    qweight, kweight = np.linspace(-1, 2, 2 * hs).astype(dtype).reshape(2, hs)
    out, rstd = np.full_like(inp, 7), np.full((B, T, NH + NKV), 7, dtype)
    weights = qweight, kweight
    layer.headnorm_forward(out, rstd, inp, *weights, eps, offset)
    grads = [dinp, *np.ones((2, hs), dtype)]
    layer.headnorm_backward(*grads, inp, *weights, rstd, offset)
    return out, rstd, *grads


@drawn
@given(
    st.integers(1, 3), st.integers(1, 40), HEADS, st.integers(1, 40), FLOATS,
    st.sampled_from((0.0, 1.0)),
)  # fmt: skip
def test_norms_of_heads_on_a_cpu(B, T, heads, hs, dtype, offset):
    shape = B, T, (*heads, hs)
    got = normed(cpu, *shape, dtype, offset=offset)
    want = normed(reference, *shape, np.float64, offset=offset)
    assert_close(got, want, 1e-12 if dtype == np.float64 else 2e-5)


@BOTH
@pytest.mark.parametrize("offset", (0.0, 1.0))
def test_gradient_of_norms_of_heads(layer, offset):
    NH, NKV, hs = heads = 4, 2, 3
    (inp, _), rng = problem(2, 3, heads), np.random.default_rng(3)
    dout, weights = rng.normal(size=inp.shape), rng.normal(size=(2, hs))
    out, rstd = np.empty_like(inp), np.empty((2, 3, NH + NKV))

    def loss():
        layer.headnorm_forward(out, rstd, inp, *weights, 1e-3, offset)
        return (dout * out).sum()

    want = numerical_gradient(loss, inp), numerical_gradient(loss, weights)
    loss()
    dinp, dweights = dout.copy(), np.zeros((2, hs))
    layer.headnorm_backward(dinp, *dweights, inp, *weights, rstd, offset)
    assert_close((dinp, dweights), want, 1e-8)


@BOTH
def test_norms_of_heads_that_do_not_fit(layer):
    w = np.ones(4)
    for width, n in ((16, 4), (16, 2), (18, 3)):
        x, rstd = np.zeros((1, 2, width)), np.zeros((1, 2, n))
        with pytest.raises(ValueError, match="headnorm_forward: inp must"):
            layer.headnorm_forward(x.copy(), rstd, x, w, w)
        with pytest.raises(ValueError, match="headnorm_backward: inp must"):
            layer.headnorm_backward(
                x.copy(), w.copy(), w.copy(), x, w, w, rstd
            )


# soft caps


@drawn
@given(
    st.integers(1, 3), st.integers(1, 20), st.integers(1, 60),
    st.integers(0, 9), FLOATS, st.sampled_from((2.0, 30.0)),
)  # fmt: skip
def test_soft_caps_on_a_cpu(B, T, V, more, dtype, softcap):
    rng = np.random.default_rng(2)
    logits = (5 * rng.normal(size=(B, T, V + more))).astype(dtype)
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    dlosses = rng.normal(size=(B, T)).astype(dtype)
    found = []
    for layer, kind in ((cpu, dtype), (reference, np.float64)):
        x, d = logits.astype(kind), dlosses.astype(kind)
        layer.softcap_forward(x, softcap)
        assert np.abs(x).max() <= softcap
        lse = np.log(np.exp(x[..., :V]).sum(axis=-1))
        dx = np.full_like(x, np.nan)
        how = lse, targets, V, softcap
        layer.capped_crossentropy_backward(dx, d, x, *how)
        same = x.copy()
        layer.capped_crossentropy_backward(same, d, same, *how)
        assert np.array_equal(same, dx)
        found.append((x, dx))
    assert_close(*found, 1e-13 if dtype == np.float64 else 2e-6)


@BOTH
def test_gradient_of_capped_logits(layer):
    rng, V = np.random.default_rng(2), 6
    logits = 3 * rng.normal(size=(2, 3, 8))
    targets = rng.integers(0, V, (2, 3)).astype(np.int32)
    dlosses = rng.normal(size=(2, 3))
    x, losses, lse = logits.copy(), np.empty((2, 3)), np.empty((2, 3))

    def loss():
        x[...] = logits
        layer.softcap_forward(x, 2.0)
        layer.crossentropy_softmax_forward(losses, lse, x, targets, V)
        return (dlosses * losses).sum()

    want = numerical_gradient(loss, logits)
    loss()
    layer.capped_crossentropy_backward(x, dlosses, x, lse, targets, V, 2.0)
    assert_close([x], [want], 1e-8)
