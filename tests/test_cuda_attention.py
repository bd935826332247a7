"""Attention on a GPU: every version, simulated, and its machine code."""

import numpy as np
import pytest
from gpu import PLACES, check_layer, check_machine_code

from llmnb.cuda import attention as gpu
from llmnb.cuda.launch import simulated, to_host
from llmnb.cuda.simulator import watch
from llmnb.reference import attention as reference

FORWARD, BACKWARD = (1, 2, 3), (1, 2)
TOLERANCE = 1e-5  # exp is approximate on a GPU
# B, T, NH, hs: odd ones, a tile with one row to spare, several tiles
SHAPES = [
    (1, 1, 1, 1),
    (2, 5, 3, 1),
    (1, 17, 2, 3),
    (2, 9, 1, 5),
    (1, 33, 1, 8),
    (1, 7, 2, 16),
    (1, 70, 1, 4),
]
WIDE = [(1, 19, 1, 64), (1, 18, 1, 66), (1, 17, 1, 128)]


def problem(B, T, NH, hs, seed=0):
    rng = np.random.default_rng(seed)
    inp = rng.normal(size=(B, T, 3 * NH * hs)).astype(np.float32)
    dout = rng.normal(size=(B, T, NH * hs)).astype(np.float32)
    return inp, dout


def forward(version, shape):
    B, T, NH, _ = shape
    inp, dout = problem(*shape)
    arrays = {
        "out": np.full_like(dout, np.nan),
        "lse": np.full((B, NH, T), np.nan, np.float32),
        "inp": inp,
    }
    return check_layer(
        gpu.attention_forward,
        reference.attention_forward,
        arrays,
        ("out", "lse"),
        TOLERANCE,
        version=version,
    )


def backward_arrays(shape, add):
    B, T, NH, _ = shape
    inp, dout = problem(*shape)
    out, lse = np.empty_like(dout), np.empty((B, NH, T), np.float32)
    reference.attention_forward(out, lse, inp)
    return {
        "dinp": np.full_like(inp, 1 if add else np.nan),
        "dout": dout,
        "inp": inp,
        "out": out,
        "lse": lse,
        "add": add,
    }


