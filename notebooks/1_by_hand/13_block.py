# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       model.parts: "The parts of a block: what each wants, keeps and computes."
#       model.tensors: "Every parameter tensor of a model: one table, one truth."
# ---

# %% [markdown]
# # The block: wire the layers, forward and backward
#
# > Two halves, each a norm, a layer and a sum; the backward pass is the list
# > reversed, and what was read twice receives two gradients.
#
# *Reading time: 25 minutes. You need: the layers of chapters
# [1.5](05_encoder.ipynb) to [1.11](11_crossentropy.ipynb).*
#
# ## Where we are

# %% where we are tags=["hide-input"]
from llmnb.book.diagram import gpt2_diagram

gpt2_diagram(lit="block")

# %% [markdown]
# *Figure 1.13.1. The two rows in the frame are a block, and each ends in a
# sum. This chapter draws the lit arrows between their boxes, and gives each a
# name.*
#
# Each layer has been derived and proved alone. That leaves the wiring: which
# array goes where, and what is added to what on the way back. Its mistakes are
# quiet ones: a model with one gradient missing still learns, only worse. At
# the end of this chapter you can
#
# - write a transformer block, forward and backward, as a list of calls;
# - name every array in it, and every gradient that flows back;
# - say where gradients add up, and find the places in a block;
# - change one part of a block without touching the others.
#
# ## Setup

# %% setup
import numpy as np

from llmnb import reference
from llmnb.book.verify import compare, numerical_gradient, verdict
from llmnb.book.wiring import wiring_figure
from llmnb.config import GPT2Config

# %% [markdown]
# ## The block
#
# A block has two halves. In the first a token looks at others, in the second
# it works alone. With $x$ for the stream that comes in,
#
# $$ x' = x + \mathrm{proj}(\mathrm{attention}(\mathrm{qkv}(
#    \mathrm{ln}_1(x)))) , \tag{1.13.1} $$
#
# $$ y = x' + \mathrm{down}(\mathrm{gelu}(\mathrm{up}(\mathrm{ln}_2(x')))) .
#    \tag{1.13.2} $$
#
# Here proj, qkv, up and down are the four linear layers of a block; in the
# code their weights begin with `attproj`, `qkv`, `fc` and `fcproj`. Written
# out with arrays, it is eight layers and two sums:

# %% the wiring of a block tags=["hide-input"]
wiring_figure("block")

# %% [markdown]
# *Figure 1.13.2. A block with every array named. Plain arrows are the forward
# pass: each half leaves the stream to the right and comes back into it. Orange
# arrows are the gradients, which take the same roads the other way. Where the
# forward pass reads an array twice, the gradients of both readers meet in an
# orange circle.*
#
# The names return in the code of this chapter and of chapters 1.14, 1.16 and 1.17.
# `residual2` is what the stream is called between the two halves, the $x'$ of
# the equations; after the second the code says `residual3`. The names in the
# boxes are those of the weights. `dx` there is the stream's gradient where it
# is read, on the way back: $dy$ by the second half, $dx'$ by the first.
#
# ## What a part is
#
# Seen from further away a block is a norm, attention, a sum, a norm, a
# feed-forward layer and a sum. Models that came after GPT-2 have the same six,
# of other kinds. So each kind of norm, attention or feed-forward layer is a
# *part*, and a part says five things about itself: the tensors of weights that
# it wants, the arrays that its forward pass leaves for its backward pass,
# those that the blocks can take turns with (nothing in them is needed once a
# block is done), and its two passes.
#
# What several chapters ask about a tensor of parameters stands in one row: its
# shape ([1.16](16_memory.ipynb)), the size of its first values
# ([1.15](15_weights.ipynb)), whether it decays ([1.12](12_adamw.ipynb)).

# %% imports of the parts tags=["export"]
import math
from collections.abc import Callable
from typing import NamedTuple


