"""Every layer on a GPU: right, and wherever its arrays begin.

Those of GPT-2 are drawn from the ladders' table, the others from that of
tests/layers.py.
"""

import importlib

import gpu
import layers
import numpy as np
import pytest
from gpu import PLACES, both, draw, near, there
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import LAYERS, NAMED, problem

from llmnb import cuda, reference
from llmnb.bench.ladders import LADDERS, TINY, ladder_named
from llmnb.gpu.launch import simulated, to_host
from llmnb.gpu.simulator import watch

# exp is approximate on a GPU, and sums are as long as rows
TOLERANCE = {"attention": 1e-5, "layernorm": 1e-5, "crossentropy": 2e-5}
# B, T, C, NH, V: one of everything; odd ones; whole vectors; rows that are
# shorter than a warp, or longer; more positions than a tile or a vote has
SIZES = {
    "encoder": [
        (1, 1, 1), (2, 3, 5, 1, 4), (1, 7, 4, 1, 3), (3, 5, 32, 1, 9),
        (2, 2, 130, 1, 3), (1, 2, 516, 1, 2), (3, 23, 8, 1, 2),
        (2, 33, 3, 1, 40),
    ],
    "layernorm": [
        (1, 1, 3), (1, 5, 32), (3, 11, 33), (1, 2, 1), (2, 19, 4),
        (1, 5, 132),
    ],
    "attention": [
        (1, 1, 1), (2, 5, 1), (1, 17, 3), (1, 4, 10, 2), (1, 33, 8),
        (1, 2, 66), (1, 3, 4),
    ],
}  # fmt: skip
# a thread a number or a pair, no sums
LIGHT = [w for x in ("rotary", "swiglu", "geglu") for w in NAMED[x].ways]
OTHERS = {way: x for x in LAYERS if x.gpu for way in x.ways}
NAMES = [*(x.layer for x in LADDERS), *OTHERS]


def home(name):
    """The module that a layer stands in."""
    return getattr(cuda, name).__module__.rpartition(".")[2]


CASES = [
    pytest.param(x.layer, sizes, version, id=f"{x.layer}-{sizes}-{version}")
    for x in LADDERS
    for sizes in SIZES.get(home(x.layer), ())
    for version in range(1, 1 + len(x.versions))
]


@pytest.mark.parametrize(("name", "sizes", "version"), CASES)
def test_every_version_equals_the_reference(name, sizes, version):
    tolerance = TOLERANCE.get(home(name), 2e-6)
    gpu.check_ladder(name, draw(name, *sizes), version, tolerance)


@pytest.mark.parametrize(
    "layer", [x for x in LAYERS if x.gpu], ids=lambda x: x.name
)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_layers_equal_the_reference(layer, data):
    p = data.draw(layers.problems(layer.name, np.float32, gpu=True))
    tol = 1e-5 if "attention" in layer.name else 5e-6
    assert not any(seen.atomics for seen in gpu.check_problem(layer, p, tol))


def drawn(name, ladder_sizes, odd=False):
    """A layer, its arguments, and what it should leave, by name."""
    if name not in OTHERS:
        ladder, arrays = ladder_named(name), draw(name, *ladder_sizes)
        return ladder.function(0), arrays, ladder.expected(arrays)
    layer = OTHERS[name]
    even, options = layer.even
    sizes = dict.fromkeys(layer.most, 3) if odd else layer.sized(*even)
    p = problem(layer, np.float32, sizes, **options)
    arrays = dict(both(layer, p))[name]
    want = layers.copied(arrays, np.float64)
    getattr(reference, name)(**want)
    want = {k: want[k] for k in layer.written(name)}
    return getattr(cuda, name), arrays, want


