# Written by `make export` from notebooks/1_by_hand/15_weights.py: edit that file.

"""The first weights, of a size that depth does not spoil."""

__all__ = ["init_params"]


# imports
from llmnb.checks import check_array
from llmnb.model.tensors import parameter_shapes, tensor_table
from llmnb.model.random import Generator


# the weights of a new model
def init_params(params, cfg, seed):
    """Fill a model's parameter tensors for training from scratch.

    params: name -> array in the shapes of parameter_shapes(cfg), float32 or
    float64 (the float32 draws, cast). Matrices are drawn with the standard
    deviations of `tensor_table`; biases and padded rows of wte are 0,
    norms' weights 1. Raises TypeError or ValueError.

    Derived in chapter 1.15.
    """
    for name, shape in parameter_shapes(cfg).items():
        array = params.get(name)
        check_array(f"init_params: {name}", array, shape, written=True)
    table, generator = tensor_table(cfg), Generator(seed)
    for x in table:
        params[x.name].fill(x.start)
    drawn = [x for x in table if x.std]
    for x in drawn:
        if not x.stacked:
            generator.normal_(params[x.name][: x.used], std=x.std)
    for layer in range(cfg.num_layers):
        for x in drawn:
            if x.stacked:
                generator.normal_(params[x.name][layer], std=x.std)