# %% a row of the table tags=["export"]
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
    """

    tensors: Callable
    keeps: Callable
    turns: Callable
    forward: Callable
    backward: Callable


# %% [markdown]
# ## The norm
#
# A norm is used three times, under the names `ln1`, `ln2` and `lnf`. `w` and
# `a` map names to weights and activations, `dw` and `d` to their gradients;
# `ops` holds the layers. LayerNorm's backward pass *adds* to the gradient of
# its input, which holds a share already, and to those of its weights, which
# the model clears when a new sum begins ([chapter 1.17](17_model.ipynb)).

# %% layernorm tags=["export"]
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

# %% [markdown]
# ## Attention
#
# A product makes queries, keys and values, attention mixes the values, a
# second product returns to the stream. `residual=` adds the stream while the
# result is still at hand ([chapter 1.10](10_residual.ipynb)).
#
# The weights that write into the stream begin smaller than the others, by
# $1/\sqrt{2L}$, as [chapter 1.10](10_residual.ipynb) found. Two things in the
# code are for models after GPT-2: fewer heads of keys and values than of
# queries (in GPT-2 `num_kv_heads` is `num_heads`, so `packed` is $3C$), and
# linear layers without a bias (`w.get` then gives None). `how` goes on to the
# layers unread: it holds what a fast version of them may want besides.
#
# A block has four products, so what each does with the weights of its name is
# written once. Every gradient of an activation, but the stream's, is one share
# from one reader, so the calls say `add_dinp=False`, or `add=False`, and
# overwrite: to add, one would have to clear the array first. For gradients of
# weights the caller decides: `add=True` sums those of several batches.


# %% a linear layer's tensors tags=["exporti"]
def _linear(cfg, name, there, outs, ins, std=STD):
    weight = Tensor(
        f"{name}w", (outs, ins), f"{there}.weight", turned=True, decays=True,
        std=std,
    )  # fmt: skip
    bias = Tensor(f"{name}b", (outs,), f"{there}.bias")
    return [weight, bias] if cfg.bias else [weight]


def _into_the_stream(cfg):
    return STD / math.sqrt(2 * cfg.num_layers)


# %% a linear layer tags=["export"]
def product(ops, out, inp, w, name, residual=None, **how):
    """A linear layer, of the weights in w whose name begins with `name`."""
    weights = w[f"{name}w"], w.get(f"{name}b")
    ops.matmul_forward(out, inp, *weights, residual=residual, **how)


def product_backward(ops, dinp, dout, inp, w, dw, name, add, **how):
    """A linear layer, backward; add: whether to add to what dw holds."""
    grads = dw[f"{name}w"], dw.get(f"{name}b")
    options = {"add_dinp": False, "add_dweight": add} | how
    ops.matmul_backward(dinp, *grads, dout, inp, w[f"{name}w"], **options)


# %% attention tags=["export"]
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

# %% [markdown]
# ## Feed-forward
#
# Up to $4C$ numbers, through GELU, and down again. The output of GELU is not
# kept; the backward pass computes it again, from what is. `dfch` first
# receives the gradient of GELU's output, over which GELU's backward pass
# writes that of its input.


# %% feed-forward tags=["export"]
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

# %% [markdown]
# ## Both ends
#
# Before the blocks stands the encoder, after the last norm the product with
# the token table and the losses. `dlogits` takes the place of the logits,
# which nobody needs after that.


# %% the ends tags=["export"]
class End(NamedTuple):
    """What stands before all blocks, or after them."""

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

# %% the kinds there are tags=["export"]
NORMS = {"layernorm": LAYERNORM}
FEEDFORWARDS = {"gelu": GELU}


class Block(NamedTuple):
    """The parts of a model's blocks, and its ends.

    tables(cfg, T): by name arrays that attention reads besides; GPT-2's
    needs none.
    """

    norm: Part
    attention: Part
    feedforward: Part
    encoder: End = ENCODER
    head: End = HEAD
    tables: Callable = lambda cfg, T: {}


def block_of(cfg, i=0):
    """The parts that a configuration names, for its block i."""
    if hasattr(cfg, "block"):  # of another family, which brings its own
        return cfg.block(i)
    return Block(NORMS[cfg.norm], ATTENTION, FEEDFORWARDS[cfg.feedforward])


# %% [markdown]
# ## One block, forward
#
# Follow the plain arrows of figure 1.13.2 and write down the calls. `ops` has
# the layers, such as `llmnb.reference`; such a set of functions is called a
# *backend*. `ln` is the output of either norm: the second writes over what the
# first has written. In both functions `inp` is the $x$ of (1.13.1), and `x` is
# its $x'$.


# %% one block, forward tags=["export"]
def block_forward(parts, ops, out, inp, w, a, **how):
    """One block: attention, then the feed-forward half, both residual.

    parts: a Block. out, inp: (B, T, C). w and a map names to this block's
    weights and activations, with those that blocks take turns with; a is
    overwritten. ops: the layers. how: what else ops takes for its products,
    such as scratch memory.
    """
    norm, attention, feedforward = parts[:3]
    x, ln = a["residual2"], a["ln"]
    norm.forward(ops, "ln1", ln, inp, w, a)
    attention.forward(ops, x, ln, inp, w, a, how)
    norm.forward(ops, "ln2", ln, x, w, a)
    feedforward.forward(ops, out, ln, x, w, a, how)


# %% [markdown]
# ## By hand
#
# Count how the shapes change, for two rows of four tokens and six channels
# with two heads:
#
# | line | reads | writes |
# |---|---|---|
# | `layernorm_forward` | (2, 4, 6) | (2, 4, 6), and two numbers a token |
# | `matmul_forward`, qkv | (2, 4, 6) | (2, 4, 18) |
# | `attention_forward` | (2, 4, 18) | (2, 4, 6), and one number a token and head |
# | `matmul_forward`, projection and sum | (2, 4, 6) twice | (2, 4, 6) |
# | `layernorm_forward` | (2, 4, 6) | (2, 4, 6), and two numbers a token |
# | `matmul_forward`, up | (2, 4, 6) | (2, 4, 24) |
# | `gelu_forward` | (2, 4, 24) | (2, 4, 24) |
# | `matmul_forward`, down and sum | (2, 4, 24), (2, 4, 6) | (2, 4, 6) |
#
# A block takes (B, T, C) to (B, T, C), which is why one can stack any number
# of them.
#
# ## One block, backward
#
# The chain rule runs through the list from its last line to its first. Every
# call becomes its backward twin; what it wrote becomes what it reads. One rule
# needs care:
#
# > An array that was read twice receives two gradients, and they add up.
#
# It is the chain rule for two roads, and it happens in three places. Two of
# them are in figure 1.13.2.
#
# 1. **The stream** is read twice in each half, by the norm and by the sum at
#    its end. Write $f$ for all that the second half adds, so that
#    $y = x' + f(x')$. Then
#    $dx'_j = dy_j + \sum_i dy_i\, \partial f_i / \partial x'_j$. The first
#    share has passed by; the second is $dy$ sent back through down, GELU, up
#    and $\mathrm{ln}_2$, whose backward pass adds it. In the same way $dx$ is
#    $dx'$ and what that of $\mathrm{ln}_1$ adds.
# 2. **The output of `ln1`** becomes queries, keys and values. Their weights
#    lie in one matrix, so the three shares are added within one product.
# 3. **The token table**, outside the block, is read by the encoder and again
#    at the logits. On the way back the logits come first: their share is
#    written, and the encoder adds its own.
#
# This makes the code short. A residual sum hands its gradient on unchanged, so
# one array, `dstream`, serves for $dy$, $dx'$ and $dx$ in turn: it comes in as
# $dy$, each half of the block reads it, and only then LayerNorm's backward
# pass adds the half's share. It is the thick orange line of the figure.
# Likewise one array, `dln`, serves for `dln1` and `dln2`.
#
# On the way back a product needs the input that it had on the way there, and
# the outputs of LayerNorm and GELU are no longer there: the second norm, or
# the next block, has written in their place ([chapter 1.16](16_memory.ipynb)).
# So they are computed again where they are needed, from inputs that were kept,
# and come out with the same bits.


# %% one block, backward tags=["export"]
def block_backward(parts, ops, inp, w, a, dw, d, add=False, **how):
    """Take d["dstream"] from a block's output to its input.

    inp: (B, T, C). w, a: this block's weights and activations, as
    block_forward left them; dw: the gradients of its weights; d: the
    gradients of its activations. d["dstream"] holds the gradient of the
    output and receives that of the input; the rest of d is overwritten.
    add: whether to add to the gradients of matrices and their biases or to
    overwrite them; those of norms are always added to. parts, ops, how: as
    for block_forward.
    """
    norm, attention, feedforward = parts[:3]
    x, ln, dln, dstream = a["residual2"], a["ln"], d["dln"], d["dstream"]
    norm.forward(ops, "ln2", ln, x, w, a)
    feedforward.backward(ops, dln, dstream, ln, w, a, dw, d, add, how)
    norm.backward(ops, "ln2", dstream, dln, x, w, a, dw)
    norm.forward(ops, "ln1", ln, inp, w, a)
    attention.backward(ops, dln, dstream, ln, w, a, dw, d, add, how)
    norm.backward(ops, "ln1", dstream, dln, inp, w, a, dw)


# %% [markdown]
# ## The table
#
# A model is two tables, blocks, and a last norm. Here are their tensors, in
# llm.c's order; nothing else in the package lists them. Printed are the name,
# the shape of one block's, the deviation of the first values (0 where all
# begin equal), and the name in published files.

# %% imports of the table tags=["export"] module="model.tensors"
import math

from llmnb.model.parts import STD, Tensor, block_of


# %% the table of tensors tags=["export"] module="model.tensors"
def tensor_table(cfg):
    """All tensors of a model, a list of `Tensor`, in llm.c's order."""
    if hasattr(cfg, "tensors"):  # of another family
        return cfg.tensors()
    C, Vp = cfg.channels, cfg.padded_vocab_size
    norm, attention, feedforward, *_ = block_of(cfg)
    tables = {"stacked": False, "decays": True, "std": STD}
    return [
        Tensor("wte", (Vp, C), "wte.weight", used=cfg.vocab_size, **tables),
        Tensor(
            "wpe", (cfg.max_seq_len, C), "wpe.weight", added=True, **tables
        ),
        *norm.tensors(cfg, "ln1", "h.{}.ln_1"),
        *[_of_block(x) for x in attention.tensors(cfg)],
        *norm.tensors(cfg, "ln2", "h.{}.ln_2"),
        *[_of_block(x) for x in feedforward.tensors(cfg)],
        *norm.tensors(cfg, "lnf", "ln_f", stacked=False),
    ]