SIZE = 1, 3, 8, 2, 61
SHIFTED = [
    pytest.param(name, array, id=f"{name}-{array}")
    for name in NAMES
    for array, value in drawn(name, SIZE)[1].items()
    if isinstance(value, np.ndarray) and array != "settings"
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("name", "array"), SHIFTED)
def test_an_array_may_begin_between_vectors(name, array, place):
    """Which `watch` refuses to read or write in fours there."""
    layer, arrays, expected = drawn(name, SIZE)
    given = there(arrays, place, **{array: lambda x: gpu.between(x, place)})
    with watch():
        layer(*given.values())
    for key, want in expected.items():
        near(given[key], want, 2e-5, key)


def bits(name, backwards):
    """What a layer leaves when its blocks run from the first, or the last."""
    layer, arrays, expected = drawn(name, (2, 19, 36, 1, 61))
    given, straight, step = there(arrays), np.ndindex, -1 if backwards else 1
    with pytest.MonkeyPatch.context() as patch:
        blocks = "llmnb.gpu.simulator.np.ndindex"
        patch.setattr(blocks, lambda size: [*straight(size)][::step])
        layer(*given.values())
    return [to_host(given[k]) for k in expected]


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_blocks_changes_no_bit(name):
    runs = zip(bits(name, False), bits(name, True), strict=True)
    assert all(np.array_equal(*pair) for pair in runs)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("layer, way, other", layers.IN_PLACE)
def test_in_place(layer, way, other, place):
    p = layers.arguments(way, layers.in_place(layer, way, np.float32))
    first, found = next(iter(p)), []
    for same in (False, True):
        given = there(p, place)
        if same:
            given[first] = given[other]
        getattr(cuda, way)(**given)
        found.append(to_host(given[first]))
    np.testing.assert_array_equal(*found)


BATCH = TINY._replace(B=3, T=7)
SCRATCH = {x.layer: x.work(BATCH) for x in LADDERS if x.work} | {
    "embedding_backward": cuda.encoder_scratch(21),
    "headnorm_backward": cuda.headnorm_scratch(21, 8),
    "local_attention_backward": cuda.attention_scratch(1, 7, 2),
    "rmsnorm_backward": cuda.rmsnorm_scratch(21, 36),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("name", "size"), SCRATCH.items())
def test_scratch_of_ones_own(name, size, place):
    """Exactly as many floats as are asked for do; one less is refused."""
    _, arrays, expected = drawn(name, BATCH)
    layer = getattr(cuda, name)
    work, given = place(np.full(size + 1, np.nan, "f4")), there(arrays, place)
    layer(*given.values(), work=work[:size])
    assert all(np.isfinite(to_host(given[x])).all() for x in expected)
    written = np.isfinite(to_host(work))
    assert written[:size].all() and not written[size]
    with pytest.raises(ValueError, match=f"{name}: work must hold {size} fl"):
        layer(*given.values(), work=work[: size - 1])


