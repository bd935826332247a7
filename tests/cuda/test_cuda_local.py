"""Attention by other rules on a GPU: its tiles, what it leaves out.

Its wide heads and its machine code are in test_cuda_attention.py.
"""

import numpy as np
import pytest
from gpu import both, check_row, there, unwatched
from layers import NAMED, problem

from llmnb import cuda
from llmnb.gpu.launch import to_host

LAYER = NAMED["local_attention"]


def draw(*shape, **rule):
    """The arguments of each pass, by its name."""
    return both(LAYER, problem(LAYER, np.float32, LAYER.sized(*shape), **rule))


@pytest.mark.parametrize("window", [1, 20, 65])
def test_windows_over_several_tiles(window):
    """Rows that meet tiles of unseen keys before their first one."""
    check_row("local_attention", 1, 70, 1, 1, 4, window=window, softcap=2.0)


def test_without_a_rule_it_is_gpt2s_attention():
    """To the last bit, and with a window that all positions fit in."""
    shape = 1, 20, 2, 1, 8
    plain, _ = unwatched("attention", *shape)
    for rule in ({}, {"window": 20}, {"scale": 8**-0.5}):
        found, _ = unwatched("local_attention", *shape, **rule)
        for x, same in zip(plain, found, strict=True):
            np.testing.assert_array_equal(x, same)


def test_what_lies_before_the_window_is_not_read():
    """Not a number there, in whole tiles, and none in the last outputs."""
    (_, arrays), _ = draw(1, 100, 1, 1, 4, window=4)
    found = []
    for unseen in (arrays["inp"][:, :32].copy(), np.nan):
        arrays["inp"][:, :32] = unseen
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


# norms of heads


def test_more_rows_than_warps(monkeypatch):
    monkeypatch.setattr("llmnb.cuda.headnorm.PARTS", 2)
    check_row("headnorm", 2, 9, 2, 2, 5, eps=1e-3)
