"""LayerNorm on a GPU: what it moves, what is refused."""

import re

import numpy as np
import pytest
from gpu import check_layer, check_machine_code

from llmnb import reference
from llmnb.bench.rungs_layernorm import forward_by_threads
from llmnb.cuda import layernorm
from llmnb.cuda.layernorm import (
    layernorm_backward,
    layernorm_forward,
    layernorm_scratch,
)
from llmnb.gpu.launch import empty, simulated, to_host
from llmnb.gpu.simulator import watch

SHAPES = [(1, 1, 3), (1, 5, 32), (3, 11, 33), (1, 2, 1), (2, 19, 4)]
SHAPES += [(1, 5, 132)]


def problem(B, T, C, seed=0):
    rng = np.random.default_rng(seed)
    shapes = dict.fromkeys(("inp", "dout", "dinp"), (B, T, C))
    shapes |= dict.fromkeys(("weight", "bias", "dweight", "dbias"), (C,))
    p = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    p["inp"] = p["inp"] * 3 + 1
    for k, shape in {"out": (B, T, C), "mean": (B, T), "rstd": (B, T)}.items():
        p[k] = np.full(shape, np.nan, np.float32)
    return p


def forward_arrays(p):
    names = "out", "mean", "rstd", "inp", "weight", "bias"
    return {k: p[k] for k in names}


def backward_arrays(p):
    reference.layernorm_forward(*forward_arrays(p).values())
    names = "dinp", "dweight", "dbias", "dout", "inp", "weight"
    return {k: p[k] for k in (*names, "mean", "rstd")}


def forward(shape, tol=5e-6, layer=layernorm_forward):
    return check_layer(
        layer,
        reference.layernorm_forward,
        forward_arrays(problem(*shape)),
        ("out", "mean", "rstd"),
        tol=tol,
    )


def backward(shape, work=None, tol=1e-5):
    return check_layer(
        layernorm_backward,
        reference.layernorm_backward,
        backward_arrays(problem(*shape)),
        ("dinp", "dweight", "dbias"),
        tol=tol,
        work=work,
    )


@pytest.mark.parametrize("layer", (forward_by_threads, layernorm_forward))
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(layer, shape):
    forward(shape, layer=layer)


@pytest.mark.parametrize("shape", SHAPES)
def test_backward(shape):
    backward(shape)


def names(seen):
    return [launch[0].__name__ for launch in seen.launches]


def scalar_accesses(made):
    """How many instructions load or store one float in global memory."""
    return len(
        re.findall(r"(?:ld|st)\.global(?:\.(?!v4)\w+)*\.[fb]32", made.ptx)
    )


def test_machine_code_forward():
    """Vectors, but for a row's mean and rstd."""
    (made,) = check_machine_code(forward((1, 1, 132))).values()
    assert made.vector_loads and made.vector_stores
    assert scalar_accesses(made) == 2


def test_machine_code_of_rows_that_vectors_do_not_fit():
    (made,) = check_machine_code(forward((1, 1, 133))).values()
    assert made.vector_loads == made.vector_stores == 0
    check_machine_code(backward((1, 1, 133)))


def test_machine_code_backward():
    made = check_machine_code(backward((1, 1, 132)))
    block = made["_backward_block"]
    assert (block.vector_loads, block.vector_stores) == (4, 3)


@pytest.mark.parametrize(
    ("C", "kernel"),
    [(256, "forward_kept"), (260, "_forward_warp"), (257, "_forward_warp")],
)
def test_long_rows_forward(C, kernel, monkeypatch):
    """Here rows of up to 256 channels are kept; the rest falls back."""
    monkeypatch.setattr(layernorm, "MOST_KEPT", 256)
    assert names(forward((1, 1, C))) == [kernel]


@pytest.mark.parametrize(
    ("C", "kernel"),
    [
        (256, "_backward_block"),
        (260, "_backward_rows"),
        (133, "_backward_rows"),
    ],
)
def test_long_rows_backward(C, kernel, monkeypatch):
    monkeypatch.setattr(layernorm, "MOST_THREADS", 64)
    assert names(backward((1, 1, C)))[0] == kernel


