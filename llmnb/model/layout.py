# Written by `make export` from notebooks/1_by_hand/13_memory.py: edit that file.

"""The groups of tensors in which a GPT-2 trains."""

__all__ = [
    "activation_shapes",
    "block_shapes",
    "footprint",
    "gpt2_layout",
    "gradient_shapes",
]


# imports of the layout
import math

import numpy as np

from llmnb.config import parameter_shapes


# activations
def activation_shapes(cfg, batch_size, seq_len):
    """Shapes of what the forward pass leaves for the backward pass.

    A leading L marks what every block keeps for itself. By llm.c's names
    where it has one. What has rows of C comes first: where C is a multiple
    of 4, each such row then begins at one of 16 bytes. The logits are a
    group by themselves.

    Derived in chapter 1.13.
    """
    B, T, L = batch_size, seq_len, cfg.num_layers
    C, NH = cfg.channels, cfg.num_heads
    return {
        "encoded": (B, T, C),
        "qkv": (L, B, T, 3 * C),
        "atty": (L, B, T, C),
        "residual2": (L, B, T, C),
        "fch": (L, B, T, 4 * C),
        "residual3": (L, B, T, C),
        "lnf": (B, T, C),
        "att_lse": (L, B, NH, T),
        "ln1_mean": (L, B, T),
        "ln1_rstd": (L, B, T),
        "ln2_mean": (L, B, T),
        "ln2_rstd": (L, B, T),
        "lnf_mean": (B, T),
        "lnf_rstd": (B, T),
        "lse": (B, T),
        "losses": (B, T),
        "dlosses": (B, T),
    }


# gradients of activations
def gradient_shapes(cfg, batch_size, seq_len):
    """Shapes of the gradients that run through all blocks.

    dln is that of any LayerNorm's output, dstream that of the stream.

    Derived in chapter 1.13.
    """
    B, T, C = batch_size, seq_len, cfg.channels
    return {"dstream": (B, T, C), "dln": (B, T, C)}


# what blocks take turns with
def block_shapes(cfg, batch_size, seq_len):
    """Shapes of what one block needs at a time, in either direction.

    ln is the output of ln1, then of ln2. Gradients of fch_gelu give their
    place to those of fch.

    Derived in chapter 1.13.
    """
    B, T, C = batch_size, seq_len, cfg.channels
    return {
        "ln": (B, T, C),
        "fch_gelu": (B, T, 4 * C),
        "datty": (B, T, C),
        "dqkv": (B, T, 3 * C),
        "dfch": (B, T, 4 * C),
    }


# the whole layout
def gpt2_layout(cfg, batch_size, seq_len, dtype=np.float32):
    """The groups of the arena in which a GPT-2 trains.

    Four of the groups, params, grads, m and v, have the parameters' shapes;
    acts and dacts hold activations and their gradients, batch the tokens
    and targets (int32). block, what the blocks take turns with, lies over
    the logits. A backend may add scratch memory of its own.

    Derived in chapter 1.13.
    """
    shapes = parameter_shapes(cfg)
    B, T = batch_size, seq_len
    return {
        "params": (dtype, shapes),
        "grads": (dtype, shapes),
        "m": (dtype, shapes),
        "v": (dtype, shapes),
        "acts": (dtype, activation_shapes(cfg, B, T)),
        "dacts": (dtype, gradient_shapes(cfg, B, T)),
        "logits": (dtype, {"logits": (B, T, cfg.padded_vocab_size)}),
        "block": (dtype, block_shapes(cfg, B, T), True),
        "batch": (np.int32, {"tokens": (B, T), "targets": (B, T)}),
    }


# bytes of each group
def footprint(layout):
    """Bytes of each group of an arena, as a dict, before there is one.

    layout: as Arena takes it. A group that lies over another counts for
    what it is longer, so that the sum is what the arena takes, up to the
    padding between groups.

    Derived in chapter 1.13.
    """
    sizes, before = {}, 0
    for group, (dtype, shapes, *over) in layout.items():
        count = sum(math.prod(shape) for shape in shapes.values())
        size = count * np.dtype(dtype).itemsize
        sizes[group] = max(0, size - before) if over else size
        before = size
    return sizes
