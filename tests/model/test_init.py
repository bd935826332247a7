"""The first weights: what is not drawn. What is, test_parity.py compares."""

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
def test_what_is_not_drawn(cfg):
    params, double = empty_params(cfg), empty_params(cfg, np.float64)
    init_params(params, cfg, seed=2**32 - 1)
    init_params(double, cfg, seed=2**32 - 1)
    assert not params["wte"][cfg.vocab_size :].any()
    for name, x in params.items():
        assert (x == double[name]).all(), name
        if "ln" in name or name.endswith("b"):
            assert (x == name.endswith("w")).all(), name


def test_params_that_do_not_fit():
    cfg = CONFIGS[0]
    params = empty_params(cfg)
    bad = {**params, "fcw": params["fcw"][:1]}
    with pytest.raises(ValueError, match="init_params: fcw must have shape"):
        init_params(bad, cfg, seed=0)
    bad = {**params, "lnfb": params["lnfb"].astype(np.int64)}
    with pytest.raises(TypeError, match="init_params: lnfb must be float32"):
        init_params(bad, cfg, seed=0)