@pytest.mark.parametrize("C", [3, 4])
@pytest.mark.parametrize("rows", [3, 4, 5, 31, 32, 33, 50])
@pytest.mark.parametrize("name", ["layernorm", "rmsnorm"])
def test_every_row_is_counted_once(name, rows, C, monkeypatch):
    """The rows are cut into parts, here up to 8; none is lost."""
    module = importlib.import_module(f"llmnb.cuda.{name}")
    monkeypatch.setattr(module, "_parts", lambda n: min(8, -(-n // 4)))
    layer = NAMED[name]
    p = problem(layer, np.float32, layer.sized(1, rows, C))
    p |= {k: np.ones_like(x) for k, x in p.items() if np.ndim(x)}
    p["mean"] = 0 * p["rstd"]
    given = there(layers.arguments(layer.ways[1], p))
    getattr(cuda, layer.ways[1])(**given)
    for sums in {"dweight", "dbias"} & {*given}:
        np.testing.assert_array_equal(to_host(given[sums]), 1 + rows)


@pytest.mark.parametrize(
    ("scratch", "sums"),
    [(cuda.layernorm_scratch, 2), (cuda.rmsnorm_scratch, 1)],
)
def test_scratch_of_norms(scratch, sums):
    for shape, parts in (((1, 5), 1), ((9, 5), 3), ((1 << 20, 768), 512)):
        assert scratch(*shape) == parts * sums * shape[1]


PLAIN = [name for name in NAMES if home(name) in ("gelu", "residual")]


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize(
    "name", PLAIN + [name for name in OTHERS if "attention" not in name]
)
def test_machine_code(name, odd):
    layer, arrays, _ = drawn(name, SIZE, odd)
    with watch() as seen:
        layer(*there(arrays).values())
    registers = 64 if name in PLAIN + LIGHT else 255
    found = gpu.check_machine_code(seen, registers)
    if name in PLAIN or "glu" in name:
        (made,) = found.values()
        fours = name in PLAIN or not odd  # a plain one has fours and a rest
        assert (made.vector_loads > 0) is (made.vector_stores > 0) is fours


# arrays of 256 channels are 32 sectors of 32 bytes, which a warp asks for in
# 8 requests of a float a lane, or in 2 of four
NORM = {"eps": 1e-3, "offset": 1.0}
TABLE = 2 * 2 * 32 + 64  # zeros, and the sums of two parts; dweight
MOVED = [
    # inp once and out once; three arrays twice as wide on the way back
    ("swiglu", (1, 4, 256), {}, (4 * (64 + 32), 4 * (64 + 32 + 64))),
    ("geglu", (1, 4, 256), {}, (4 * (64 + 32), 4 * (64 + 32 + 64))),
    # x in and out, and a row of the table for each head that turns
    ("rotary", (1, 4, 32, 4, 2, 0), {}, (4 * 4 * (2 * 8 + 8),) * 2),
    # each number thrice, weight, out, rstd; on the way back inp, dout and
    # weight in both sweeps; dinp and the block's sums are read and written;
    # each of 8 warps reads rstd
    ("rmsnorm", (1, 8, 256), NORM | {"add": True},
     (8 * (4 * 32 + 1), 8 * (6 * 32 + 2 * 32 + 2 * 32 + 8) + TABLE)),
    ("rmsnorm", (1, 8, 256), NORM | {"add": False},
     (8 * (4 * 32 + 1), 8 * (6 * 32 + 32 + 2 * 32 + 8) + TABLE)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "sizes", "options", "moved"), MOVED)
def test_what_a_layer_moves(name, sizes, options, moved):
    """Sectors, in the requests of whole warps; each layer in one launch."""
    forward, back = gpu.check_row(name, *sizes, **options)
    assert (forward.sectors, back.sectors) == moved
    assert len(forward.launches) == 1 and forward.barriers == 0
    if "glu" in name:
        assert forward.requests == forward.sectors // 16
    if name == "rmsnorm":
        assert forward.requests == 8 * (4 * 8 + 1)
        assert forward.exchanges == 32 * 8 * 5
        assert len(back.launches) == 2


@pytest.mark.parametrize("C", [255, 256, 257, 1030])
def test_rows_longer_than_a_block(C):
    gpu.check_row("rmsnorm", 1, 2, C, **NORM, add=True)


REFUSING = "attention", "local_attention", "crossentropy", "fused_classifier"


def emptied(name):
    """Arguments with batches of no rows, and the names of those arrays."""
    _, arrays, _ = drawn(name, SIZE)
    row = getattr(cuda, name).arguments.arrays
    batched = {a.name for a in row if "B" in a.names or a.open}
    arrays = {k: x[:0] if k in batched else x for k, x in arrays.items()}
    return arrays, batched


@pytest.mark.parametrize("name", [x for x in NAMES if emptied(x)[1]])
def test_a_batch_of_no_rows_adds_nothing(name):
    """Or is refused, where a row must have a sum."""
    arrays, batched = emptied(name)
    layer, given = getattr(cuda, name), there(arrays, simulated)
    if name.startswith(REFUSING):
        with pytest.raises(ValueError, match="must not be (empty|0)"):
            layer(*given.values())
        return
    with watch():
        layer(*given.values())
    for key, x in arrays.items():
        if isinstance(x, np.ndarray) and key not in batched:
            np.testing.assert_array_equal(to_host(given[key]), x, key)
