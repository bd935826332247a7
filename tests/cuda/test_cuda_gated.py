"""SwiGLU, GeGLU and token vectors on a GPU."""

import numpy as np
import pytest
from gpu import PLACES, between, check_layer, check_machine_code, there
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnb import cpu, cuda, reference
from llmnb.gpu.launch import simulated, to_host
from llmnb.gpu.simulator import watch

KINDS = "swiglu", "geglu"
sizes = st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 41))
drawn = settings(max_examples=12, deadline=None, derandomize=True)


def draw(B, T, H, scale=2.0):
    """The arguments of both directions; what is written is NaN."""
    rng = np.random.default_rng(0)
    inp = rng.normal(scale=scale, size=(B, T, 2 * H)).astype(np.float32)
    dout = rng.normal(size=(B, T, H)).astype(np.float32)
    none = np.full_like(inp, np.nan)
    forward = {"out": np.full_like(dout, np.nan), "inp": inp}
    return forward, {"dinp": none, "dout": dout, "inp": inp}


def check(kind, *shape):
    found = []
    for way, arrays in zip(("forward", "backward"), draw(*shape), strict=True):
        name, writes = f"{kind}_{way}", [*arrays][:1]
        layers = getattr(cuda, name), getattr(reference, name)
        found.append(check_layer(*layers, arrays, writes, tol=2e-6))
    return found


@drawn
@given(st.sampled_from(KINDS), sizes)
def test_gates_equal_the_reference(kind, shape):
    for seen in check(kind, *shape):
        ((kernel, *_),) = seen.launches
        each = "by_four" if shape[2] % 4 == 0 else "by_one"
        assert kernel.__name__ == each


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_array_may_begin_between_vectors(kind, place):
    for way, arrays in zip(
        ("forward", "backward"), draw(1, 3, 8), strict=True
    ):
        layer = getattr(cuda, f"{kind}_{way}")
        first, straight = next(iter(arrays)), there(arrays, place)
        layer(*straight.values())
        want = to_host(straight[first])
        for name in arrays:
            shifted = {name: lambda x: between(x, place)}
            given = there(arrays, place, **shifted)
            with watch():
                layer(*given.values())
            np.testing.assert_array_equal(to_host(given[first]), want)


@pytest.mark.parametrize("kind", KINDS)
def test_far_out_a_gate_is_shut_or_wide_open(kind):
    gates = np.array([-1e4, -1e3, 200, 1e4], np.float32)
    inp = np.concatenate([gates, np.ones(4, "f4")])[None, None]
    for place in PLACES:
        out, dinp = place(inp[..., :4]), place(inp)
        given, ones = place(inp), place(inp[..., 4:])
        getattr(cuda, f"{kind}_forward")(out, given)
        getattr(cuda, f"{kind}_backward")(dinp, ones, given)
        want = np.maximum(gates, 0)
        np.testing.assert_array_equal(to_host(out)[0, 0], want)
        want = np.concatenate([gates > 0, want])
        np.testing.assert_array_equal(to_host(dinp)[0, 0], want)


@pytest.mark.parametrize("kind", KINDS)
def test_what_gates_move(kind):
    """inp once and out once; three arrays twice as wide on the way back."""
    forward, backward = check(kind, 1, 4, 256)
    assert forward.sectors == 4 * (64 + 32)
    assert backward.sectors == 4 * (64 + 32 + 64)
    assert forward.requests == forward.sectors // 16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("H", [5, 8])
def test_machine_code(kind, H):
    for seen in check(kind, 1, 1, H):
        (made,) = check_machine_code(seen).values()
        wide = H % 4 == 0
        assert (made.vector_loads > 0) is (made.vector_stores > 0) is wide
        assert made.registers <= 64
        assert "tanh" not in made.ptx and "call" not in made.ptx


def test_nothing_is_launched_for_empty_arrays():
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        inp = simulated(np.empty((*shape[:2], 2 * shape[2]), np.float32))
        out = simulated(np.empty(shape, np.float32))
        with watch() as seen:
            cuda.swiglu_forward(out, inp)
            cuda.geglu_forward(out, inp)
        assert not seen.launches


# token vectors


def tokens(B, T, C, V, scale):
    rng = np.random.default_rng(0)
    inp = rng.integers(0, V, (B, T)).astype(np.int32)
    wte, dwte = rng.normal(size=(2, V, C)).astype(np.float32)
    dout = rng.normal(size=(B, T, C)).astype(np.float32)
    forward = {"out": np.full_like(dout, np.nan), "inp": inp, "wte": wte}
    backward = {"dwte": dwte, "dout": dout, "inp": inp}
    return forward | {"scale": scale}, backward | {"scale": scale}


@drawn
@given(
    st.tuples(*(st.integers(1, n) for n in (3, 23, 140, 9))),
    st.sampled_from((1.0, 7.3)),
)
def test_token_vectors_equal_the_reference(shape, scale):
    for way, arrays in zip(
        ("forward", "backward"), tokens(*shape, scale), strict=True
    ):
        name, writes = f"embedding_{way}", [*arrays][:1]
        layers = getattr(cuda, name), getattr(reference, name)
        seen = check_layer(*layers, arrays, writes)
        assert seen.atomics == seen.barriers == 0


def test_the_order_is_that_of_the_text():
    """The bits are those of the CPU's one thread."""
    _, arrays = tokens(4, 20, 8, 3, 4.0)
    given = there(arrays)
    cuda.embedding_backward(*given.values())
    cpu.embedding_backward(*arrays.values())
    np.testing.assert_array_equal(to_host(given["dwte"]), arrays["dwte"])


def test_rows_of_absent_tokens_stay_even_as_nan():
    inp = np.array([[2, 0, 2], [2, 0, 2]], np.int32)
    dwte = np.full((4, 36), 7, np.float32)
    dwte[[1, 3]] = np.nan
    given = simulated(dwte)
    ones = simulated(np.ones((2, 3, 36), "f4"))
    cuda.embedding_backward(given, ones, simulated(inp), 3.0)
    got = to_host(given)
    assert (got[0] == 13).all() and (got[2] == 19).all()
    assert np.isnan(got[[1, 3]]).all()


def test_machine_code_of_token_vectors():
    for way, arrays in zip(
        ("forward", "backward"), tokens(1, 3, 33, 5, 2.0), strict=True
    ):
        with watch() as seen:
            getattr(cuda, f"embedding_{way}")(*there(arrays).values())
        check_machine_code(seen)