def _of_block(tensor):
    return tensor._replace(there=f"h.{{}}.{tensor.there}")


# %% its shapes tags=["export"] module="model.tensors"
def full_shape(tensor, cfg):
    """The shape of a tensor with all its blocks."""
    return (cfg.num_layers,) * tensor.stacked + tensor.shape


def parameter_shapes(cfg):
    """Shapes of all parameter tensors by llm.c's names, in its order."""
    return {x.name: full_shape(x, cfg) for x in tensor_table(cfg)}


def decaying(cfg):
    """The names of the tensors that weight decay applies to: a list."""
    return [x.name for x in tensor_table(cfg) if x.decays]


# %% counts tags=["export"] module="model.tensors"
def parameter_count(cfg, padded=True):
    """How many parameters a configuration has, with or without padding."""
    count = 0
    for x in tensor_table(cfg):
        rows, *columns = full_shape(x, cfg)
        if x.used is not None and not padded:
            rows = x.used
        count += rows * math.prod(columns)
    return count


def flops_per_token(cfg, seq_len):
    """Floating-point operations to train on one token: 6 N + 6 L C T.

    N counts the parameters without padding. Six is two (multiply and add)
    for each of three products: one forward, two backward. The second term
    is attention's, with a causal mask. See (1.4.2).
    """
    weights = parameter_count(cfg, padded=False)
    if not getattr(cfg, "tied", True):  # reading a table multiplies nothing
        weights -= cfg.vocab_size * cfg.channels
    width = cfg.num_heads * cfg.head_size
    return 6 * weights + 6 * cfg.num_layers * width * seq_len