def test_the_longest_rows():
    """What is kept fits in 48 KB, and a block in its launch bounds."""
    assert names(forward((1, 1, 3072))) == ["forward_kept"]
    seen = backward((1, 1, 2048))
    assert names(seen)[0] == "_backward_block"
    assert seen.launches[0][2] == 512
    assert layernorm.KEPT_ROWS * layernorm.MOST_KEPT * 4 == 48 << 10


def elsewhere(array):
    """A copy on the simulated device, four bytes off the 16."""
    flat = simulated(np.full(array.size + 1, np.nan, np.float32))
    flat[1:].copy_to_device(array.reshape(-1))
    return flat[1:].reshape(*array.shape)


@pytest.mark.parametrize("name", ["out", "inp", "weight", "bias"])
def test_rows_that_begin_elsewhere_forward(name):
    p = forward_arrays(problem(1, 3, 8))
    there = {k: simulated(v) for k, v in p.items()}
    there[name] = elsewhere(p[name])
    with watch() as seen:
        layernorm_forward(*there.values())
    assert names(seen) == ["_forward_warp"]
    reference.layernorm_forward(*p.values())
    np.testing.assert_allclose(to_host(there["out"]), p["out"], atol=1e-5)


@pytest.mark.parametrize("name", ["dinp", "dout", "inp", "weight", "work"])
def test_rows_that_begin_elsewhere_backward(name):
    p = backward_arrays(problem(1, 3, 8))
    p["work"] = np.full(16, np.nan, np.float32)
    there = {k: simulated(v) for k, v in p.items()}
    there[name] = elsewhere(p[name])
    with watch() as seen:
        layernorm_backward(**there)
    assert names(seen)[0] == "_backward_rows"
    p.pop("work")
    reference.layernorm_backward(*p.values())
    for k in ("dinp", "dweight", "dbias"):
        np.testing.assert_allclose(to_host(there[k]), p[k], atol=1e-5)


def bits(backwards):
    """The gradients, with the blocks run from the last to the first or not."""
    there = [
        simulated(v) for v in backward_arrays(problem(2, 19, 36)).values()
    ]
    straight = np.ndindex
    with pytest.MonkeyPatch.context() as patch:
        if backwards:
            turned = lambda size: reversed([*straight(size)])  # noqa: E731
            patch.setattr("llmnb.gpu.simulator.np.ndindex", turned)
        layernorm_backward(*there)
    return [to_host(x) for x in there[:3]]


def test_the_order_of_blocks_changes_no_bit():
    assert all(map(np.array_equal, bits(False), bits(True)))


def test_what_forward_moves():
    """An array of 256 channels is 32 sectors, asked for in 2 requests."""
    rows = 8
    plain = forward((1, rows, 256), layer=forward_by_threads)
    kept = forward((1, rows, 256))
    # each thread of the plain version asks for a sector of its own
    assert plain.sectors == 4 * 256 * rows + 2 * 256 + 2
    assert kept.sectors == rows * (4 * 32 + 2)
    assert plain.requests == 6 * 256 + 2
    assert kept.requests == rows * (4 * 2 + 2)
    assert plain.barriers == kept.barriers == 0
    # no bank conflicts: a vector takes four passes
    assert kept.shared_passes == 4 * kept.shared_requests
    assert kept.read_bytes == rows * 1024 * 3  # inp once, weight and bias
    # five steps for each of two sums
    assert (plain.exchanges, kept.exchanges) == (0, 32 * rows * 10)


def test_what_backward_moves():
    rows, parts = 8, 2
    seen = backward((1, rows, 256))
    table = parts * 2 * 64 + 128  # written and read; dweight and dbias
    weight = parts * 32  # once a part
    assert seen.sectors == rows * (4 * 32 + 4) + weight + table
    assert seen.atomics == 0 and len(seen.launches) == 2
    assert seen.exchanges == rows * 64 * 20


