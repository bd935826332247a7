# Written by `make export` from notebooks/1_by_hand/13_block.py: edit that file.

"""The parts of a block: what each wants, keeps and computes."""

__all__ = [
    "ATTENTION", "Block", "ENCODER", "End", "FEEDFORWARDS", "GELU", "HEAD",
    "LAYERNORM", "NORMS", "Part", "STD", "Tensor", "block_backward",
    "block_forward", "block_of", "product", "product_backward",
]


# imports of the parts
import math
from collections.abc import Callable
from typing import NamedTuple


# a row of the table
class Tensor(NamedTuple):
    """One tensor of parameters, and what is to be known about it.

    shape: of one block's, where `stacked`: there the model has L of them.
    there: its name in published files, {} for the block's number. turned:
    whether it stands the other way round there. decays: whether weight
    decay applies. added: whether backward functions add to its gradient;
    the others overwrite it. std: of its first values, 0 where all of them
    are `start`. used: how many of its rows are, None for all; the others
    are padding, and 0. pieces: where published files cut it into several,
    their names and numbers of rows.

    Derived in chapter 1.13.
    """

    name: str
    shape: tuple
    there: str
    turned: bool = False
    stacked: bool = True
    decays: bool = False
    added: bool = False
    std: float = 0.0
    start: float = 0.0
    used: int | None = None
    pieces: tuple = ()


class Part(NamedTuple):
    """A kind of norm, of attention or of feed-forward layer.

    tensors(cfg, ...): the rows of its parameters. keeps(cfg, B, T, ...): by
    name the shapes of what forward leaves for backward. turns(cfg, B, T):
    of what the blocks take turns with.

    Derived in chapter 1.13.
    """

    tensors: Callable
    keeps: Callable
    turns: Callable
    forward: Callable
    backward: Callable


# layernorm
STD = 0.02  # of the first weights


def _layernorm_tensors(cfg, name, there, stacked=True):
    how = {"stacked": stacked, "added": True}
    return [
        Tensor(
            f"{name}w", (cfg.channels,), f"{there}.weight", start=1.0, **how
        ),
        Tensor(f"{name}b", (cfg.channels,), f"{there}.bias", **how),
    ]


def _layernorm_keeps(cfg, B, T, name):
    return {f"{name}_mean": (B, T), f"{name}_rstd": (B, T)}


def _layernorm_forward(ops, name, out, inp, w, a):
    mean, rstd = a[f"{name}_mean"], a[f"{name}_rstd"]
    ops.layernorm_forward(out, mean, rstd, inp, w[f"{name}w"], w[f"{name}b"])


def _layernorm_backward(ops, name, dinp, dout, inp, w, a, dw):
    weight, mean, rstd = w[f"{name}w"], a[f"{name}_mean"], a[f"{name}_rstd"]
    grads = dinp, dw[f"{name}w"], dw[f"{name}b"]
    ops.layernorm_backward(*grads, dout, inp, weight, mean, rstd)


LAYERNORM = Part(
    _layernorm_tensors,
    _layernorm_keeps,
    lambda cfg, B, T: {},
    _layernorm_forward,
    _layernorm_backward,
)


# a linear layer's tensors
def _linear(cfg, name, there, outs, ins, std=STD):
    weight = Tensor(
        f"{name}w", (outs, ins), f"{there}.weight", turned=True, decays=True,
        std=std,
    )  # fmt: skip
    bias = Tensor(f"{name}b", (outs,), f"{there}.bias")
    return [weight, bias] if cfg.bias else [weight]


def _into_the_stream(cfg):
    return STD / math.sqrt(2 * cfg.num_layers)


# a linear layer
def product(ops, out, inp, w, name, residual=None, **how):
    """A linear layer, of the weights in w whose name begins with `name`.

    Derived in chapter 1.13.
    """
    weights = w[f"{name}w"], w.get(f"{name}b")
    ops.matmul_forward(out, inp, *weights, residual=residual, **how)


def product_backward(ops, dinp, dout, inp, w, dw, name, add, **how):
    """A linear layer, backward; add: whether to add to what dw holds.

    Derived in chapter 1.13.
    """
    grads = dw[f"{name}w"], dw.get(f"{name}b")
    options = {"add_dinp": False, "add_dweight": add} | how
    ops.matmul_backward(dinp, *grads, dout, inp, w[f"{name}w"], **options)


# attention
def _widths(cfg):
    """Of the packed queries, keys and values, and of attention's output."""
    heads, hs = cfg.num_heads, cfg.head_size
    return (heads + 2 * cfg.num_kv_heads) * hs, heads * hs


def _attention_tensors(cfg):
    (packed, width), C = _widths(cfg), cfg.channels
    std = _into_the_stream(cfg)
    return [
        *_linear(cfg, "qkv", "attn.c_attn", packed, C),
        *_linear(cfg, "attproj", "attn.c_proj", C, width, std),
    ]


def _attention_keeps(cfg, B, T):
    packed, width = _widths(cfg)
    kept = {"qkv": (B, T, packed), "atty": (B, T, width)}
    return kept | {"att_lse": (B, cfg.num_heads, T)}


def _attention_turns(cfg, B, T):
    packed, width = _widths(cfg)
    return {"datty": (B, T, width), "dqkv": (B, T, packed)}


def _attention_forward(ops, out, inp, residual, w, a, how):
    product(ops, a["qkv"], inp, w, "qkv", **how)
    ops.attention_forward(a["atty"], a["att_lse"], a["qkv"], **how)
    product(ops, out, a["atty"], w, "attproj", residual, **how)


