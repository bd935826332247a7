"""The products on a GPU: results, bounds, races, counts, machine code."""

import re
from types import SimpleNamespace

import gpu
import numpy as np
import pytest
from gpu import check_linear, check_linear_back, check_machine_code, single

import llmnb.cuda.matmul as module
from llmnb.bench import rungs_matmul as rungs
from llmnb.cuda.matmul import Product, matmul_backward, matmul_forward
from llmnb.gpu.launch import empty, simulated, to_device, to_host
from llmnb.gpu.simulator import watch

FORWARD = *rungs.MATMUL_FORWARD, matmul_forward
BACKWARD = *rungs.MATMUL_BACKWARD, matmul_backward
PRODUCTS = rungs.thread_an_output, rungs.square_tiles
PRODUCTS += module.register_tiles, module.vectors
# B, T, C, OC: tiny, odd, by fours, more than a tile each way
SHAPES = [(1, 1, 1, 1), (1, 5, 7, 9), (2, 9, 9, 17), (2, 5, 12, 20)]
LAYOUTS = [(True, True), (True, False), (False, False)]
EACH_LAYOUT = pytest.mark.parametrize("along", LAYOUTS)
TILED = pytest.mark.parametrize("product", PRODUCTS[2:])


@pytest.mark.parametrize("version", range(4))
@pytest.mark.parametrize("shape", SHAPES)
def test_every_version_equals_the_reference(shape, version):
    forward, back = FORWARD[version], BACKWARD[version]
    ways = (True, False) if sum(shape) % 2 == 0 else (False, True)
    check_linear(forward, *shape, residual=ways[0])
    check_linear_back(back, *shape, add=ways)
    if shape in SHAPES[1::2]:
        few = *shape[:2], 4, 8
        check_linear(forward, *few, bias=False, residual=ways[1])
        check_linear_back(back, *few, bias=False, add=ways[::-1])


def product_of(multiply, rows, cols, steps, along, place=simulated):
    """What a product leaves, held against NumPy's."""
    a, b = single(rows, steps, seed=1), single(cols, steps, seed=2)
    shift, before = single(cols, seed=3), single(rows, cols, seed=4)
    out = empty((rows, cols), like=place(shift))
    factors = [
        place(x if way else x.T) for x, way in zip((a, b), along, strict=True)
    ]
    multiply(Product(out, *factors, *along, place(before), place(shift)))
    want = a.astype(np.float64) @ b.T + shift + before
    np.testing.assert_allclose(to_host(out), want, rtol=0, atol=1e-5)
    return to_host(out)


@EACH_LAYOUT
@TILED
def test_more_than_a_tile(product, along):
    """Edges of tiles of 64, several tiles both ways and along the sum."""
    with watch():
        product_of(product, 68, 72, 12, along)


@EACH_LAYOUT
@TILED
def test_large_tiles(product, along, monkeypatch):
    """Tiles of 128; watched on one that hangs over, run on several."""
    monkeypatch.setattr(module, "tile_size", lambda rows, cols: 128)
    with watch() as seen:
        product_of(product, 36, 76, 12, along)
    [(kernel, grid, block, _)] = seen.launches
    assert "_128_" in kernel.__name__
    assert (grid, block) == ((1, 1), 256)
    if along == LAYOUTS[0]:
        product_of(product, 132, 136, 4, along, to_device)


def test_the_size_of_a_tile():
    assert module.tile_size(256, 768) == 64
    assert module.tile_size(256, 50304) == 128
    assert module.tile_size(128 * 9, 128 * 12) == 128
    assert module.tile_size(128 * 9, 128 * 12 - 128) == 64


@EACH_LAYOUT
def test_versions_and_tiles_change_no_bit(along, monkeypatch):
    """Every output is summed over k in rising order."""
    results = []
    for size, products in ((64, PRODUCTS), (128, PRODUCTS[2:])):
        monkeypatch.setattr(module, "tile_size", lambda *_, n=size: n)
        results += [product_of(p, 8, 12, 12, along) for p in products]
    assert all(np.array_equal(results[0], got) for got in results)


