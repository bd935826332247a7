"""The first weights; test_parity.py compares them."""

import numpy as np
import pytest

from llmnb.config import GPT2Config
from llmnb.model.init import init_params
from llmnb.model.tensors import parameter_shapes

CFG = GPT2Config(37, 331, 2, 3, 51)


def test_params_that_do_not_fit():
    shapes = parameter_shapes(CFG)
    params = {name: np.full(x, 9, np.float32) for name, x in shapes.items()}
    bad = {**params, "fcw": params["fcw"][:1]}
    with pytest.raises(ValueError, match="init_params: fcw must have shape"):
        init_params(bad, CFG, seed=0)
    del bad["fcw"]
    with pytest.raises(TypeError, match="init_params: fcw must be a NumPy ar"):
        init_params(bad, CFG, seed=0)
    assert all((x == 9).all() for x in params.values()), "nothing was written"
