# Written by `make export` from notebooks/02_memory.py: edit that file.

"""Lay out one block of memory.

One allocation holds every tensor of the model as a named view, so the
footprint is known before training begins and never grows.
"""

__all__ = [
    "activation_shapes",
    "gpt2_layout",
    "gradient_shapes",
]


# imports of the layout
import numpy as np

from llmnb.config import parameter_shapes


# activations
def activation_shapes(cfg, batch_size, seq_len):
    """Shapes of what the forward pass leaves for the backward pass.

    A leading L marks what every block keeps for itself. By llm.c's names
    where it has one.

    Derived in chapter 2.
    """
    B, T, L = batch_size, seq_len, cfg.num_layers
    C, NH, Vp = cfg.channels, cfg.num_heads, cfg.padded_vocab_size
    return {
        "encoded": (B, T, C),
        "ln1": (L, B, T, C),
        "ln1_mean": (L, B, T),
        "ln1_rstd": (L, B, T),
        "qkv": (L, B, T, 3 * C),
        "atty": (L, B, T, C),
        "att_lse": (L, B, NH, T),
        "residual2": (L, B, T, C),
        "ln2": (L, B, T, C),
        "ln2_mean": (L, B, T),
        "ln2_rstd": (L, B, T),
        "fch": (L, B, T, 4 * C),
        "fch_gelu": (L, B, T, 4 * C),
        "residual3": (L, B, T, C),
        "lnf": (B, T, C),
        "lnf_mean": (B, T),
        "lnf_rstd": (B, T),
        "logits": (B, T, Vp),
        "lse": (B, T),
        "losses": (B, T),
        "dlosses": (B, T),
    }


# gradients of activations
def gradient_shapes(cfg, batch_size, seq_len):
    """Shapes of the gradients of activations: one block's worth.

    The blocks take turns with them. Gradients of the logits stand where the
    logits stood, and those of fch_gelu give their place to those of fch.

    Derived in chapter 2.
    """
    B, T, C = batch_size, seq_len, cfg.channels
    return {
        "dstream": (B, T, C),
        "dln": (B, T, C),
        "datty": (B, T, C),
        "dqkv": (B, T, 3 * C),
        "dfch": (B, T, 4 * C),
    }


# the whole layout
def gpt2_layout(cfg, batch_size, seq_len, dtype=np.float32):
    """The groups of the arena in which a GPT-2 trains.

    Four of the groups, params, grads, m and v, have the parameters' shapes;
    acts and block hold activations and their gradients, batch the tokens
    and targets (int32). A backend may add scratch memory of its own.

    Derived in chapter 2.
    """
    shapes = parameter_shapes(cfg)
    B, T = batch_size, seq_len
    return {
        "params": (dtype, shapes),
        "grads": (dtype, shapes),
        "m": (dtype, shapes),
        "v": (dtype, shapes),
        "acts": (dtype, activation_shapes(cfg, B, T)),
        "block": (dtype, gradient_shapes(cfg, B, T)),
        "batch": (np.int32, {"tokens": (B, T), "targets": (B, T)}),
    }
