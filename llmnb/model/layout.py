# Written by `make export` from notebooks/1_by_hand/16_memory.py: edit that file.

"""The groups of tensors in which a GPT-2 trains."""

__all__ = [
    "activation_shapes", "block_activations", "block_shapes", "gpt2_layout",
    "gradient_shapes", "parameter_layout",
]


# imports of the layout
import numpy as np

from llmnb.model.parts import block_of
from llmnb.model.tensors import full_shape, tensor_table


# activations
def block_activations(cfg, batch_size, seq_len):
    """Shapes of what a block's forward pass leaves for its backward pass.

    Derived in chapter 1.16.
    """
    B, T = batch_size, seq_len
    norm, attention, feedforward, *_ = block_of(cfg)
    stream = dict.fromkeys(("residual2", "residual3"), (B, T, cfg.channels))
    kept = stream | attention.keeps(cfg, B, T) | feedforward.keeps(cfg, B, T)
    for name in ("ln1", "ln2"):
        kept |= norm.keeps(cfg, B, T, name)
    return kept


def activation_shapes(cfg, batch_size, seq_len):
    """Shapes of what the forward pass leaves for the backward pass.

    A leading L marks what every block keeps for itself. By llm.c's names
    where it has one. What has rows of channels comes first: where C is a
    multiple of 4, each such row then begins at a multiple of 16 bytes. The
    logits are a group by themselves.

    Derived in chapter 1.16.
    """
    B, T, C = batch_size, seq_len, cfg.channels
    own = block_activations(cfg, B, T)
    shapes = dict.fromkeys(("encoded", "lnf"), (B, T, C))
    shapes |= {name: (cfg.num_layers, *own[name]) for name in own}
    shapes |= block_of(cfg).norm.keeps(cfg, B, T, "lnf")
    shapes |= dict.fromkeys(("lse", "losses", "dlosses"), (B, T))

    def narrow(named):
        rows, width = named[1][-2:]
        return rows != T or width % C != 0

    return dict(sorted(shapes.items(), key=narrow))


# gradients of activations
def gradient_shapes(cfg, batch_size, seq_len):
    """Shapes of the gradients that run through all blocks.

    dln is that of any LayerNorm's output, dstream that of the stream.

    Derived in chapter 1.16.
    """
    B, T, C = batch_size, seq_len, cfg.channels
    return {"dstream": (B, T, C), "dln": (B, T, C)}


# what blocks take turns with
def block_shapes(cfg, batch_size, seq_len):
    """Shapes of what one block needs at a time, in either direction.

    ln is the output of ln1, then of ln2.

    Derived in chapter 1.16.
    """
    B, T = batch_size, seq_len
    _, attention, feedforward, *_ = block_of(cfg)
    turns = attention.turns(cfg, B, T) | feedforward.turns(cfg, B, T)
    return {"ln": (B, T, cfg.channels)} | turns


# the whole layout
def parameter_layout(cfg):
    """Shapes of all parameters as they lie in memory: who decays first.

    Derived in chapter 1.16.
    """
    rows = sorted(tensor_table(cfg), key=lambda x: not x.decays)
    return {x.name: full_shape(x, cfg) for x in rows}


def gpt2_layout(cfg, batch_size, seq_len, dtype=np.float32):
    """The groups of the arena in which a model trains.

    Four of the groups, params, grads, m and v, have the parameters' shapes;
    acts and dacts hold activations and their gradients, batch the tokens
    and targets (int32). block, what the blocks take turns with, lies over
    the logits. A backend may add scratch memory of its own; tables holds
    what the parts of a block look up, if they do.

    Derived in chapter 1.16.
    """
    B, T = batch_size, seq_len
    shapes = parameter_layout(cfg)
    groups = dict.fromkeys(("params", "grads", "m", "v"), (dtype, shapes))
    tables = block_of(cfg).tables(cfg, T)
    if tables:
        groups["tables"] = dtype, {n: x.shape for n, x in tables.items()}
    return groups | {
        "acts": (dtype, activation_shapes(cfg, B, T)),
        "dacts": (dtype, gradient_shapes(cfg, B, T)),
        "logits": (dtype, {"logits": (B, T, cfg.padded_vocab_size)}),
        "block": (dtype, block_shapes(cfg, B, T), True),
        "batch": (np.int32, {"tokens": (B, T), "targets": (B, T)}),
    }