# %% what it says
from llmnb.model.tensors import (
    decaying,
    flops_per_token,
    parameter_count,
    tensor_table,
)

for x in tensor_table(GPT2Config()):
    marks = "decays" * x.decays, "added to" * x.added
    print(f"{x.name:<9} {str(x.shape):<14} {x.std:7.4f} {x.there:<24}", *marks)
cfg = GPT2Config()
counts = [parameter_count(cfg, padded) for padded in (True, False)]
known = counts == [124_475_904, 124_439_808]
verdict("parameters", known, "GPT-2's, padded and not")
most = "wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw"
verdict("decay", set(decaying(cfg)) == {*most}, "of tables and matrices")
operations = 6 * counts[1] + 6 * 12 * 768 * 1024
verdict("a token", flops_per_token(cfg, 1024) == operations, "as (1.4.2)")

# %% [markdown]
# ## Proof of a block
#
# The gradient of a block against central differences, in float64 as always,
# for the input and for each of its twelve tensors. The weights are drawn fifty
# times as wide as GPT-2's, so that every gradient is large; so is then the
# error of the differences, and the tolerance is $10^{-7}$. (All arrays begin as
# NaN, so that none can be read before it is written, but for the gradients that are
# always added to: they begin as ones. `a` and `d` are one dict: the gradients that
# stay in a block, such as `dqkv`, are those of its parts' `turns`.)

