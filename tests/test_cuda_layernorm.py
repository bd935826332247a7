"""LayerNorm on a GPU: every version, what it moves, what is refused."""

import functools

import numpy as np
import pytest
from gpu import check_layer, check_machine_code

from llmnb import reference
from llmnb.cuda.launch import empty, simulated, to_host
from llmnb.cuda.layernorm import (
    LAYERNORM_BACKWARD,
    LAYERNORM_FORWARD,
    layernorm_backward,
    layernorm_forward,
    layernorm_scratch,
)
from llmnb.cuda.simulator import watch

FORWARD = range(1, len(LAYERNORM_FORWARD) + 1)
BACKWARD = range(1, len(LAYERNORM_BACKWARD) + 1)
SHAPES = [(1, 1, 3), (1, 5, 32), (3, 11, 33), (1, 1, 64), (1, 5, 100)]
SHAPES += [(3, 11, 132), (1, 2, 1), (2, 19, 4)]


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


def forward(shape, version, tol=2e-6):
    return check_layer(
        layernorm_forward,
        reference.layernorm_forward,
        forward_arrays(problem(*shape)),
        ("out", "mean", "rstd"),
        tol=tol,
        version=version,
    )


def backward(shape, version, work=None, tol=4e-6):
    return check_layer(
        layernorm_backward,
        reference.layernorm_backward,
        backward_arrays(problem(*shape)),
        ("dinp", "dweight", "dbias"),
        tol=tol,
        version=version,
        work=work,
    )


@pytest.mark.parametrize("version", FORWARD)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(version, shape):
    check_machine_code(forward(shape, version, tol=5e-6))


@pytest.mark.parametrize("version", BACKWARD)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(version, shape):
    check_machine_code(backward(shape, version, tol=1e-5))


def names(seen):
    return [launch[0].__name__ for launch in seen.launches]


@pytest.mark.parametrize(
    ("C", "version", "kernel"),
    [
        (1600, 4, "forward_kept"),
        (3072, 4, "forward_kept"),
        (3076, 4, "_forward_vector"),
        (1601, 4, "_forward_warp"),
        (1601, 3, "_forward_warp"),
    ],
)
def test_long_rows_forward(C, version, kernel):
    seen = forward((1, 2, C), version)
    assert names(seen) == [kernel]
    check_machine_code(seen)


@pytest.mark.parametrize(
    ("C", "kernel"),
    [
        (1600, "_backward_block"),
        (2048, "_backward_block"),
        (2052, "_backward_rows"),
        (1601, "_backward_rows"),
    ],
)
def test_long_rows_backward(C, kernel):
    seen = backward((1, 2, C), 3, tol=1e-5)
    assert names(seen)[0] == kernel
    check_machine_code(seen)
