"""Attention with a window, norms of heads, soft caps: what they leave out.

What they compute, tests/model/test_families.py compares.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import NAMED, arguments, assert_near, copied, draw, passed, results

from llmnb import cpu, cuda, reference
from llmnb.gpu.launch import simulated

BOTH = pytest.mark.parametrize("layer", (reference, cpu))
LAYER = NAMED["local_attention"]


def test_without_a_rule_it_is_attention_bit_by_bit():
    p = draw("local_attention", 1, 200, 2, 2, 16, dtype=np.float32)
    plain = NAMED["attention"]
    want = results(plain, passed(plain, cpu, p))
    for rule in ({}, {"window": 200}, {"scale": 0.25}):
        assert_near(results(LAYER, passed(LAYER, cpu, p | rule)), want, 0)


def test_blocks_outside_the_window_are_not_read():
    """Their keys may be no numbers at all: nothing multiplies them."""
    p = draw("local_attention", 1, 400, 1, 1, 8, window=20)
    want = passed(LAYER, cpu, p)["out"]
    p["inp"][:, :96] = np.nan
    got = passed(LAYER, cpu, p)["out"]
    assert np.array_equal(got[:, 192:], want[:, 192:])


@pytest.mark.skipif(not cpu.has_bf16(), reason="no bfloat16 products here")
@pytest.mark.parametrize(
    "rule", ({"window": 40}, {"softcap": 30.0}, {"window": 100})
)
def test_bf16_is_as_near_as_attentions(rule):
    p = draw("local_attention", 1, 150, 2, 2, 64, dtype=np.float32, **rule)
    want = results(LAYER, passed(LAYER, reference, copied(p, np.float64)))
    got = results(LAYER, passed(LAYER, cpu, p, bf16=True))
    assert_near(got, want, 2e-2)
    assert not np.array_equal(got["out"], passed(LAYER, cpu, p)["out"])


@pytest.mark.parametrize("layer", (reference, cpu, cuda))
@pytest.mark.parametrize("rule, error, what", (
    ({"window": 0}, ValueError, "window must be None or a positive integer"),
    ({"window": 2.0}, ValueError, "window must be .* got 2.0"),
    ({"scale": -1.0}, ValueError, "scale must be above 0, got -1.0"),
    ({"softcap": 0}, ValueError, "softcap must be above 0, got 0"),
    ({"softcap": "no"}, TypeError, "softcap must be a number, got str"),
))  # fmt: skip
def test_a_rule_that_none_has(layer, rule, error, what):
    p = draw("local_attention", 1, 3, 1, 1, 4, dtype=np.float32)
    for way in LAYER.ways:
        given = arguments(way, p) | rule
        if layer is cuda:
            given |= {k: simulated(x) for k, x in given.items() if np.ndim(x)}
        with pytest.raises(error, match=f"{way}: {what}"):
            getattr(layer, way)(**given)


@pytest.mark.parametrize("layer", (reference, cpu, cuda))
@pytest.mark.parametrize("kind", (np.int32, np.uint8, bool))
def test_windows_of_other_integers(layer, kind):
    """As those of Python's, whichever of both was compiled for."""
    p = draw("local_attention", 1, 7, 1, 1, 4, dtype=np.float32)
    for window in (kind(1), 1, None, kind(1)):
        check_window(layer, p, window)


@pytest.mark.parametrize("layer", (reference, cpu, cuda))
@pytest.mark.parametrize("window", (2**31, 2**63 - 1, 2**64))
def test_windows_that_end_nowhere(layer, window):
    p = draw("local_attention", 1, 7, 1, 1, 4, dtype=np.float32)
    check_window(layer, p, window)


def check_window(layer, p, window):
    """Both passes against a window of Python's that is no longer than T."""
    plain = {"window": min(7, int(window or 7))}
    want = results(LAYER, passed(LAYER, reference, p | plain))
    p = copied(p) | {"window": window}
    if layer is cuda:
        p |= {k: simulated(x) for k, x in p.items() if np.ndim(x)}
    for way in LAYER.ways:
        getattr(layer, way)(**arguments(way, p))
    assert_near({k: np.asarray(p[k]) for k in want}, want, 2e-6)


# norms of heads


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


@BOTH
def test_heads_of_no_channels(layer):
    x, rstd, w = np.zeros((1, 2, 0)), np.zeros((1, 2, 3)), np.zeros(0)
    with pytest.raises(ValueError, match="hs = 0 and NH"):
        layer.headnorm_forward(x.copy(), rstd, x, w, w)


def test_norms_of_heads_of_no_tokens():
    x, rstd, w = np.zeros((0, 2, 8)), np.zeros((0, 2, 3)), np.ones(2)
    reference.headnorm_forward(x.copy(), rstd, x, w, w)
    dw, same = np.ones((2, 2)), np.ones((2, 2))
    reference.headnorm_backward(x.copy(), *dw, x, w, w, rstd)
    assert np.array_equal(dw, same)


# soft caps


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(1, 3), st.integers(1, 20), st.integers(1, 60),
    st.integers(0, 9),
    st.sampled_from((np.float32, np.float64)), st.sampled_from((2.0, 30.0)),
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
        found.append({"x": x, "dx": dx})
    assert_near(*found, 1e-13 if dtype == np.float64 else 2e-6)
