"""The products on a GPU: results, bounds, races, counts, machine code."""

import re

import numpy as np
import pytest
from gpu import GENERATIONS, check_layer, check_machine_code, compiled

import llmnb.cuda.matmul as module
from llmnb import reference
from llmnb.bench import rungs_matmul as rungs
from llmnb.cuda.matmul import (
    Product,
    matmul_backward,
    matmul_forward,
    matmul_scratch,
    register_tiles,
    vectors,
)
from llmnb.gpu.launch import empty, missing, simulated, to_device, to_host
from llmnb.gpu.simulator import watch

rng = np.random.default_rng(0)
FORWARD = *rungs.MATMUL_FORWARD, matmul_forward
BACKWARD = *rungs.MATMUL_BACKWARD, matmul_backward
PRODUCTS = rungs.thread_an_output, rungs.square_tiles, register_tiles, vectors
# B, T, C, OC: tiny, odd, by fours, more than a tile each way
SHAPES = [(1, 1, 1, 1), (1, 5, 7, 9), (2, 9, 9, 17), (2, 5, 12, 20)]
LAYOUTS = [(True, True), (True, False), (False, False)]


def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)


def poison(*shape):
    return np.full(shape, np.nan, np.float32)


def check_forward(B, T, C, OC, forward, bias, residual):
    arrays = {
        "out": poison(B, T, OC),
        "inp": normal(B, T, C),
        "weight": normal(OC, C),
        "bias": normal(OC) if bias else None,
        "residual": normal(B, T, OC) if residual else None,
    }
    return check_layer(forward, reference.matmul_forward, arrays, ["out"])


def check_backward(B, T, C, OC, backward, bias, add_dinp, add_dweight):
    grads = normal if add_dweight else poison
    arrays = {
        "dinp": (normal if add_dinp else poison)(B, T, C),
        "dweight": grads(OC, C),
        "dbias": grads(OC) if bias else None,
        "dout": normal(B, T, OC),
        "inp": normal(B, T, C),
        "weight": normal(OC, C),
        "add_dinp": add_dinp,
        "add_dweight": add_dweight,
    }
    writes = ["dinp", "dweight"] + ["dbias"] * bias
    return check_layer(backward, reference.matmul_backward, arrays, writes)


@pytest.mark.parametrize("version", range(4))
@pytest.mark.parametrize("shape", SHAPES)
def test_every_version_equals_the_reference(shape, version):
    both, add = (FORWARD[version], BACKWARD[version]), sum(shape) % 2 == 0
    check_forward(*shape, both[0], True, add)
    check_backward(*shape, both[1], True, add, not add)
    if shape in SHAPES[1::2]:
        check_forward(*shape[:2], 4, 8, both[0], False, not add)
        check_backward(*shape[:2], 4, 8, both[1], False, not add, add)


def product_of(multiply, rows, cols, steps, along, place=to_device):
    """A product's result, and NumPy's."""
    a, b = normal(rows, steps), normal(cols, steps)
    shift, before = normal(cols), normal(rows, cols)
    out = empty((rows, cols), like=place(shift))
    factors = [
        place(x if way else x.T) for x, way in zip((a, b), along, strict=True)
    ]
    multiply(Product(out, *factors, *along, place(before), place(shift)))
    want = a.astype(np.float64) @ b.T + shift + before
    return to_host(out), want


@pytest.mark.parametrize("along", LAYOUTS)
@pytest.mark.parametrize("product", PRODUCTS[2:])
def test_more_than_a_tile(product, along):
    """Edges of tiles of 64, several tiles both ways and along the sum."""
    with watch():
        got, want = product_of(product, 68, 72, 12, along, simulated)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("along", LAYOUTS)
@pytest.mark.parametrize("product", PRODUCTS[2:])
def test_large_tiles(product, along, monkeypatch):
    """Tiles of 128; watched on one that hangs over, run on several."""
    monkeypatch.setattr(module, "_tile_size", lambda rows, cols: 128)
    with watch() as seen:
        got, want = product_of(product, 36, 76, 12, along, simulated)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    [(kernel, grid, block, _)] = seen.launches
    assert "_128_" in kernel.__name__
    assert grid == (1, 1)
    assert block == 256
    if along == LAYOUTS[0]:
        got, want = product_of(product, 132, 136, 4, along)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_the_size_of_a_tile():
    assert module._tile_size(256, 768) == 64
    assert module._tile_size(256, 50304) == 128
    assert module._tile_size(128 * 9, 128 * 12) == 128
    assert module._tile_size(128 * 9, 128 * 12 - 128) == 64


@pytest.mark.parametrize("along", LAYOUTS)
def test_versions_and_tiles_change_no_bit(along, monkeypatch):
    """Every output is summed over k in rising order."""
    global rng
    results = []
    for product, size in [(p, 64) for p in PRODUCTS] + [
        (p, 128) for p in PRODUCTS[2:]
    ]:
        monkeypatch.setattr(module, "_tile_size", lambda *_, n=size: n)
        rng = np.random.default_rng(1)
        got, _ = product_of(product, 8, 12, 12, along, simulated)
        results.append(got)
    assert all(np.array_equal(results[0], got) for got in results)