# %% one block by itself
cfg = GPT2Config(
    max_seq_len=4, vocab_size=7, num_layers=1, num_heads=2, channels=6
)
parts, B, T, C = block_of(cfg), 2, 4, 6
rng = np.random.default_rng(12)
table = [x for x in tensor_table(cfg) if x.stacked]
w = {x.name: rng.normal(size=x.shape) for x in table}
dw = {x.name: np.empty(x.shape) for x in table}
shapes = dict.fromkeys(("ln", "residual2", "residual3"), (B, T, C))
for name in ("ln1", "ln2"):
    shapes |= parts.norm.keeps(cfg, B, T, name)
for part in (parts.attention, parts.feedforward):
    shapes |= part.keeps(cfg, B, T) | part.turns(cfg, B, T)
shapes |= dict.fromkeys(("dstream", "dln"), (B, T, C))
a = d = {name: np.full(shape, np.nan) for name, shape in shapes.items()}
inp, g = rng.normal(size=(2, B, T, C))


# %% its gradient
def loss():
    block_forward(parts, reference, a["residual3"], inp, w, a)
    return (g * a["residual3"]).sum()


for x in table:
    dw[x.name].fill(1.0 if x.added else np.nan)
loss()
d["dstream"][...] = g
block_backward(parts, reference, inp, w, a, dw, d)
compare("dinp", d["dstream"], numerical_gradient(loss, inp), tol=1e-7)
first = {x.name: dw[x.name] - x.added for x in table}
for name, weight in w.items():
    want = numerical_gradient(loss, weight)
    compare(f"d{name}", first[name], want, tol=1e-7)
# and once more, added
loss()
d["dstream"][...] = g
block_backward(parts, reference, inp, w, a, dw, d, add=True)
off = [np.abs(dw[x.name] - x.added - 2 * first[x.name]).max() for x in table]
verdict("add=True", max(off) < 1e-9, "has each of them twice")

# %% [markdown]
# A wire that is missing: let the second norm hand nothing back, so that the
# stream's gradient misses one of its two shares.

# %% a share lost
want = numerical_gradient(loss, inp)


def without_ln2(ops, name, *rest):
    if name != "ln2":
        parts.norm.backward(ops, name, *rest)


lost = parts._replace(norm=parts.norm._replace(backward=without_ln2))
loss()
d["dstream"][...] = g
block_backward(lost, reference, inp, w, a, dw, d)
far = np.abs(d["dstream"] - want).max()
verdict("one share lost", far > 1e-3, "is caught")

# %% [markdown]
# ## Take away
#
# - A block is four calls of parts, for the sums are within two of them; its
#   backward pass is the list reversed, with each norm computed again.
# - The stream is read twice in each half, so its gradient has two shares: one
#   passes by, and the norm adds the other.
# - What there is to know about a tensor stands in one row.
#
# ## Design note
#
# A block could be a tree of small objects, as in most frameworks, each with
# its own arrays. Then a new model is a new tree. Here a model differs from
# another in a few words of its configuration, and the block is written once.
# The price is that a part must keep to the five things it may say. A model
# that does not fit should get a block of its own, and not make this list
# longer.
#
# ## Exercises
#
# **1** (★★). Count the parameters of a block from the table, and check
# $12C^2 + 13C$ of [chapter 1.4](04_gpt2.ipynb).
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# Sum the sizes of the rows that are stacked: $4C$ for the norms, and for the
# products $3C^2 + 3C$, $C^2 + C$, $4C^2 + 4C$ and $4C^2 + C$.
# :::

# %% exercise 1, checked tags=["hide-cell"]
C = 768
count = sum(np.prod(x.shape) for x in tensor_table(GPT2Config()) if x.stacked)
verdict("a block", count == 12 * C**2 + 13 * C, f"{count:,} parameters")

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("1.13")
