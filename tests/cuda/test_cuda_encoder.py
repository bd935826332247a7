"""The encoder on a GPU: every version, races, machine code, bad input."""

import gpu
import numpy as np
import pytest

from llmnb.bench.rungs_encoder import ENCODER_BACKWARD, ENCODER_FORWARD
from llmnb.cpu import encoder as cpu
from llmnb.cuda.encoder import encoder_backward, encoder_forward
from llmnb.gpu.launch import simulated, to_host
from llmnb.gpu.simulator import watch
from llmnb.reference import encoder as reference

FORWARD = (*ENCODER_FORWARD, encoder_forward)
BACKWARD = (*ENCODER_BACKWARD, encoder_backward)
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


def arguments(*shape):
    """Of forward and of backward: an output of NaN, gradients to add to."""
    inp, wte, wpe, dout = problem(*shape)
    out = np.full_like(dout, np.nan)
    forward = {"out": out, "inp": inp, "wte": wte, "wpe": wpe}
    return forward, {"dwte": wte, "dwpe": wpe, "dout": dout, "inp": inp}


@pytest.mark.parametrize("layer", FORWARD)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(shape, layer):
    arrays, _ = arguments(*shape)
    seen = gpu.check_layer(layer, reference.encoder_forward, arrays, ["out"])
    (made,) = gpu.check_machine_code(seen).values()
    wide = layer is encoder_forward and shape[2] % 4 == 0
    assert (made.vector_loads, made.vector_stores) == (2 * wide, wide)


@pytest.mark.parametrize("layer", BACKWARD)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(shape, layer):
    _, arrays = arguments(*shape)
    writes = ["dwte", "dwpe"]
    run = reference.encoder_backward
    seen = gpu.check_layer(layer, run, arrays, writes)
    found = gpu.check_machine_code(seen)
    atomic = layer is BACKWARD[0]
    assert len(found) == (1 if atomic else 2)
    assert (seen.atomics > 0) is atomic
    assert seen.barriers == 0
    for made in found.values():
        wide = layer is encoder_backward and shape[2] % 4 == 0
        assert (made.vector_loads > 0) is (made.vector_stores > 0) is wide


@pytest.mark.parametrize("layer", BACKWARD)
def test_repeats_add_up_and_absent_rows_stay_even_as_nan(layer):
    inp = np.array([[2, 0, 2], [2, 0, 2]], np.int32)
    dwte, dwpe = np.full((4, 36), 7, "f4"), np.full((5, 36), 7, "f4")
    dwte[[1, 3]] = np.nan
    there = simulated(dwte), simulated(dwpe)
    layer(*there, simulated(np.ones((2, 3, 36), "f4")), simulated(inp))
    got, positions = map(to_host, there)
    assert (got[0] == 9).all() and (got[2] == 11).all()
    assert np.isnan(got[[1, 3]]).all()
    assert (positions == np.array([[9], [9], [9], [7], [7]])).all()


@pytest.mark.parametrize("layer", BACKWARD[1:])
def test_the_order_is_that_of_the_text(layer):
    """The bits are those of the CPU's one thread."""
    inp, dwte, dwpe, dout = problem(4, 20, 8, 3)
    there = [simulated(x) for x in (dwte, dwpe, dout, inp)]
    layer(*there)
    cpu.encoder_backward(dwte, dwpe, dout, inp)
    assert np.array_equal(to_host(there[0]), dwte)
    assert np.array_equal(to_host(there[1]), dwpe)


def unaligned(array):
    """A device's array that begins 4 bytes after a multiple of 16."""
    flat = simulated(np.concatenate([[0], array.ravel()]).astype(array.dtype))
    return flat[1:].reshape(array.shape)


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("layer", [encoder_forward, encoder_backward])
def test_arrays_that_begin_anywhere(layer, place):
    forward, backward = arguments(2, 3, 8, 5)
    both = (forward, cpu.encoder_forward), (backward, cpu.encoder_backward)
    arrays, on_cpu = both[layer is encoder_backward]
    arrays = list(arrays.values())
    there = [
        (unaligned if i == place else simulated)(a)
        for i, a in enumerate(arrays)
    ]
    with watch():
        layer(*there)
    on_cpu(*arrays)
    for got, want in zip(there, arrays, strict=True):
        assert np.array_equal(to_host(got), want)


# what the chapter says it counts


def counted(layer, arrays):
    with watch() as seen:
        layer(*(simulated(a) for a in arrays.values()))
    return seen


def test_what_vectors_buy_in_the_forward_pass():
    arrays, _ = arguments(2, 8, 128, 5)
    one, four = (counted(layer, arrays) for layer in FORWARD)
    assert one.threads == 4 * four.threads
    assert one.requests == 4 * four.requests
    assert one.written_bytes == four.written_bytes
    # the rows as before; the token once for a warp of 128 channels, not four
    rows = 3 * 2 * 8 * 128 * 4 // 32
    assert (one.sectors, four.sectors) == (rows + 64, rows + 16)


def test_what_votes_buy_in_the_backward_pass():
    _, arrays = arguments(1, 32, 128, 20)
    _, one, four = (counted(layer, arrays) for layer in BACKWARD)
    assert four.requests < one.requests / 10
    assert four.sectors < one.sectors * 0.6


@pytest.mark.parametrize(
    "name, change, error, text",
    [
        ("out", to_host, TypeError, "out must be a device's array, got nd"),
        ("inp", lambda x: x.view("f4"), TypeError, "inp must be int32"),
        ("wte", lambda x: x.reshape(4, 5), ValueError, r"have shape \(4, 4\)"),
        ("wpe", lambda x: x[:2], ValueError, "T must be at most 2, .* got 3"),
    ],
)
def test_bad_input(name, change, error, text):
    for layer, arrays in zip(
        (encoder_forward, encoder_backward),
        arguments(2, 3, 4, 5),
        strict=True,
    ):
        there = {k: simulated(a) for k, a in arrays.items()}
        name = next(k for k in there if k.endswith(name))
        there[name] = change(there[name])
        with pytest.raises(error, match=f"{layer.__name__}: .*{text}"):
            layer(*there.values())
