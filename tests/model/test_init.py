"""The first weights, in float64 too; test_parity.py compares them."""

import numpy as np
import pytest

from llmnb.config import GPT2Config
from llmnb.model.init import init_params
from llmnb.model.tensors import parameter_shapes


def empty_params(cfg, dtype=np.float32):
    shapes = parameter_shapes(cfg)
    return {name: np.full(s, 9, dtype) for name, s in shapes.items()}


CONFIGS = [
    GPT2Config(37, 331, 2, 3, 51),
    GPT2Config(8, 128, 3, 2, 16),
    GPT2Config(3, 2, 1, 1, 2),  # arrays of fewer than 16 numbers
]


@pytest.mark.parametrize("cfg", CONFIGS)
def test_float64_gets_the_float32_draws(cfg):
    params, double = empty_params(cfg), empty_params(cfg, np.float64)
    init_params(params, cfg, seed=2**32 - 1)
    init_params(double, cfg, seed=2**32 - 1)
    for name, x in params.items():
        assert (x == double[name]).all(), name


def test_params_that_do_not_fit():
    params = empty_params(CONFIGS[0])
    bad = {**params, "fcw": params["fcw"][:1]}
    with pytest.raises(ValueError, match="init_params: fcw must have shape"):
        init_params(bad, CONFIGS[0], seed=0)
    del bad["fcw"]
    with pytest.raises(TypeError, match="init_params: fcw must be a NumPy ar"):
        init_params(bad, CONFIGS[0], seed=0)
    assert all((x == 9).all() for x in params.values()), "nothing was written"
