"""SwiGLU, GeGLU and token vectors on a GPU."""

import numpy as np
import pytest
from gpu import PLACES, both, check_row, there
from layers import NAMED, problem

from llmnb import cpu, cuda
from llmnb.gpu.launch import to_host

KINDS = "swiglu", "geglu"


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
    forward, backward = check_row(kind, 1, 4, 256, tol=2e-6)
    assert forward.sectors == 4 * (64 + 32)
    assert backward.sectors == 4 * (64 + 32 + 64)
    assert forward.requests == forward.sectors // 16


# token vectors


def test_the_order_is_that_of_the_text():
    """The bits are those of the CPU's one thread.

    Two tokens share a bucket; the second begins where a warp looks anew.
    """
    layer = NAMED["embedding"]
    p = problem(layer, np.float32, layer.sized(1, 48, 8, 4), scale=4.0)
    p["inp"][0, :32], p["inp"][0, 32:] = 0, 3
    _, arrays = dict(both(layer, p)).values()
    given = there(arrays)
    cuda.embedding_backward(*given.values())
    cpu.embedding_backward(*arrays.values())
    np.testing.assert_array_equal(to_host(given["dwte"]), arrays["dwte"])
