"""The encoder on a GPU: every version, races, machine code, bad input."""

import gpu
import numpy as np
import pytest

from llmnb.cpu import encoder as cpu
from llmnb.cuda.encoder import (
    ENCODER_BACKWARD,
    ENCODER_FORWARD,
    encoder_backward,
    encoder_forward,
)
from llmnb.gpu.launch import simulated, to_host
from llmnb.gpu.simulator import watch
from llmnb.reference import encoder as reference

FORWARD = range(1, len(ENCODER_FORWARD) + 1)
BACKWARD = range(1, len(ENCODER_BACKWARD) + 1)
# B, T, C, Vp: one of everything; odd; whole vectors; more than a block's
# channels; places that fill more than one vote, and many repeats
SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 5, 4),
    (1, 7, 4, 3),
    (3, 5, 32, 9),
    (2, 2, 130, 3),
    (1, 2, 516, 2),
    (3, 23, 8, 2),
    (2, 33, 3, 40),
]


def problem(B, T, C, Vp, seed=0):
    rng = np.random.default_rng(seed)
    inp = rng.integers(0, Vp, (B, T), dtype=np.int32)
    wte = rng.normal(size=(Vp, C)).astype(np.float32)
    wpe = rng.normal(size=(T + 2, C)).astype(np.float32)
    dout = rng.normal(size=(B, T, C)).astype(np.float32)
    return inp, wte, wpe, dout


@pytest.mark.parametrize("version", FORWARD)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(shape, version):
    inp, wte, wpe, dout = problem(*shape)
    out = np.full_like(dout, np.nan)
    arrays = {"out": out, "inp": inp, "wte": wte, "wpe": wpe}
    seen = gpu.check_layer(
        encoder_forward,
        reference.encoder_forward,
        arrays,
        ["out"],
        version=version,
    )
    found = gpu.check_machine_code(seen)
    (made,) = found.values()
    wide = version == 2 and shape[2] % 4 == 0
    assert (made.vector_loads, made.vector_stores) == (2 * wide, wide)


@pytest.mark.parametrize("version", BACKWARD)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(shape, version):
    inp, wte, wpe, dout = problem(*shape)
    # gradients start from something: backward adds
    arrays = {"dwte": wte, "dwpe": wpe, "dout": dout, "inp": inp}
    seen = gpu.check_layer(
        encoder_backward,
        reference.encoder_backward,
        arrays,
        ["dwte", "dwpe"],
        version=version,
    )
    found = gpu.check_machine_code(seen)
    assert len(found) == (1 if version == 1 else 2)
    assert (seen.atomics > 0) is (version == 1)
    assert seen.barriers == 0
    for made in found.values():
        wide = version == 3 and shape[2] % 4 == 0
        assert (made.vector_loads > 0) is (made.vector_stores > 0) is wide


@pytest.mark.parametrize("version", BACKWARD)
def test_repeats_add_up_and_absent_rows_stay(version):
    inp = np.array([[2, 0, 2], [2, 0, 2]], np.int32)
    dwte, dwpe = (simulated(np.full((n, 36), 7, np.float32)) for n in (4, 5))
    dout = simulated(np.ones((2, 3, 36), np.float32))
    encoder_backward(dwte, dwpe, dout, simulated(inp), version=version)
    assert (to_host(dwte) == np.array([[9], [7], [11], [7]])).all()
    assert (to_host(dwpe) == np.array([[9], [9], [9], [7], [7]])).all()


@pytest.mark.parametrize("version", [2, 3])
def test_the_order_is_that_of_the_text(version):
    """The bits are those of the CPU's one thread."""
    inp, dwte, dwpe, dout = problem(4, 20, 8, 3)
    there = [simulated(x) for x in (dwte, dwpe, dout, inp)]
    encoder_backward(*there, version=version)
    cpu.encoder_backward(dwte, dwpe, dout, inp)
    assert np.array_equal(to_host(there[0]), dwte)
    assert np.array_equal(to_host(there[1]), dwpe)


@pytest.mark.parametrize("version", BACKWARD)
def test_rows_without_a_token_may_hold_anything(version):
    dwte = np.full((50, 8), np.nan, np.float32)
    dwte[5] = 1
    there = simulated(dwte), simulated(np.zeros((3, 8), np.float32))
    dout = simulated(np.ones((2, 3, 8), np.float32))
    inp = simulated(np.full((2, 3), 5, np.int32))
    encoder_backward(*there, dout, inp, version=version)
    got = to_host(there[0])
    assert (got[5] == 7).all()
    assert np.isnan(np.delete(got, 5, axis=0)).all()


