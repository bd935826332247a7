"""Attention by other rules on a GPU: its tiles, what it leaves out."""

import numpy as np
import pytest
from gpu import both, check_machine_code, check_row, there
from layers import NAMED, problem

from llmnb import cuda, reference
from llmnb.gpu.launch import to_host
from llmnb.gpu.simulator import watch

LAYER = NAMED["local_attention"]
FORWARD, BACKWARD = LAYER.ways


def draw(*shape, window=None, scale=None, softcap=None):
    """The arguments of each pass, by its name."""
    rule = {"window": window, "scale": scale, "softcap": softcap}
    sizes = LAYER.sized(*shape)
    return dict(both(LAYER, problem(LAYER, np.float32, sizes, **rule)))


def results(shape, **rule):
    """What the GPU leaves, unwatched, and what is right."""
    found, want = [], []
    for way, arrays in draw(*shape, **rule).items():
        given = there(arrays)
        getattr(cuda, way)(*given.values())
        getattr(reference, way)(**arrays)
        written = LAYER.written(way)
        found += [to_host(given[name]) for name in written]
        want += [arrays[name] for name in written]
    return found, want


@pytest.mark.parametrize("window", [1, 20, 65])
def test_windows_over_several_tiles(window):
    """Rows that meet tiles of unseen keys before their first one."""
    check_row("local_attention", 1, 70, 1, 1, 4, window=window, softcap=2.0)


@pytest.mark.parametrize("hs", [64, 66, 128, 130, 256])
def test_wide_heads(hs):
    """More than 64 channels take smaller tiles, and so do more than 128."""
    shape = 1, 33 if hs <= 64 else 17, 1, 1, hs
    for got, want in zip(*results(shape, window=5, softcap=9.0), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=5e-5)


def test_without_a_rule_it_is_gpt2s_attention():
    """To the last bit, and with a window that all positions fit in."""
    shape, found = (1, 20, 2, 1, 8), [[]]
    for way, arrays in draw(*shape).items():
        given = {k: x for k, x in arrays.items() if isinstance(x, np.ndarray)}
        given = there(given)
        getattr(cuda, way.removeprefix("local_"))(*given.values())
        found[0] += [to_host(given[name]) for name in LAYER.written(way)]
    for rule in ({}, {"window": 20}, {"scale": 8**-0.5}):
        found.append(results(shape, **rule)[0])
    for same in zip(*found, strict=True):
        assert all(np.array_equal(same[0], x) for x in same)


def test_what_lies_before_the_window_is_not_read():
    """Not a number there, in whole tiles, and none in the last outputs."""
    arrays = draw(1, 100, 1, 1, 4, window=4)[FORWARD]
    found = []
    for value in (None, np.nan):
        if value is not None:
            arrays["inp"][:, :32] = value
        given = there(arrays)
        cuda.local_attention_forward(*given.values())
        found.append(to_host(given["out"])[:, 96:])
    np.testing.assert_array_equal(*found)


def barriers(T, window):
    seen = check_row("local_attention", 1, T, 1, 1, 4, window=window)
    return [x.barriers for x in seen]


def test_tiles_outside_the_window_are_left_out():
    """Two barriers a tile of all threads: those of a block, 128 or 64."""
    everything, near = barriers(130, None), barriers(130, 32)
    forward, backward = (2 + 4 + 5) - (2 + 3 + 2), 2 * (15 - 9)
    left_out = [x - y for x, y in zip(everything, near, strict=True)]
    assert left_out == [2 * 128 * forward, 2 * 64 * backward]


@pytest.mark.parametrize(("hs", "cc"), [(6, (8, 0)), (256, (9, 0))])
def test_machine_code_of_attention(monkeypatch, hs, cc):
    monkeypatch.setattr("gpu.GENERATIONS", [cc])
    monkeypatch.setattr("llmnb.gpu.launch.simulate", lambda *args: None)
    with watch() as seen:
        for way, x in draw(1, 2, 1, 1, hs, window=1, softcap=50.0).items():
            getattr(cuda, way)(*there(x).values())
    found = check_machine_code(seen)
    assert len(found) == 4
    for name, made in found.items():
        if not name.startswith("_"):
            assert ("ld.global.v4" in made.ptx) == (hs % 4 == 0), name


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_of_nothing(window):
    for way, arrays in draw(1, 3, 1, 1, 4, window=1).items():
        with pytest.raises(ValueError, match="window must be None or a pos"):
            getattr(cuda, way)(**there(arrays) | {"window": window})


# norms of heads


def test_more_rows_than_warps(monkeypatch):
    monkeypatch.setattr("llmnb.cuda.headnorm.PARTS", 2)
    check_row("headnorm", 2, 9, 2, 2, 5, eps=1e-3)
