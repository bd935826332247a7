"""The encoder on a GPU: every version, races, machine code, bad input."""

import re

import numpy as np
import pytest
from gpu import check_ladder, check_machine_code, draw, there

from llmnb import cpu, cuda
from llmnb.bench.rungs_encoder import ENCODER_BACKWARD, ENCODER_FORWARD
from llmnb.cuda.encoder import into_buckets
from llmnb.gpu.launch import empty, simulated, to_host
from llmnb.gpu.simulator import watch

FORWARD = (*ENCODER_FORWARD, cuda.encoder_forward)
BACKWARD = (*ENCODER_BACKWARD, cuda.encoder_backward)
# whole vectors, and not
SHAPES = [(2, 3, 5, 1, 4), (3, 5, 32, 1, 9)]


def run(way, shape, version):
    name = f"encoder_{way}"
    return check_ladder(name, draw(name, *shape), version)


@pytest.mark.parametrize("version", range(1, 1 + len(FORWARD)))
@pytest.mark.parametrize("shape", SHAPES)
def test_machine_code_forward(shape, version):
    seen = run("forward", shape, version)
    (made,) = check_machine_code(seen).values()
    wide = version == len(FORWARD) and shape[2] % 4 == 0
    assert (made.vector_loads, made.vector_stores) == (2 * wide, wide)


@pytest.mark.parametrize("version", range(1, 1 + len(BACKWARD)))
@pytest.mark.parametrize("shape", SHAPES)
def test_machine_code_backward(shape, version):
    seen = run("backward", shape, version)
    found = check_machine_code(seen)
    wide = version == len(BACKWARD) and shape[2] % 4 == 0
    assert len(found) == (1 if version == 1 else 2 + wide)
    assert (seen.atomics > 0) is (version == 1)
    assert seen.barriers == 0
    for name, made in found.items():
        vectors = wide and name != "_into_buckets"
        if name == "_into_buckets":
            assert not re.search(r"\b(div|rem)\.", made.ptx)
        assert (made.vector_loads > 0) is (made.vector_stores > 0) is vectors


def vectors_alone(dwte, dwpe, dout, inp):
    """Token vectors without positions, and with a scale, which is exact."""
    cuda.embedding_backward(dwte, dout, inp, 4.0)


@pytest.mark.parametrize("layer", (*BACKWARD, vectors_alone))
def test_repeats_add_up_and_absent_rows_stay_even_as_nan(layer):
    inp = np.array([[2, 0, 2], [2, 0, 2]], np.int32)
    dwte, dwpe = np.full((4, 36), 7, "f4"), np.full((5, 36), 7, "f4")
    dwte[[1, 3]] = np.nan
    grads = simulated(dwte), simulated(dwpe)
    layer(*grads, simulated(np.ones((2, 3, 36), "f4")), simulated(inp))
    got, positions = map(to_host, grads)
    scale, seen = (4, 0) if layer is vectors_alone else (1, 2)
    assert (got[0] == 7 + 2 * scale).all()
    assert (got[2] == 7 + 4 * scale).all()
    assert np.isnan(got[[1, 3]]).all()
    assert (positions == 7 + seen * (np.arange(5)[:, None] < 3)).all()


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("layer", (*BACKWARD[1:], vectors_alone))
def test_the_order_is_that_of_the_text(layer, mixed):
    """The bits are those of the CPU's one thread.

    Not mixed: two tokens share a bucket, and the second begins where a warp
    looks anew.
    """
    arrays = draw("encoder_backward", 4, 20 if mixed else 12, 8, 1, 4)
    if not mixed:
        arrays["inp"].ravel()[:32], arrays["inp"].ravel()[32:] = 0, 2
    given = there(arrays)
    layer(*given.values())
    if layer is vectors_alone:
        dwte, _, dout, inp = arrays.values()
        cpu.embedding_backward(dwte, dout, inp, 4.0)
    else:
        cpu.encoder_backward(*arrays.values())
    for name in ("dwte", "dwpe"):
        assert np.array_equal(to_host(given[name]), arrays[name])


@pytest.mark.parametrize("rows", [1, 31, 33, 100])
def test_buckets_keep_the_order_of_the_text(rows):
    """Every place once, by what its token leaves, and in order within."""
    inp = np.random.default_rng(rows).integers(0, 50, rows, np.int32)
    given = simulated(inp)
    work = empty(cuda.encoder_scratch(rows), like=given)
    with watch():
        order, starts, K = into_buckets(given, work)
    order, starts = to_host(order), to_host(starts)
    assert -(-rows // 16) // 2 < K <= -(-rows // 16)
    assert K & (K - 1) == 0
    assert (order == np.argsort(inp % K, kind="stable")).all()
    edges = np.searchsorted(np.sort(inp % K), np.arange(K + 1))
    assert (starts == edges).all()


def test_the_search_does_not_grow_with_the_square_of_the_text():
    """Reads of tokens: four times the text, hardly more than four times."""
    seen = []
    for rows in (64, 256):
        arrays = *np.zeros((2, rows, 4), "f4"), np.zeros((1, rows, 4), "f4")
        arrays += (np.arange(rows, dtype=np.int32)[None],)
        with watch() as counted:
            cuda.encoder_backward(*map(simulated, arrays))
        seen.append(counted.reads)
    assert seen[1] < 7 * seen[0]