@pytest.mark.parametrize("rows", [3, 4, 5, 31, 32, 33, 50])
def test_every_row_is_counted_once(monkeypatch, rows):
    """The rows are cut into parts, here up to 8; none is lost."""
    monkeypatch.setattr(layernorm, "_parts", lambda n: min(8, -(-n // 4)))
    ones = np.ones((1, rows, 4), np.float32)
    sums = [simulated(np.zeros(4, np.float32)) for _ in range(2)]
    flat = [simulated(np.zeros((1, rows), np.float32)) for _ in range(2)]
    weight = simulated(np.ones(4, np.float32))
    dinp, dout, inp = (simulated(ones) for _ in range(3))
    layernorm_backward(dinp, *sums, dout, inp, weight, *flat)
    np.testing.assert_array_equal(to_host(sums[0]), 0)
    np.testing.assert_array_equal(to_host(sums[1]), rows)


def test_scratch():
    assert layernorm_scratch(1, 5) == 10
    assert layernorm_scratch(9, 5) == 3 * 10
    assert layernorm_scratch(1 << 20, 768) == 512 * 2 * 768


def test_work_of_any_size_that_holds_the_sums():
    """Larger memory is left alone beyond what was asked for."""
    p = backward_arrays(problem(2, 5, 36))
    there = {k: simulated(v) for k, v in p.items()}
    need = layernorm_scratch(10, 36)
    work = empty(need + 7, like=there["inp"])
    layernorm_backward(*there.values(), work=work)
    left = np.isnan(to_host(work))
    assert left[need:].all() and not left[:need].any()


def test_a_constant_row_is_finite():
    p = problem(1, 2, 16)
    p["inp"][...] = 3
    there = [simulated(v) for v in forward_arrays(p).values()]
    layernorm_forward(*there)
    np.testing.assert_allclose(to_host(there[0])[0, 0], p["bias"], atol=1e-5)


def test_a_large_mean_loses_no_digits():
    """The variance is summed from distances, never from squares."""
    p = problem(1, 2, 64)
    signs = np.random.default_rng(0).choice([-1, 1], p["inp"].shape)
    p["inp"][...] = 10_000 + signs
    want = 1 / p["inp"].std(axis=-1, dtype=np.float64)
    for layer in (forward_by_threads, layernorm_forward):
        there = [simulated(v) for v in forward_arrays(p).values()]
        layer(*there)
        np.testing.assert_allclose(to_host(there[2]), want, rtol=1e-4)


def zeros(*shape, dtype=np.float32):
    return simulated(np.zeros(shape, dtype))


BAD = [
    ("out", zeros(2, 3, 5), ValueError, "out must have shape"),
    ("out", zeros(2, 3, 4, dtype=np.float64), TypeError, "out must be float"),
    ("out", np.zeros((2, 3, 4), np.float32), TypeError, "a device's array"),
    ("mean", zeros(3, 2), ValueError, "mean must have shape"),
    ("rstd", zeros(6), ValueError, "rstd must have shape"),
    ("weight", zeros(5), ValueError, r"weight must have shape \(4,\)"),
    ("bias", zeros(1, 4), ValueError, "bias must have shape"),
    ("inp", zeros(6, 4), ValueError, r"\(B, T, C\)"),
    ("inp", [[1.0]], TypeError, "inp must be a device's array"),
]
BAD_BACKWARD = [
    ("dinp", zeros(2, 4, 3), ValueError, "dinp must have shape"),
    ("dout", zeros(2, 3, 4, dtype=np.int32), TypeError, "dout must be float"),
    ("dweight", zeros(5), ValueError, "dweight must have shape"),
    ("dbias", zeros(5), ValueError, "dbias must have shape"),
    ("work", zeros(15), ValueError, "work must hold 16 floats, got 15"),
    ("work", zeros(4, 4), ValueError, r"work must have shape \(W,\)"),
    ("work", np.zeros(16, np.float32), TypeError, "work must be a device's"),
    ("work", zeros(16, dtype=np.int32), TypeError, "work must be float32"),
]


@pytest.mark.parametrize(
    ("layer", "arrays", "name", "bad", "error", "says"),
    [(layernorm_forward, forward_arrays, *case) for case in BAD]
    + [(layernorm_backward, backward_arrays, *case) for case in BAD_BACKWARD],
)
def test_what_does_not_fit_is_refused(layer, arrays, name, bad, error, says):
    p = {k: simulated(v) for k, v in arrays(problem(2, 3, 4)).items()}
    p[name] = bad
    with watch() as seen, pytest.raises(error, match=says):
        layer(**p)
    assert not seen.launches
