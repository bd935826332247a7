"""LayerNorm on a GPU: what it moves, what is refused."""

import re

import numpy as np
import pytest
from gpu import check_ladder, check_machine_code, draw, there

from llmnb.bench.rungs_layernorm import forward_by_threads
from llmnb.cuda import layernorm, layernorm_forward
from llmnb.gpu.launch import to_host

BACK = "layernorm_backward"


def forward(B, T, C):
    arrays = draw("layernorm_forward", B, T, C)
    arrays["inp"][...] = arrays["inp"] * 3 + 1
    return check_ladder("layernorm_forward", arrays, tol=5e-6)


def backward(B, T, C):
    return check_ladder(BACK, draw(BACK, B, T, C), tol=1e-5)


def names(seen):
    return [launch[0].__name__ for launch in seen.launches]


def test_machine_code_forward():
    """Vectors, but for a row's mean and rstd."""
    (made,) = check_machine_code(forward(1, 1, 132)).values()
    assert made.vector_loads and made.vector_stores
    one_float = r"(?:ld|st)\.global(?:\.(?!v4)\w+)*\.[fb]32"
    assert len(re.findall(one_float, made.ptx)) == 2


def test_machine_code_of_rows_that_vectors_do_not_fit():
    (made,) = check_machine_code(forward(1, 1, 133)).values()
    assert made.vector_loads == made.vector_stores == 0
    check_machine_code(backward(1, 1, 133))


def test_machine_code_backward():
    made = check_machine_code(backward(1, 1, 132))
    block = made["_backward_block"]
    assert (block.vector_loads, block.vector_stores) == (4, 3)


@pytest.mark.parametrize(
    ("run", "C", "kernel"),
    [
        (forward, 256, "forward_kept"),
        (forward, 260, "_forward_warp"),
        (forward, 257, "_forward_warp"),
        (backward, 256, "_backward_block"),
        (backward, 260, "_backward_rows"),
        (backward, 133, "_backward_rows"),
    ],
)
def test_long_rows(run, C, kernel, monkeypatch):
    """Here rows of up to 256 channels are kept; the rest falls back."""
    monkeypatch.setattr(layernorm, "MOST_KEPT", 256)
    monkeypatch.setattr(layernorm, "MOST_THREADS", 64)
    assert names(run(1, 1, C))[0] == kernel


def test_the_longest_rows():
    """What is kept fits in 48 KB, and a block in its launch bounds."""
    assert names(forward(1, 1, 3072)) == ["forward_kept"]
    seen = backward(1, 1, 2048)
    assert names(seen)[0] == "_backward_block"
    assert seen.launches[0][2] == 512
    assert layernorm.KEPT_ROWS * layernorm.MOST_KEPT * 4 == 48 << 10


def test_a_large_mean_loses_no_digits():
    """The variance is summed from distances, never from squares."""
    p = draw("layernorm_forward", 1, 2, 64)
    signs = np.random.default_rng(0).choice([-1, 1], p["inp"].shape)
    p["inp"][...] = 10_000 + signs
    want = 1 / p["inp"].std(axis=-1, dtype=np.float64)
    for layer in (forward_by_threads, layernorm_forward):
        given = there(p)
        layer(*given.values())
        np.testing.assert_allclose(to_host(given["rstd"]), want, rtol=1e-4)