def unaligned(array):
    """A device's array that begins 4 bytes after a multiple of 16."""
    flat = simulated(np.concatenate([[0], array.ravel()]).astype(array.dtype))
    return flat[1:].reshape(array.shape)


@pytest.mark.parametrize("place", [0, 2, 3])
def test_forward_of_arrays_that_begin_anywhere(place):
    inp, wte, wpe, dout = problem(2, 3, 8, 5)
    arrays = [np.zeros_like(dout), inp, wte, wpe]
    there = [
        (unaligned if i == place else simulated)(a)
        for i, a in enumerate(arrays)
    ]
    with watch():
        encoder_forward(*there)
    reference.encoder_forward(*arrays)
    assert np.array_equal(to_host(there[0]), arrays[0])


@pytest.mark.parametrize("place", [0, 1, 2])
def test_backward_of_arrays_that_begin_anywhere(place):
    inp, wte, wpe, dout = problem(2, 3, 8, 5)
    arrays = [wte, wpe, dout, inp]
    there = [
        (unaligned if i == place else simulated)(a)
        for i, a in enumerate(arrays)
    ]
    with watch():
        encoder_backward(*there)
    cpu.encoder_backward(*arrays)
    assert np.array_equal(to_host(there[0]), wte)
    assert np.array_equal(to_host(there[1]), wpe)


# what the chapter says it counts


def counted(layer, version, *arrays):
    there = [simulated(a) for a in arrays]
    with watch() as seen:
        layer(*there, version=version)
    return seen


def test_what_vectors_buy_in_the_forward_pass():
    inp, wte, wpe, dout = problem(2, 8, 128, 5)
    one, four = (
        counted(encoder_forward, v, dout, inp, wte, wpe) for v in FORWARD
    )
    assert one.threads == 4 * four.threads
    assert one.requests == 4 * four.requests
    assert one.written_bytes == four.written_bytes
    # the rows as before; the token once for a warp of 128 channels, not four
    rows = 3 * 2 * 8 * 128 * 4 // 32
    assert (one.sectors, four.sectors) == (rows + 64, rows + 16)


def test_what_votes_buy_in_the_backward_pass():
    inp, dwte, dwpe, dout = problem(1, 32, 128, 20)
    _, one, four = (
        counted(encoder_backward, v, dwte, dwpe, dout, inp) for v in BACKWARD
    )
    assert four.requests < one.requests / 10
    assert four.sectors < one.sectors * 0.6


# bad input


def changed(i, change):
    """Arguments of both functions with one of them changed."""
    inp, wte, wpe, dout = map(simulated, problem(2, 3, 4, 5))
    forward = [simulated(to_host(dout)), inp, wte, wpe]
    backward = [wte, wpe, dout, inp]
    j = {0: 2, 1: 3, 2: 0, 3: 1}[i]
    forward[i], backward[j] = change(forward[i]), change(backward[j])
    return forward, backward


@pytest.mark.parametrize(
    "i, change, error, text",
    [
        (0, to_host, TypeError, "out must be a device's array, got ndarray"),
        (0, lambda x: x[0], ValueError, r"out must have shape \(B, T, C\)"),
        (0, lambda x: x.view(np.int32), TypeError, "out must be float32"),
        (1, to_host, TypeError, "inp must be a device's array"),
        (1, lambda x: x.view(np.float32), TypeError, "inp must be int32"),
        (1, lambda x: x[:1], ValueError, r"inp must have shape \(2, 3\)"),
        (2, lambda x: x[0], ValueError, r"wte must have shape \(Vp, C\)"),
        (
            2,
            lambda x: x.reshape(4, 5),
            ValueError,
            r"wte must have shape \(4, 4\)",
        ),
        (3, lambda x: x[:2], ValueError, "T must be at most 2, .* got 3"),
        (3, lambda x: x[0], ValueError, r"wpe must have shape \(T, C\)"),
        (3, lambda x: 5, TypeError, "wpe must be a device's array, got int"),
    ],
)
def test_bad_input(i, change, error, text):
    forward, backward = changed(i, change)
    with pytest.raises(error, match=f"encoder_forward: .*{text}"):
        encoder_forward(*forward)
    with pytest.raises(error, match=f"encoder_backward: .*{text}"):
        encoder_backward(*backward)


@pytest.mark.parametrize("version", [0, -1, 9, None, "2"])
def test_a_version_that_is_none(version):
    arrays = [simulated(x) for x in problem(1, 2, 3, 4)]
    inp, wte, wpe, dout = arrays
    with pytest.raises(ValueError, match="encoder_forward: version"):
        encoder_forward(dout, inp, wte, wpe, version=version)
    with pytest.raises(ValueError, match="encoder_backward: version"):
        encoder_backward(wte, wpe, dout, inp, version=version)