def test_no_channels():
    """A sum of nothing is 0: the bias is left."""
    shapes = (1, 2, 4), (1, 2, 0), (4, 0), (0, 4)
    y, x, w, turned = (simulated(np.ones(s, "f4")) for s in shapes)
    b, dx, dw = simulated(np.full(4, 7, "f4")), *map(empty, shapes[1:3])
    matmul_forward(y, x, w, b)
    assert (to_host(y) == 7).all()
    matmul_backward(dx, dw, b, y, x, w)
    assert (to_host(b) == 7 + 2 * 7).all()
    matmul_forward(dx, y, turned, None)


def test_column_sums_of_many_rows():
    """In two chunks, and two blocks of columns."""
    check_linear_back(matmul_backward, 1, 65, 1, 132, add=(False, True))


# ---- what the chapter claims ----


# of a product's kernel: out, start, bias, a, b, and two flags
KINDS = *(("float32", n) for n in (2, 2, 1, 2, 2)), *2 * (("int64", 0),)


def machine_code(kernel):
    """Compile a kernel of a product for both generations."""
    check_machine_code(SimpleNamespace(launches=[(kernel, 1, 1, KINDS)]))
    return [gpu.compiled(kernel, KINDS, cc) for cc in gpu.GENERATIONS]


def found(pattern, made):
    return len(re.findall(pattern, made.ptx))


def steps(made):
    """How many steps of the sum it has, of 64 products each."""
    count, rest = divmod(found(r"fma\.rn\S*\.f32", made), 64)
    assert count > 0 and rest == 0
    return count


@pytest.mark.parametrize("tile", [64, 128])
@EACH_LAYOUT
def test_machine_code_of_vectors(tile, along):
    for made in machine_code(module._vector_kernel(tile, *along)):
        assert found(r"ld\.shared\.v4\.f32", made) == 4 * steps(made)
        assert found(r"ld\.shared\.f32", made) == 0
        loads = found(r"ld\.global\S*\.v4\.f32", made)
        assert loads == found(r"ld\.global\S*\.f32", made) > 0
        assert found(r"st\.global\S*\.v4\.f32", made) >= 16
        # two blocks of the large tile fit on a processor
        assert made.registers <= (128 if tile == 128 else 168)


@pytest.mark.parametrize(
    ("tile", "along"), [(128, LAYOUTS[0]), (64, LAYOUTS[2])]
)
def test_machine_code_of_scalars(tile, along):
    for made in machine_code(module.tile_kernel(tile, 8, 8, *along)):
        assert found(r"ld\.shared\.f32", made) == 16 * steps(made)


def test_machine_code_of_the_first_versions():
    machine_code(rungs._simple_kernel(*LAYOUTS[0]))
    machine_code(module.tile_kernel(16, 16, 1, *LAYOUTS[0]))


def test_the_column_sums_compile():
    seen = check_linear_back(matmul_backward, 1, 3, 4, 8, add=(False, False))
    assert len(seen.launches) == 4
    seen.launches[:] = seen.launches[2:]
    assert set(check_machine_code(seen)) == {"_sum_chunks", "add_chunks"}


def test_a_row_of_no_four_takes_scalars(monkeypatch):
    started = []
    monkeypatch.setattr(module, "launch", lambda *args: started.append(args))

    def name(rows, cols, steps, along, first=0):
        out, start = (simulated(single(rows, cols)) for _ in range(2))
        a = (rows, steps) if along[0] else (steps, rows)
        b = (cols, steps) if along[1] else (steps, cols)
        a = simulated(single(200))[first : first + rows * steps].reshape(a)
        b, bias = simulated(single(*b)), simulated(single(cols))
        module.vectors(Product(out, a, b, *along, start, bias))
        return started[-1][0].__name__

    both, one, none = LAYOUTS
    assert name(3, 8, 12, both) == "matmul_nt_64_vectors"
    assert name(3, 7, 12, both) == "matmul_nt_64_scalars_64"
    assert "scalars" in name(3, 8, 11, both)
    assert "scalars" in name(4, 8, 11, one)
    assert "vectors" in name(4, 8, 11, none)
    assert "scalars" in name(3, 8, 12, none)
    assert "scalars" in name(3, 8, 12, both, first=1)
    assert "vectors" in name(3, 8, 12, both, first=4)