def _attention_backward(ops, dinp, dout, inp, w, a, dw, d, add, how):
    datty, dqkv = d["datty"], d["dqkv"]
    product_backward(ops, datty, dout, a["atty"], w, dw, "attproj", add, **how)
    kept = a["qkv"], a["atty"], a["att_lse"]
    ops.attention_backward(dqkv, datty, *kept, add=False, **how)
    product_backward(ops, dinp, dqkv, inp, w, dw, "qkv", add, **how)


ATTENTION = Part(
    _attention_tensors,
    _attention_keeps,
    _attention_turns,
    _attention_forward,
    _attention_backward,
)


# feed-forward
def _gelu_tensors(cfg):
    C, std = cfg.channels, _into_the_stream(cfg)
    return [
        *_linear(cfg, "fc", "mlp.c_fc", 4 * C, C),
        *_linear(cfg, "fcproj", "mlp.c_proj", C, 4 * C, std),
    ]


def _gelu_keeps(cfg, B, T):
    return {"fch": (B, T, 4 * cfg.channels)}


def _gelu_turns(cfg, B, T):
    return dict.fromkeys(("fch_gelu", "dfch"), (B, T, 4 * cfg.channels))


def _gelu_forward(ops, out, inp, residual, w, a, how):
    product(ops, a["fch"], inp, w, "fc", **how)
    ops.gelu_forward(a["fch_gelu"], a["fch"])
    product(ops, out, a["fch_gelu"], w, "fcproj", residual, **how)


def _gelu_backward(ops, dinp, dout, inp, w, a, dw, d, add, how):
    dfch, bent = d["dfch"], a["fch_gelu"]
    ops.gelu_forward(bent, a["fch"])
    product_backward(ops, dfch, dout, bent, w, dw, "fcproj", add, **how)
    ops.gelu_backward(dfch, dfch, a["fch"], add=False)
    product_backward(ops, dinp, dfch, inp, w, dw, "fc", add, **how)


GELU = Part(
    _gelu_tensors, _gelu_keeps, _gelu_turns, _gelu_forward, _gelu_backward
)


# the ends
class End(NamedTuple):
    """What stands before all blocks, or after them.

    Derived in chapter 1.13.
    """

    forward: Callable
    backward: Callable


def _encoder_forward(ops, out, tokens, w):
    ops.encoder_forward(out, tokens, w["wte"], w["wpe"])


def _encoder_backward(ops, dout, tokens, dw):
    ops.encoder_backward(dw["wte"], dw["wpe"], dout, tokens)


def _head_forward(ops, out, inp, w, how):
    ops.matmul_forward(out, inp, w["wte"], None, **how)


def _head_backward(ops, dinp, a, batch, w, dw, add, how):
    dlogits, V = a["logits"], batch["V"]
    ops.crossentropy_softmax_backward(
        dlogits, a["dlosses"], a["logits"], a["lse"], batch["targets"], V
    )
    options = {"add_dinp": False, "add_dweight": add} | how
    ops.matmul_backward(
        dinp, dw["wte"], None, dlogits, a["lnf"], w["wte"], **options
    )


ENCODER = End(_encoder_forward, _encoder_backward)
HEAD = End(_head_forward, _head_backward)


# the kinds there are
NORMS = {"layernorm": LAYERNORM}
FEEDFORWARDS = {"gelu": GELU}


class Block(NamedTuple):
    """The parts of a model's blocks, and its ends.

    tables(cfg, T): by name arrays that attention reads besides; GPT-2's
    needs none.

    Derived in chapter 1.13.
    """

    norm: Part
    attention: Part
    feedforward: Part
    encoder: End = ENCODER
    head: End = HEAD
    tables: Callable = lambda cfg, T: {}


def block_of(cfg, i=0):
    """The parts that a configuration names, for its block i.

    Derived in chapter 1.13.
    """
    if hasattr(cfg, "block"):  # of another family, which brings its own
        return cfg.block(i)
    return Block(NORMS[cfg.norm], ATTENTION, FEEDFORWARDS[cfg.feedforward])


# one block, forward
def block_forward(parts, ops, out, inp, w, a, **how):
    """One block: attention, then the feed-forward half, both residual.

    parts: a Block. out, inp: (B, T, C). w and a map names to this block's
    weights and activations, with those that blocks take turns with; a is
    overwritten. ops: the layers. how: what else ops takes for its products,
    such as scratch memory.

    Derived in chapter 1.13.
    """
    norm, attention, feedforward = parts[:3]
    x, ln = a["residual2"], a["ln"]
    norm.forward(ops, "ln1", ln, inp, w, a)
    attention.forward(ops, x, ln, inp, w, a, how)
    norm.forward(ops, "ln2", ln, x, w, a)
    feedforward.forward(ops, out, ln, x, w, a, how)


# one block, backward
def block_backward(parts, ops, inp, w, a, dw, d, add=False, **how):
    """Take d["dstream"] from a block's output to its input.

    inp: (B, T, C). w, a: this block's weights and activations, as
    block_forward left them; dw: the gradients of its weights; d: the
    gradients of its activations. d["dstream"] holds the gradient of the
    output and receives that of the input; the rest of d is overwritten.
    add: whether to add to the gradients of matrices and their biases or to
    overwrite them; those of norms are always added to. parts, ops, how: as
    for block_forward.

    Derived in chapter 1.13.
    """
    norm, attention, feedforward = parts[:3]
    x, ln, dln, dstream = a["residual2"], a["ln"], d["dln"], d["dstream"]
    norm.forward(ops, "ln2", ln, x, w, a)
    feedforward.backward(ops, dln, dstream, ln, w, a, dw, d, add, how)
    norm.backward(ops, "ln2", dstream, dln, x, w, a, dw)
    norm.forward(ops, "ln1", ln, inp, w, a)
    attention.backward(ops, dln, dstream, ln, w, a, dw, d, add, how)
    norm.backward(ops, "ln1", dstream, dln, inp, w, a, dw)
