"""The first weights: which tensor takes which of the generator's draws."""

import numpy as np
import pytest

from llmnb.config import GPT2Config
from llmnb.model.init import init_params
from llmnb.model.random import Generator
from llmnb.model.tensors import parameter_shapes


def empty_params(cfg, dtype=np.float32):
    shapes = parameter_shapes(cfg)
    return {name: np.full(s, 9, dtype) for name, s in shapes.items()}


def drawn(generator, n, mean=0.0, std=1.0):
    array = np.empty(n, np.float32)
    generator.normal_(array, mean, std)
    return array


CONFIGS = [
    GPT2Config(37, 331, 2, 3, 51),
    GPT2Config(8, 128, 3, 2, 16),
    GPT2Config(3, 2, 1, 1, 2),  # arrays of fewer than 16 numbers
]


@pytest.mark.parametrize("cfg", CONFIGS)
def test_the_order_of_the_tensors(cfg):
    params = empty_params(cfg)
    init_params(params, cfg, seed=9)
    V, C, L = cfg.vocab_size, cfg.channels, cfg.num_layers
    generator, small = Generator(9), 0.02 / np.sqrt(2 * L)
    assert (
        params["wte"][:V].ravel() == drawn(generator, V * C, 0, 0.02)
    ).all()
    wpe = drawn(generator, cfg.max_seq_len * C, 0, 0.02)
    assert (params["wpe"].ravel() == wpe).all()
    for layer in range(L):
        for name, rows, std in (
            ("qkvw", 3, 0.02),
            ("attprojw", 1, small),
            ("fcw", 4, 0.02),
            ("fcprojw", 4, small),
        ):
            want = drawn(generator, rows * C * C, 0, std)
            assert (params[name][layer].ravel() == want).all(), name


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