def backward(version, shape, add=True):
    return check_layer(
        gpu.attention_backward,
        reference.attention_backward,
        backward_arrays(shape, add),
        ("dinp",),
        TOLERANCE,
        version=version,
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("version", FORWARD)
def test_forward(version, shape):
    forward(version, shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("version", BACKWARD)
def test_backward(version, shape):
    backward(version, shape, add=shape[1] % 2 == 1)


@pytest.mark.parametrize("shape", WIDE)
def test_wide_heads(shape):
    """Several tiles of a head, at the sizes whose tiles are smaller."""
    forward(2, shape)
    forward(3, shape)
    backward(2, shape)


@pytest.mark.parametrize("add", (True, False))
@pytest.mark.parametrize("version", BACKWARD)
def test_backward_adds_or_overwrites(version, add):
    for hs in (4, 5):
        backward(version, (1, 4, 2, hs), add)


def test_version_1_takes_any_head():
    forward(1, (1, 3, 1, 130))
    backward(1, (1, 3, 1, 130))


VECTORS = {
    "attention_forward_tiles": (16, 16),
    "attention_backward_keys": (24, 24),
    "attention_backward_queries": (16, 16),
}


@pytest.mark.parametrize("hs", (64, 5, 128))
def test_machine_code(hs):
    """No float64, spills or stack; 48 KB of shared memory at most."""
    shape, found = (1, 2, 1, hs), {}
    for version in FORWARD if hs == 64 else (2, 3):
        found |= check_machine_code(forward(version, shape))
    for version in BACKWARD if hs == 64 else (2,):
        found |= check_machine_code(backward(version, shape))
    for name, made in found.items():
        assert made.shared <= 48 * 1024 + 1024, name  # 1 KB is the system's
        if name in VECTORS:
            # shared memory takes four floats at once, and where rows are
            # aligned global memory does
            assert made.vector_loads > 8, name
            assert (made.vector_stores > 4) or hs == 5, name
            wide = "ld.global" in made.ptx and "ld.global.v4" in made.ptx
            assert wide == (hs % 4 == 0), name
        print(name, made[1:])


def counted(run, version, shape):
    with watch() as seen:
        run(version, shape)
    return seen


def test_counts_that_the_chapter_claims():
    shape = (1, 64, 1, 32)
    one, two, three = (forward(v, shape) for v in FORWARD)
    assert two.sectors < one.sectors / 4
    assert three.sectors < two.sectors
    assert three.shared_passes < two.shared_passes / 2
    assert three.shared_requests < two.shared_requests / 8


def test_shared_memory_has_few_conflicts():
    """A request of four floats a lane takes four passes and no more."""
    seen = forward(3, (1, 32, 1, 32))
    assert seen.shared_passes <= 4 * seen.shared_requests


def test_same_bits_on_every_run():
    shape = (1, 37, 2, 4)
    arrays = [x for x in backward_arrays(shape, True).values()][:-1]
    results = []
    for _ in range(2):
        there = [simulated(x) for x in arrays]
        gpu.attention_backward(*there)
        results.append(to_host(there[0]))
    assert np.array_equal(*results)


def test_large_scores_and_scores_that_grow():
    B, T, NH, hs = 1, 70, 1, 4
    inp, dout = problem(B, T, NH, hs)
    inp[..., :hs] = 20
    inp[..., hs : 2 * hs] = np.linspace(-50, 50, T)[:, None]
    want, lse = np.empty((B, T, hs)), np.empty((B, NH, T))
    reference.attention_forward(want, lse, inp.astype(np.float64))
    for version in FORWARD:
        there = [simulated(np.full_like(dout, np.nan))]
        there += [simulated(np.zeros((B, NH, T), np.float32))]
        gpu.attention_forward(*there, simulated(inp), version=version)
        np.testing.assert_allclose(to_host(there[0]), want, rtol=0, atol=2e-3)


def test_the_past_does_not_depend_on_the_future():
    inp, dout = problem(1, 40, 1, 4)
    for version in FORWARD:
        outs = []
        for shift in (0, 1):
            inp[:, 30:] += shift
            out, lse = simulated(dout), simulated(np.zeros((1, 1, 40), "f4"))
            gpu.attention_forward(out, lse, simulated(inp), version=version)
            outs.append(to_host(out))
        inp[:, 30:] -= 1
        assert np.array_equal(outs[0][:, :30], outs[1][:, :30])
        assert not np.array_equal(outs[0][:, 30:], outs[1][:, 30:])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("version", BACKWARD)
def test_scratch_of_ones_own(place, version):
    """Exactly attention_scratch() floats do; one less is refused."""
    shape = (1, 5, 2, 4)
    there = [
        place(x) if isinstance(x, np.ndarray) else x
        for x in backward_arrays(shape, True).values()
    ]
    n = gpu.attention_scratch(1, 5, 2, 1, version)
    assert n == (2 * 50 + 10 if version == 1 else 50)
    n = gpu.attention_scratch(1, 5, 2, 0, version)
    work = place(np.full(n, np.nan, np.float32))
    gpu.attention_backward(*there, work=work, version=version)
    assert np.isfinite(to_host(there[0])).all()
    with pytest.raises(ValueError, match=f"work must hold {n} floats"):
        gpu.attention_backward(*there, work=work[1:], version=version)
    out, lse = place(there[3].copy_to_host()), place(to_host(there[4]))
    with pytest.raises(ValueError, match="attention_forward: work must hold"):
        gpu.attention_forward(out, lse, there[2], work=work[:9], version=1)


def test_scratch_by_default_is_a_float_a_row():
    assert gpu.attention_scratch(16, 1024, 12) == 16 * 1024 * 12
    assert gpu.attention_scratch(16, 1024, 12, 1, 0) * 4 == 805_306_368
    assert gpu.attention_scratch(16, 1024, 12, 3, 0) == 0


def bad(name, x):
    arrays = backward_arrays((2, 5, 3, 4), True)
    there = {
        k: simulated(v) if isinstance(v, np.ndarray) else v
        for k, v in arrays.items()
    }
    there[name] = x(arrays[name])
    return there


BAD = [
    ("inp", lambda x: x, TypeError, "inp must be a device's array"),
    ("inp", lambda x: simulated(x[0]), ValueError, r"inp must be \(B, T, 3C"),
    ("inp", lambda x: simulated(x[..., 1:]), ValueError, r"\(B, T, 3C"),
    ("inp", lambda x: simulated(x[:0]), ValueError, r"\(B, T, 3C"),
    ("inp", lambda x: simulated(x.astype("f8")), TypeError, "inp must be fl"),
    ("out", lambda x: simulated(x[:, :4]), ValueError, "out must have shape"),
    ("out", lambda x: x, TypeError, "out must be a device's array"),
    ("lse", lambda x: simulated(x[0]), ValueError, r"shape \(B, NH, T\)"),
    ("lse", lambda x: None, ValueError, r"shape \(B, NH, T\)"),
    ("lse", lambda x: simulated(x[:, :0]), ValueError, "divides C = 12"),
    ("lse", lambda x: simulated(x[..., :4]), ValueError, "lse must have"),
    ("lse", lambda x: simulated(x.astype("f8")), TypeError, "lse must be fl"),
]
BAD_BACKWARD = [
    ("dinp", lambda x: simulated(x[:1]), ValueError, "dinp must have shape"),
    ("dinp", lambda x: x, TypeError, "dinp must be a device's array"),
    ("dout", lambda x: simulated(x[1:]), ValueError, "dout must have shape"),
    ("dout", lambda x: simulated(x.astype("f8")), TypeError, "dout must be f"),
]


@pytest.mark.parametrize("name, spoil, error, message", BAD)
def test_forward_refuses(name, spoil, error, message):
    a = bad(name, spoil)
    with pytest.raises(error, match=f"attention_forward: .*{message}"):
        gpu.attention_forward(a["out"], a["lse"], a["inp"])


@pytest.mark.parametrize("name, spoil, error, message", BAD + BAD_BACKWARD)
def test_backward_refuses(name, spoil, error, message):
    with pytest.raises(error, match=f"attention_backward: .*{message}"):
        gpu.attention_backward(*bad(name, spoil).values())


@pytest.mark.parametrize("version", (0, 4, None))
def test_versions_that_do_not_exist(version):
    a = bad("add", bool)
    with pytest.raises(ValueError, match="version must be 1 to 3"):
        gpu.attention_forward(a["out"], a["lse"], a["inp"], version=version)
    with pytest.raises(ValueError, match="version must be 1 to 2"):
        gpu.attention_backward(*a.values(), version=version)


def test_a_head_too_wide():
    arrays = backward_arrays((1, 2, 1, 132), True)
    there = [
        simulated(x) if isinstance(x, np.ndarray) else x
        for x in arrays.values()
    ]
    _, _, inp, out, lse, _ = there
    for version in (2, 3):
        with pytest.raises(ValueError, match="132 channels is too wide"):
            gpu.attention_forward(out, lse, inp, version=version)
    with pytest.raises(ValueError, match="132 channels is too wide"):
        gpu.attention_backward(*there)


@pytest.mark.parametrize("work", (np.zeros(99, "f4"), "none"))
def test_work_must_be_on_the_device(work):
    a = bad("add", bool)
    with pytest.raises(TypeError, match="work must be a device's array"):
        gpu.attention_backward(*a.values(), work=work)


def test_work_must_be_float32_and_flat():
    a = bad("add", bool)
    with pytest.raises(TypeError, match="work must be float32"):
        work = simulated(np.zeros(99))
        gpu.attention_backward(*a.values(), work=work)
    with pytest.raises(ValueError, match="work must have shape"):
        work = simulated(np.zeros((9, 11), np.float32))
        gpu.attention_backward(*a.values(), work=work)
