"""Every layer on a GPU, from the ladders' table: right wherever it begins."""

import numpy as np
import pytest
from gpu import PLACES, between, check_ladder, draw, there

from llmnb import cuda
from llmnb.bench.ladders import LADDERS, TINY, ladder_named
from llmnb.gpu.launch import to_host
from llmnb.gpu.simulator import watch

# exp is approximate on a GPU, and sums are as long as rows
TOLERANCE = {"attention": 1e-5, "layernorm": 1e-5, "crossentropy": 2e-5}
# B, T, C, NH, V: one of everything; odd ones; whole vectors; rows that are
# shorter than a warp, or longer; more positions than a tile or a vote has
SIZES = {
    "encoder": [
        (1, 1, 1),
        (2, 3, 5, 1, 4),
        (1, 7, 4, 1, 3),
        (3, 5, 32, 1, 9),
        (2, 2, 130, 1, 3),
        (1, 2, 516, 1, 2),
        (3, 23, 8, 1, 2),
        (2, 33, 3, 1, 40),
    ],
    "layernorm": [
        (1, 1, 3),
        (1, 5, 32),
        (3, 11, 33),
        (1, 2, 1),
        (2, 19, 4),
        (1, 5, 132),
    ],
    "attention": [
        (1, 1, 1),
        (2, 5, 1),
        (1, 17, 3),
        (1, 4, 10, 2),
        (1, 33, 8),
        (1, 2, 66),
        (1, 3, 4),
    ],
}
NAMES = [x.layer for x in LADDERS]


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
    check_ladder(name, draw(name, *sizes), version, tolerance)


SHIFTED = [
    pytest.param(x.layer, array, id=f"{x.layer}-{array}")
    for x in LADDERS
    for array, value in x.draw(TINY).items()
    if isinstance(value, np.ndarray) and array != "settings"
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("name", "array"), SHIFTED)
def test_an_array_may_begin_between_vectors(name, array, place):
    """Which `watch` refuses to read or write in fours there."""
    ladder = ladder_named(name)
    arrays = draw(name, 1, 3, 8, 2, 61)
    given = there(arrays, place, **{array: lambda x: between(x, place)})
    with watch():
        ladder.function(0)(*given.values())
    for key, want in ladder.expected(arrays).items():
        scale = max(1, np.abs(want).max())
        error = np.abs(to_host(given[key]) - want).max()
        assert error < 2e-5 * scale, key


def bits(name, backwards):
    """What a layer leaves when its blocks run from the first, or the last."""
    ladder, given = ladder_named(name), there(draw(name, 2, 19, 36, 1, 61))
    straight = np.ndindex
    with pytest.MonkeyPatch.context() as patch:
        if backwards:
            turned = lambda size: reversed([*straight(size)])  # noqa: E731
            patch.setattr("llmnb.gpu.simulator.np.ndindex", turned)
        ladder.function(0)(*given.values())
    return [to_host(given[k]) for k in ladder.results]


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_blocks_changes_no_bit(name):
    runs = zip(bits(name, False), bits(name, True), strict=True)
    assert all(np.array_equal(*pair) for pair in runs)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", [x.layer for x in LADDERS if x.work])
def test_scratch_of_ones_own(name, place):
    """Exactly as many floats as are asked for do; one less is refused."""
    sizes, layer = TINY._replace(B=3, T=7), getattr(cuda, name)
    size = ladder_named(name).work(sizes)
    arrays = ladder_named(name).draw(sizes)
    work, given = place(np.full(size + 1, np.nan, "f4")), there(arrays, place)
    layer(*given.values(), work=work[:size])
    assert all(np.isfinite(to_host(x)).all() for x in given.values())
    written = np.isfinite(to_host(work))
    assert written[:size].all() and not written[size]
    with pytest.raises(ValueError, match=f"{name}: work must hold {size} fl"):
        layer(*given.values(), work=work[: size - 1])
