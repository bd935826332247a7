"""Norms of heads on a GPU: simulated and compiled."""

import numpy as np
from gpu import check_layer, check_machine_code
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnb import cuda as gpu
from llmnb import reference

TOLERANCE = 1e-5  # exp is approximate on a GPU
drawn = settings(max_examples=10, deadline=None, derandomize=True)


def normed(B, T, heads, offset=0.0):
    NH, NKV, hs = heads
    rng = np.random.default_rng(0)

    def some(*shape):
        return rng.normal(size=shape).astype(np.float32)

    inp, weights = some(B, T, (NH + 2 * NKV) * hs), some(2, hs)
    rstd, out = np.empty((B, T, NH + NKV), np.float32), np.empty_like(inp)
    reference.headnorm_forward(out, rstd, inp, *weights, 1e-3, offset)
    a = {"out": np.full_like(out, np.nan), "rstd": np.full_like(rstd, np.nan)}
    a |= {"inp": inp, "qweight": weights[0], "kweight": weights[1]}
    a |= {"eps": 1e-3, "offset": offset}
    layers = gpu.headnorm_forward, reference.headnorm_forward
    forward = check_layer(*layers, a, ["out", "rstd"], TOLERANCE)
    back = {"dinp": some(*inp.shape), "dqweight": some(hs)}
    back |= {"dkweight": some(hs), "inp": inp}
    back |= {"qweight": weights[0], "kweight": weights[1], "rstd": rstd}
    layers = gpu.headnorm_backward, reference.headnorm_backward
    results = "dinp", "dqweight", "dkweight"
    back |= {"offset": offset}
    return forward, check_layer(*layers, back, results, TOLERANCE)


@drawn
@given(
    st.integers(1, 2), st.integers(1, 9), st.integers(1, 70),
    st.sampled_from([(1, 1), (4, 2), (3, 1)]), st.sampled_from([0.0, 1.0]),
)  # fmt: skip
def test_norms_of_heads_equal_the_reference(B, T, hs, heads, offset):
    normed(B, T, (*heads, hs), offset)


def test_machine_code_of_norms_of_heads():
    for seen in normed(1, 2, (2, 1, 64)):
        check_machine_code(seen)


def test_more_rows_than_warps(monkeypatch):
    monkeypatch.setattr("llmnb.cuda.headnorm.PARTS", 2)
    normed(2, 9, (4, 2, 5))