def test_residual_may_be_out():
    x, w, b, r = normal(2, 3, 8), normal(12, 8), normal(12), normal(2, 3, 12)
    want = x @ w.T + b + r
    for forward in FORWARD:
        out = to_device(r)
        forward(out, *map(to_device, (x, w, b)), out)
        np.testing.assert_allclose(to_host(out), want, atol=1e-5)


def test_column_sums_of_many_rows_in_given_scratch():
    B, T, C, OC = 3, 43, 1, 132
    x, w, dy = normal(B, T, C), normal(OC, C), normal(B, T, OC)
    size = matmul_scratch(B * T, OC)
    assert size == 3 * OC
    work, db, start = empty(size + 1), normal(OC), None
    for add in (True, False):
        start = to_device(db)
        grads = to_device(x), to_device(w), start
        arrays = map(to_device, (dy, x, w))
        matmul_backward(*grads, *arrays, False, add, work=work)
        want = dy.astype(np.float64).sum((0, 1)) + add * db
        np.testing.assert_allclose(to_host(start), want, rtol=0, atol=1e-4)
    assert np.isfinite(to_host(work)[:-1]).all()
    if missing():  # what nobody wrote is poison
        assert np.isnan(to_host(work)[-1])


# ---- what the chapter claims ----


def seen_by(product, along=(True, True), rows=64, cols=64, steps=16):
    out, a, b = (
        simulated(np.ones(shape, np.float32))
        for shape in (
            (rows, cols),
            (rows, steps) if along[0] else (steps, rows),
            (cols, steps) if along[1] else (steps, cols),
        )
    )
    with watch() as seen:
        product(Product(out, a, b, *along))
    return seen


@pytest.fixture(scope="module")
def ladder():
    return [seen_by(product) for product in PRODUCTS]


def machine_code(kernel, seen):
    """Compile a kernel of the ladder's arguments for both generations."""
    seen.launches[:] = [(kernel, 1, 1, seen.launches[0][3])]
    check_machine_code(seen)
    return [compiled(kernel, seen.launches[0][3], cc) for cc in GENERATIONS]


def found(pattern, made):
    return len(re.findall(pattern, made.ptx))


@pytest.mark.parametrize("tile", [64, 128])
@pytest.mark.parametrize("along", LAYOUTS)
def test_machine_code_of_vectors(tile, along, ladder):
    for made in machine_code(module._vector_kernel(tile, *along), ladder[0]):
        steps, rest = divmod(found(r"fma\.rn\S*\.f32", made), 64)
        assert steps > 0
        assert rest == 0
        assert found(r"ld\.shared\.v4\.f32", made) == 4 * steps
        assert found(r"ld\.shared\.f32", made) == 0
        assert found(r"ld\.global\S*\.v4\.f32", made) > 0
        assert found(r"ld\.global\S*\.f32", made) == found(
            r"ld\.global\S*\.v4\.f32", made
        )
        assert found(r"st\.global\S*\.v4\.f32", made) >= 16
        # two blocks of the large tile fit on a processor
        assert made.registers <= (128 if tile == 128 else 168)


@pytest.mark.parametrize(
    ("tile", "along"), [(128, LAYOUTS[0]), (64, LAYOUTS[2])]
)
def test_machine_code_of_scalars(tile, along, ladder):
    kernel = module.tile_kernel(tile, 8, 8, *along)
    for made in machine_code(kernel, ladder[0]):
        steps, rest = divmod(found(r"fma\.rn\S*\.f32", made), 64)
        assert steps > 0
        assert rest == 0
        assert found(r"ld\.shared\.f32", made) == 16 * steps


def test_machine_code_of_the_first_versions(ladder):
    for kernel in (
        rungs._simple_kernel(*LAYOUTS[0]),
        module.tile_kernel(16, 16, 1, *LAYOUTS[0]),
    ):
        machine_code(kernel, ladder[0])


def test_the_column_sums_compile():
    seen = check_backward(1, 3, 4, 8, matmul_backward, True, False, False)
    assert len(seen.launches) == 4
    seen.launches[:] = seen.launches[2:]
    made = check_machine_code(seen)
    assert set(made) == {"_sum_chunks", "_add_chunks"}


def test_a_row_of_no_four_takes_scalars(monkeypatch):
    started = []
    monkeypatch.setattr(module, "launch", lambda *args: started.append(args))

    def name(rows, cols, steps, along, first=0):
        out, start = (simulated(normal(rows, cols)) for _ in range(2))
        a = (rows, steps) if along[0] else (steps, rows)
        b = (cols, steps) if along[1] else (steps, cols)
        a = simulated(normal(200))[first : first + rows * steps].reshape(a)
        b, bias = simulated(normal(*b)), simulated(normal(cols))
        vectors(Product(out, a, b, *along, start, bias))
        return started[-1][0].__name__

    assert name(3, 8, 12, along=(True, True)) == "matmul_nt_64_vectors"
    assert name(3, 7, 12, along=(True, True)) == "matmul_nt_64_scalars_64"
    assert "scalars" in name(3, 8, 11, along=(True, True))
    assert "scalars" in name(4, 8, 11, along=(True, False))
    assert "vectors" in name(4, 8, 11, along=(False, False))
    assert "scalars" in name(3, 8, 12, along=(False, False))
    assert "scalars" in name(3, 8, 12, along=(True, True), first=1)
    assert "vectors" in name(3, 8, 12, along=(True, True), first=4)
