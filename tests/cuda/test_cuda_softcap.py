"""Soft caps on a GPU: of logits, and the gradient through them."""

import math

import numpy as np
import pytest
from gpu import PLACES, check_layer, check_machine_code, single, there
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnb import cuda, reference
from llmnb.gpu.launch import simulated, to_host
from llmnb.gpu.simulator import watch

drawn = settings(max_examples=16, deadline=None, derandomize=True)


@pytest.mark.parametrize("place", PLACES)
def test_the_cap_is_right_at_every_size(place):
    """Relative to each element, next to the seam of its two forms too."""
    rng, n = np.random.default_rng(0), 4000
    x = np.exp(rng.uniform(math.log(1e-6), math.log(60), n))
    x[:100] = 0.6 * (1 + rng.uniform(-1e-3, 1e-3, 100))
    x = (x * rng.choice([-1, 1], n)).astype(np.float32)
    for cap in (1.0, 30.0):
        given = place((x * np.float32(cap))[None, None])
        cuda.softcap_forward(given, cap)
        want = cap * np.tanh((x * np.float32(cap)).astype("f8") / cap)
        np.testing.assert_allclose(to_host(given)[0, 0], want, rtol=5e-7)


@drawn
@given(
    st.tuples(*(st.integers(1, n) for n in (2, 3, 60))),
    st.sampled_from((0.5, 30.0)),
)
def test_caps_equal_the_reference(shape, cap):
    x = np.float32(2 * cap) * single(*shape, seed=0)
    layers = cuda.softcap_forward, reference.softcap_forward
    check_layer(*layers, {"x": x, "softcap": cap}, ["x"], tol=5e-7)


def test_far_out_the_cap_is_reached_and_no_more():
    x = simulated(np.array([[[-1e30, -1e3, 0, 1e3, 3e38]]], np.float32))
    cuda.softcap_forward(x, 30.0)
    assert to_host(x).ravel().tolist() == [-30, -30, 0, 30, 30]


def slopes(B, T, V, more, cap=3.0):
    logits = np.float32(cap) * np.tanh(single(B, T, V + more, seed=0))
    lse = np.log(np.exp(logits[..., :V]).sum(axis=-1))
    targets = np.random.default_rng(0).integers(0, V, (B, T), np.int32)
    return {
        "dlogits": np.full_like(logits, np.nan),
        "dlosses": single(B, T, seed=1),
        "logits": logits, "lse": lse, "targets": targets,
        "V": V, "softcap": cap,
    }  # fmt: skip


@drawn
@given(st.tuples(*(st.integers(1, n) for n in (2, 3, 60))), st.integers(0, 7))
def test_slopes_equal_the_reference(shape, more):
    name = "capped_crossentropy_backward"
    layers = getattr(cuda, name), getattr(reference, name)
    check_layer(*layers, slopes(*shape, more), ["dlogits"])


def test_machine_code():
    with watch() as seen:
        cuda.softcap_forward(simulated(np.ones((1, 1, 5), "f4")), 3.0)
        arrays = there(slopes(1, 1, 5, 0))
        cuda.capped_crossentropy_backward(*arrays.values())
    check_machine_code(seen, registers=64)
