# Written by `make export` from notebooks/1_by_hand/14_weights.py: edit that file.

"""The first weights, of a size that depth does not spoil."""

__all__ = [
    "init_params",
]


# imports
import math

import numpy as np

from llmnb.checks import check_array
from llmnb.config import parameter_shapes
from llmnb.model.random import Generator


# the weights of a new model
def init_params(params, cfg, seed):
    """Fill a model's 16 parameter tensors for training from scratch.

    params: name -> array in the shapes of parameter_shapes(cfg), float32 or
    float64 (the float32 draws, cast). Weights are N(0, 0.02**2), those that
    write into the residual stream divided by sqrt(2 L); biases and padded
    rows of wte are 0, layernorm weights 1. Raises TypeError or ValueError.

    Derived in chapter 1.14.
    """
    for name, shape in parameter_shapes(cfg).items():
        check_array(f"init_params: {name}", params[name], shape, written=True)
    for name in parameter_shapes(cfg):
        params[name].fill(name in ("ln1w", "ln2w", "lnfw"))
    generator = Generator(seed)
    generator.normal_(params["wte"][: cfg.vocab_size], std=0.02)
    generator.normal_(params["wpe"], std=0.02)
    small = 0.02 / math.sqrt(2 * cfg.num_layers)
    stds = {"qkvw": 0.02, "attprojw": small, "fcw": 0.02, "fcprojw": small}
    for layer in range(cfg.num_layers):
        for name, std in stds.items():
            generator.normal_(params[name][layer], std=std)
