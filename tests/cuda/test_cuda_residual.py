"""Residual, alone and fused with LayerNorm, on the GPU."""

import numpy as np
import pytest
from gpu import PLACES, check_layer, check_machine_code

from llmnb.cuda import residual as cuda
from llmnb.gpu.launch import DeviceArray, simulated, to_host
from llmnb.gpu.simulator import watch
from llmnb.reference import layernorm, residual

SHAPES = [(1,), (3,), (4,), (5,), (33,), (2, 3, 5), (7, 100), (1027,)]
VERSIONS = [1, 2]
FUSED = [1, 2, 3]
# channels: fewer than a warp, around it, and several turns of it
CHANNELS = [1, 3, 32, 33, 100, 128, 132, 260]


def draw(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def nans(shape):
    return np.full(shape, np.nan, np.float32)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(shape, version):
    arrays = {"out": nans(shape), "inp1": draw(shape), "inp2": draw(shape, 1)}
    check_layer(
        cuda.residual_forward,
        residual.residual_forward,
        arrays,
        ["out"],
        version=version,
    )


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(shape, version):
    names = "dinp1", "dinp2", "dout"
    check_layer(
        cuda.residual_backward,
        residual.residual_backward,
        {name: draw(shape, i) for i, name in enumerate(names)},
        ["dinp1", "dinp2"],
        version=version,
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_the_same_bits_as_numpy(version):
    a, b, d = (draw(1027, i) for i in range(3))
    for place in PLACES:
        x, y, z = place(a), place(b), place(d)
        cuda.residual_backward(x, y, z, version=version)
        np.testing.assert_array_equal(to_host(x), a + d)
        np.testing.assert_array_equal(to_host(y), b + d)
        with watch():  # out may be inp2
            cuda.residual_forward(z, place(a), z, version=version)
        np.testing.assert_array_equal(to_host(z), a + d)


def fused_reference(res, out, mean, rstd, inp1, inp2, weight, bias):
    residual.residual_forward(res, inp1, inp2)
    layernorm.layernorm_forward(out, mean, rstd, res, weight, bias)


def fused_arrays(B, T, C, shift=0.0):
    return {
        "residual": nans((B, T, C)),
        "out": nans((B, T, C)),
        "mean": nans((B, T)),
        "rstd": nans((B, T)),
        "inp1": draw((B, T, C)) + np.float32(shift),
        "inp2": draw((B, T, C), 1),
        "weight": draw(C, 2),
        "bias": draw(C, 3),
    }


def check_fused(version, *shape, **options):
    arrays = fused_arrays(*shape, **options)
    return check_layer(
        cuda.fused_residual_forward,
        fused_reference,
        arrays,
        list(arrays)[:4],
        tol=5e-6,
        version=version,
    )


@pytest.mark.parametrize("version", FUSED)
@pytest.mark.parametrize("C", CHANNELS)
def test_fused(C, version):
    check_fused(version, 1, 5, C)


@pytest.mark.parametrize("version", FUSED)
def test_fused_one_row_many_rows_and_an_offset(version):
    """Full and partial blocks; a mean that a one-pass variance would lose."""
    check_fused(version, 1, 1, 36)
    check_fused(version, 3, 11, 36)
    check_fused(version, 2, 3, 132, shift=30.0)


def kernels(seen):
    return [launch[0].__name__ for launch in seen.launches]


@pytest.mark.parametrize("C", [2048, 2052, 2051])
def test_long_rows(C):
    """Registers up to 2048 channels, two launches beyond."""
    seen = check_fused(3, 1, 1, C)
    if C == 2048:
        assert kernels(seen) == ["fused_fours"]
    else:
        assert len(kernels(seen)) == 2


def test_rows_that_vectors_do_not_fit_go_to_version_2():
    assert kernels(check_fused(3, 1, 2, 33)) == ["fused_elements"]
    assert kernels(check_fused(3, 1, 2, 36)) == ["fused_fours"]
    arrays = fused_arrays(1, 2, 36)
    want = {k: v.astype(np.float64) for k, v in arrays.items()}
    fused_reference(*want.values())
    for place in PLACES:
        there = {k: place(v) for k, v in arrays.items()}
        longer = np.concatenate([[0], arrays["weight"]]).astype(np.float32)
        there["weight"] = place(longer)[1:]
        with watch() as seen:
            cuda.fused_residual_forward(*there.values())
        np.testing.assert_allclose(
            to_host(there["out"]), want["out"], atol=5e-6
        )
        if place is simulated:
            assert kernels(seen) == ["fused_elements"]


@pytest.mark.parametrize("name", ["residual", "out", "inp2", "bias"])
def test_views_that_are_not_aligned(name):
    """Every version takes them, by the kernels without vectors."""
    arrays = fused_arrays(1, 3, 36)
    want = {k: v.astype(np.float64) for k, v in arrays.items()}
    fused_reference(*want.values())
    for place in PLACES:
        for version in FUSED:
            there = {k: place(v) for k, v in arrays.items()}
            x = arrays[name]
            longer = place(np.append(np.float32(0), x.ravel()))
            there[name] = longer[1:].reshape(x.shape)
            with watch():
                cuda.fused_residual_forward(*there.values(), version=version)
            for key in ("residual", "out", "mean", "rstd"):
                got = to_host(there[key])
                np.testing.assert_allclose(got, want[key], atol=5e-6)


def test_empty_arrays():
    """Nothing is launched, as on the CPU nothing is done."""
    for shape in ((0,), (2, 0), (0, 5)):
        x, y, z = (simulated(np.empty(shape, np.float32)) for _ in range(3))
        with watch() as seen:
            for version in VERSIONS:
                cuda.residual_forward(x, y, z, version=version)
                cuda.residual_backward(x, y, z, version=version)
        assert not seen.launches
    for version in FUSED:
        arrays = [simulated(v) for v in fused_arrays(0, 2, 8).values()]
        with watch() as seen:
            cuda.fused_residual_forward(*arrays, version=version)
        assert not seen.launches
        arrays = [simulated(v) for v in fused_arrays(1, 2, 0).values()]
        with pytest.raises(ValueError, match="must have channels, got"):
            cuda.fused_residual_forward(*arrays, version=version)
    scalar = DeviceArray(np.zeros((), np.float32))
    with pytest.raises(ValueError, match=r"must have shape \(C,\), got \(\)"):
        cuda.fused_residual_forward(*[scalar] * 8)


def test_the_same_bits_twice():
    """Of a row alone, and of the same row among others."""
    found = []
    for rows in (1, 9):
        arrays = fused_arrays(1, 9, 132)
        for name in ("residual", "out", "inp1", "inp2"):
            arrays[name] = arrays[name][:, :rows]
        for name in ("mean", "rstd"):
            arrays[name] = arrays[name][:, :rows]
        there = [simulated(v) for v in arrays.values()]
        cuda.fused_residual_forward(*there)
        found.append([to_host(x)[0, 0] for x in there[:4]])
    for one, two in zip(*found, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("version", FUSED)
def test_fused_in_place(version):
    """residual may be inp1 or inp2."""
    for name in ("inp1", "inp2"):
        arrays = fused_arrays(1, 5, 36)
        want = {k: v.astype(np.float64) for k, v in arrays.items()}
        fused_reference(*want.values())
        for place in PLACES:
            there = {k: place(v) for k, v in arrays.items()}
            there["residual"] = there[name]
            with watch():
                cuda.fused_residual_forward(*there.values(), version=version)
            for key in ("residual", "out", "mean", "rstd"):
                got = to_host(there[key])
                np.testing.assert_allclose(got, want[key], atol=5e-6)


def seen_by(run, *args, **options):
    with watch() as seen:
        run(*args, **options)
    return seen


def test_counts_of_the_text():
    """A quarter of the requests, the same sectors and bytes."""
    n = 2048 + 3
    x, y, d = (simulated(draw(n, i)) for i in range(3))
    for run, nbytes in (
        (cuda.residual_forward, 12),
        (cuda.residual_backward, 20),
    ):
        one, two = (seen_by(run, x, y, d, version=v) for v in VERSIONS)
        for seen in (one, two):
            assert seen.read_bytes + seen.written_bytes == nbytes * n
        assert one.sectors == two.sectors == nbytes // 4 * -(-n // 8)
        assert 3.8 < one.requests / two.requests <= 4


def test_counts_of_the_fused_text():
    """28 bytes an element unfused and 24 fused, 8 of them for the scale."""
    rows, C = 6, 256
    arrays = [simulated(x) for x in fused_arrays(2, 3, C).values()]
    one, two, three = (
        seen_by(cuda.fused_residual_forward, *arrays, version=v) for v in FUSED
    )
    assert [len(x.launches) for x in (one, two, three)] == [2, 1, 1]
    for seen, moved in ((one, 28), (two, 24), (three, 24)):
        found = seen.read_bytes + seen.written_bytes
        assert found == moved * rows * C + 8 * rows
        assert seen.sectors == moved * rows * C // 32 + 2 * rows
    stats = 2 * rows
    assert (two.requests - stats) == 4 * (three.requests - stats)
    assert three.requests < one.requests < two.requests
    assert three.barriers == three.shared_requests == three.atomics == 0


def launched(C, versions):
    arrays = fused_arrays(1, 2, C)
    with watch() as seen:
        for version in versions:
            there = [simulated(x) for x in arrays.values()]
            cuda.fused_residual_forward(*there, version=version)
    return seen


def test_machine_code():
    x, y, d = (simulated(draw(33, i)) for i in range(3))
    with watch() as seen:
        for version in VERSIONS:
            cuda.residual_forward(x, y, d, version=version)
            cuda.residual_backward(x, y, d, version=version)
    made = check_machine_code(seen)
    for name, loads, stores in (
        ("_add_elements", 0, 0),
        ("_add_fours", 2, 1),
        ("_add_back_elements", 0, 0),
        ("_add_back_fours", 3, 2),
    ):
        assert made[name].vector_loads == loads, name
        assert made[name].vector_stores == stores, name
        assert made[name].registers <= 40, name


@pytest.mark.parametrize("C", [768, 2048])
def test_rows_stay_in_registers(C):
    """No stack and no spills, up to the widest row that is allowed."""
    made = check_machine_code(launched(C, [2, 3]))
    turns = -(-C // 128)
    fours, elements = made["fused_fours"], made["fused_elements"]
    assert fours.vector_loads == 4 * turns
    assert fours.vector_stores == 2 * turns
    assert elements.vector_loads == 0
    assert fours.registers <= 128 and elements.registers <= 255
    assert fours.shared == elements.shared
    if C == 768:
        assert fours.registers < 0.6 * elements.registers


BAD = [
    (lambda a: a[:, :-1], ValueError, "must have shape"),
    (lambda a: a.astype(np.float64), TypeError, "must be float32"),
]


@pytest.mark.parametrize("spoil, error, message", BAD)
def test_arrays_that_do_not_fit_are_refused(spoil, error, message):
    x, y = simulated(draw((3, 4))), simulated(draw((3, 4), 1))
    bad = simulated(spoil(draw((3, 4))))
    for args in ((x, bad, y), (x, y, bad)):
        with pytest.raises(error, match=message):
            cuda.residual_forward(*args)
    for args in ((bad, x, y), (x, bad, y)):
        with pytest.raises(error, match=message):
            cuda.residual_backward(*args)


@pytest.mark.parametrize("name", fused_arrays(1, 2, 4))
def test_the_fused_layer_refuses_what_does_not_fit(name):
    arrays = {k: simulated(v) for k, v in fused_arrays(1, 2, 4).items()}
    good, wrong = (fused_arrays(1, n, n + 2)[name] for n in (2, 3))
    for bad, error in (
        (simulated(wrong), ValueError),
        (simulated(good.astype(np.float64)), TypeError),
        (good, TypeError),
    ):
        spoiled = arrays | {name: bad}
        with pytest.raises(error, match="fused_residual_forward: .* must"):
            cuda.fused_residual_forward(*spoiled.values())


def test_bad_arguments():
    x, y, z = (simulated(draw(8, i)) for i in range(3))
    for args in ((x, x, y), (x, y, x), (x, y, y), (x[:4], y[:4], x[2:6])):
        with pytest.raises(ValueError, match="must not share memory"):
            cuda.residual_backward(*args)
    cuda.residual_backward(x[:4], x[4:], y[:4])
    for version in (0, 3):
        with pytest.raises(ValueError, match="version must be in 1 to 2"):
            cuda.residual_forward(x, y, z, version=version)
        with pytest.raises(ValueError, match="version must be in 1 to 2"):
            cuda.residual_backward(x, y, z, version=version)
    arrays = [simulated(v) for v in fused_arrays(1, 2, 4).values()]
    with pytest.raises(ValueError, match="version must be in 1 to 3"):
        cuda.fused_residual_forward(*arrays, version=4)
