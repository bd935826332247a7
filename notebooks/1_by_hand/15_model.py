# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       model.gpt2: "GPT-2 with its gradients and its optimiser."
#       cuda.model: "What a whole model needs of a GPU besides its layers."
#       gpu.graph: "Launches recorded once and replayed as one."
# ---

# %% [markdown]
# # Assemble GPT-2 and prove its gradient
#
# > The layers of the chapters before make the model; its losses, its logits
# > and every gradient are those of PyTorch.

# %% [markdown]
# ## Where we are

# %% where we are
from llmnb.book.diagram import gpt2_diagram

gpt2_diagram(lit="all")

# %% [markdown]
# *Figure 1.15.1. All boxes are built. This chapter draws the arrows.*
#
# Each layer has been derived and proved alone. That leaves the wiring: which
# array goes where, in which order, and what is added to what on the way back.
# Wiring has its own mistakes, and they are quiet ones. A model with one
# gradient missing still learns, only worse. At the end of this chapter you can
#
# - write a transformer block, forward and backward, as a list of calls;
# - say where gradients add up, and find all three such places in GPT-2;
# - prove the gradient of the whole model;
# - state what it means that two programs compute the same training run, and
#   show it for this one and PyTorch's;
# - say what of a step on a GPU crosses the bus, what is launched, and what
#   a recorded graph of launches may not do.
#
# You need the arena of [chapter 1.13](13_memory.ipynb), the layers of chapters
# [1.5](05_encoder.ipynb) to [1.11](11_crossentropy.ipynb), AdamW from
# [chapter 1.12](12_adamw.ipynb) and the weights of
# [chapter 1.14](14_weights.ipynb); for the GPU, [chapter 3.1](../3_gpu/01_threads.ipynb).

# %% [markdown]
# ## Setup

# %% setup
import json
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt

from llmnb import reference
from llmnb.config import GPT2Config, parameter_count
from llmnb.book.diagram import PALETTE
from llmnb.timing import fastest, machine
from llmnb.book.verify import compare, numerical_gradient, verdict

# %% imports of the model tags=["export"]
import importlib
import math
import warnings
from functools import partial

import numpy as np

from llmnb.arena import Arena, put
from llmnb.formats.checkpoint import (
    read_checkpoint,
    read_config,
    write_checkpoint,
    write_safetensors,
)
from llmnb.checks import check_tokens
from llmnb.model.init import init_params
from llmnb.model.layout import footprint, gpt2_layout
from llmnb.reference.adamw import ADAMW_LIMITS, AdamW
from llmnb.room import check_room
from llmnb.shapes import shapes

# %% [markdown]
# ## One block, forward
#
# Read figure 1.15.1 from left to right, twice, and write down the calls. In the
# first half the token looks at others, in the second it works alone; each half
# ends by adding its result to what it started from. With $x$ for the stream of
# vectors that comes in,
#
# $$ x' = x + \mathrm{proj}(\mathrm{attention}(\mathrm{qkv}(
#    \mathrm{ln}_1(x)))) , \tag{1.15.1} $$
#
# $$ y = x' + \mathrm{down}(\mathrm{gelu}(\mathrm{up}(\mathrm{ln}_2(x')))) .
#    \tag{1.15.2} $$
#
# Here proj, qkv, up and down are the four linear layers of a block. `w` holds
# this block's weights and `a` its activations, by the names of
# [chapter 1.13](13_memory.ipynb). `ops` holds the layers: `llmnb.reference` and
# `llmnb.cpu` have the same functions, so the model is written once for both.
# Such a set of functions is called a *backend*.


# %% one block, forward tags=["export"]
def block_forward(ops, out, inp, w, a, **how):
    """One block: attention, then the feed-forward half, both residual.

    out, inp: (B, T, C). w and a map names to this block's weights and
    activations, as in llmnb.model.layout, with those that blocks take turns with;
    a is overwritten. ops: the layers. how: what else ops takes for its
    products, such as scratch memory.
    """
    _normalise(ops, "ln1", inp, w, a)
    ops.matmul_forward(a["qkv"], a["ln"], w["qkvw"], w["qkvb"], **how)
    ops.attention_forward(a["atty"], a["att_lse"], a["qkv"], **how)
    x = a["residual2"]
    weights = w["attprojw"], w["attprojb"]
    ops.matmul_forward(x, a["atty"], *weights, residual=inp, **how)
    _normalise(ops, "ln2", x, w, a)
    ops.matmul_forward(a["fch"], a["ln"], w["fcw"], w["fcb"], **how)
    ops.gelu_forward(a["fch_gelu"], a["fch"])
    weights = w["fcprojw"], w["fcprojb"]
    ops.matmul_forward(out, a["fch_gelu"], *weights, residual=x, **how)


# %% one of its two LayerNorms tags=["exporti"]
def _normalise(ops, name, inp, w, a):
    ops.layernorm_forward(
        *(a["ln"], a[f"{name}_mean"], a[f"{name}_rstd"]),
        *(inp, w[f"{name}w"], w[f"{name}b"]),
    )


# %% [markdown]
# The sums of [chapter 1.10](10_residual.ipynb) are inside the two products that
# end the halves: `residual=` adds the stream while the result is still in
# registers. Nobody needs the product alone, not even the backward pass,
# because the derivative of a sum does not depend on what was added.
#
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

# %% [markdown]
# ## One block, backward
#
# The chain rule runs through the list from the bottom to the top. Every call
# becomes its backward twin; what it wrote becomes what it reads. One rule
# needs care:
#
# > An array that was read twice receives two gradients, and they add up.
#
# It happens in three places.
#
# 1. **The stream in the second half.** $x'$ is read by `ln2` and by the
#    residual sum: $dx' = dy + \mathrm{ln}_2\text{'s share}$.
# 2. **The stream in the first half.** $x$ is read by `ln1` and by the
#    residual sum.
# 3. **The token table.** `wte` is read by the encoder and again at the logits.
#
# This is why the backward functions of this book can add to their outputs.
# For the stream it makes the code short. A residual sum hands its gradient
# on unchanged ([chapter 1.10](10_residual.ipynb)), so one array, `dstream`,
# serves for $dy$, $dx'$ and $dx$ in turn: it comes in as $dy$, each half of
# the block reads it, and LayerNorm's backward pass adds the half's share.
#
# Every other array is written by exactly one function. There adding would
# mean to clear the array first, a pass over memory for nothing, so these
# calls say `add=False` and overwrite. For gradients of weights the caller
# decides: `add=True` sums the gradients of several batches.
#
# The products read what they read before, and the outputs of LayerNorm and
# GELU are no longer there: the next block has written its own in their place
# ([chapter 1.13](13_memory.ipynb)). So they are computed again where they are
# needed, from inputs that were kept, and come out with the same bits.
#
# `dw` holds the gradients of the block's weights, and `d` those of its
# activations.


# %% the feed-forward half, backward tags=["exporti"]
def _feedforward_backward(ops, w, a, dw, d, add, how):
    dfch, dln = d["dfch"], d["dln"]
    options = {"add_dinp": False, "add_dweight": add} | how
    ops.gelu_forward(a["fch_gelu"], a["fch"])
    ops.matmul_backward(
        *(dfch, dw["fcprojw"], dw["fcprojb"]),
        *(d["dstream"], a["fch_gelu"], w["fcprojw"]),
        **options,
    )
    ops.gelu_backward(dfch, dfch, a["fch"], add=False)
    _normalise(ops, "ln2", a["residual2"], w, a)
    ops.matmul_backward(
        *(dln, dw["fcw"], dw["fcb"], dfch, a["ln"], w["fcw"]),
        **options,
    )
    ops.layernorm_backward(
        *(d["dstream"], dw["ln2w"], dw["ln2b"], dln),
        *(a["residual2"], w["ln2w"], a["ln2_mean"], a["ln2_rstd"]),
    )


# %% [markdown]
# `dfch` first receives the gradient of GELU's output, and GELU's backward
# pass then writes the gradient of its input in the same place.


# %% the attention half, backward tags=["exporti"]
def _attention_half_backward(ops, inp, w, a, dw, d, add, how):
    dln, dqkv = d["dln"], d["dqkv"]
    options = {"add_dinp": False, "add_dweight": add} | how
    ops.matmul_backward(
        *(d["datty"], dw["attprojw"], dw["attprojb"]),
        *(d["dstream"], a["atty"], w["attprojw"]),
        **options,
    )
    ops.attention_backward(
        *(dqkv, d["datty"], a["qkv"], a["atty"], a["att_lse"]),
        **{"add": False} | how,
    )
    _normalise(ops, "ln1", inp, w, a)
    ops.matmul_backward(
        *(dln, dw["qkvw"], dw["qkvb"], dqkv, a["ln"], w["qkvw"]),
        **options,
    )
    ops.layernorm_backward(
        *(d["dstream"], dw["ln1w"], dw["ln1b"], dln),
        *(inp, w["ln1w"], a["ln1_mean"], a["ln1_rstd"]),
    )


# %% one block, backward tags=["export"]
def block_backward(ops, inp, w, a, dw, d, add=False, **how):
    """Take d["dstream"] from a block's output to its input.

    inp: (B, T, C). w, a: this block's weights and activations, as
    block_forward left them; dw: the gradients of its weights; d: the
    gradients of its activations, as in llmnb.model.layout. d["dstream"] holds the
    gradient of the output and receives that of the input; the rest of d is
    overwritten. add: whether to add to dw's matrices and their biases or to
    overwrite them; LayerNorm's are always added to. ops, how: as for
    block_forward.
    """
    _feedforward_backward(ops, w, a, dw, d, add, how)
    _attention_half_backward(ops, inp, w, a, dw, d, add, how)


# %% [markdown]
# ## Proof of a block
#
# A block by itself is a function from (B, T, C) to (B, T, C). Its gradient
# against central differences, in float64 as always, for the input and for
# two tensors at the ends of it. The arena is that of a model with one block, so
# what a block keeps for itself stands at index 0:

# %% one block by itself
cfg = GPT2Config(
    max_seq_len=4, vocab_size=7, num_layers=1, num_heads=2, channels=6
)
arena = Arena(gpt2_layout(cfg, 2, 4, np.float64))
rng = np.random.default_rng(12)
shared = ("wte", "wpe", "lnfw", "lnfb")
w = {n: x[0] for n, x in arena["params"].items() if n not in shared}
dw = {n: x[0] for n, x in arena["grads"].items() if n not in shared}
a = {n: x[0] for n, x in arena["acts"].items() if len(x) == 1}
a |= arena["block"]
d = arena["dacts"] | arena["block"]
for x in w.values():
    x[...] = rng.normal(size=x.shape)
inp, g = rng.normal(size=(2, 2, 4, 6))


# %% its gradient
def loss():
    block_forward(reference, a["residual3"], inp, w, a)
    return (g * a["residual3"]).sum()


loss()
d["dstream"][...] = g
block_backward(reference, inp, w, a, dw, d)
compare("dinp", d["dstream"], numerical_gradient(loss, inp), tol=1e-7)
for name in ("qkvw", "fcprojb"):
    want = numerical_gradient(loss, w[name])
    compare(f"d{name}", dw[name], want, tol=1e-7)

# %% [markdown]
# ## The model
#
# What is left is the encoder before the blocks and the head after them (the
# last LayerNorm, the logits, the loss), the arena, and some care with what
# comes from outside. The class has no arithmetic of its own. It knows where the
# arrays are and in which order the layers run. Four methods are the model:
# `_forward` and `forward` run down the diagram, `backward` and `_head_backward`
# run up again. The others open the door, guard it, or ask AdamW to act.

# %% choose tags=["exporti"]
_BACKENDS = ("reference", "cpu", "cuda")
# precisions, and the backends that have them
_PRECISIONS = {
    "fp32": _BACKENDS,
    "fp64": ("reference", "cpu"),
    "bf16": ("cpu",),
    "tf32": ("cuda",),
}
# gradients that layers add to: backward clears them, the others it overwrites
_ADDED_TO = ("wpe", "ln1w", "ln1b", "ln2w", "ln2b", "lnfw", "lnfb")
# what a forward pass alone never writes, so that it takes no memory
_OF_TRAINING = {"grads", "m", "v", "dacts"}
# tensors that the blocks share: all others have a leading L
_NOT_STACKED = {"wte", "wpe", "lnfw", "lnfb"}
_SHARED = {
    "encoded",
    "lnf",
    "lnf_mean",
    "lnf_rstd",
    "lse",
    "losses",
    "dlosses",
}


def _choose(name, value, choices):
    if value not in choices:
        listed = ", ".join(map(repr, choices))
        raise ValueError(
            f"GPT2: {name} must be one of {listed}, got {value!r}"
        )
    return value


def _possible(precision, backend, ops):
    """The precision, or fp32 with a warning where bf16 gains nothing."""
    needs = _PRECISIONS[precision]
    if backend not in needs:
        raise ValueError(
            f"GPT2: precision {precision!r} needs the backend "
            + " or ".join(map(repr, needs))
        )
    if precision != "bf16" or ops.has_bf16():
        return precision
    warnings.warn(
        "GPT2: this processor has no bfloat16 products (AVX512-BF16); "
        "computing in fp32",
        stacklevel=3,
    )
    return "fp32"


def _check_shape(cfg, batch_size, seq_len):
    for name, n in (("batch_size", batch_size), ("seq_len", seq_len)):
        if not isinstance(n, int) or n < 1:
            raise ValueError(
                f"GPT2: {name} must be a positive integer, got {n!r}"
            )
    if seq_len > cfg.max_seq_len:
        raise ValueError(
            f"GPT2: seq_len must be at most max_seq_len = {cfg.max_seq_len}, "
            f"got {seq_len}"
        )


# %% the model tags=["export"]
class GPT2:
    """GPT-2 with its gradients and its optimiser, in one block of memory.

    cfg: a GPT2Config. batch_size (B) and seq_len (T): the shape of every
    batch. backend: "cpu", "reference" or "cuda". precision: "fp32"; "fp64"
    on the host; for the cpu backend "bf16": float32 with the factors of all
    products rounded to bfloat16. Where the processor has no such products a
    warning says so and precision becomes "fp32". For the cuda backend
    "tf32": factors rounded to 10 bits after the point, on tensor cores.
    seed: of the initial weights; None leaves them zero. Raises ValueError
    for a value out of range and MemoryError when the block cannot be had.

    params and grads map llm.c's names to arrays, memory is the arena, and
    ops holds the layers: any object with their names will do. With the cuda
    backend the arrays are the GPU's: np.asarray copies one to the host, and
    llmnb.arena.put overwrites one. Where there is no GPU a warning says so,
    and the kernels are simulated.
    """

    def __init__(
        self,
        cfg,
        batch_size,
        seq_len,
        backend="cpu",
        precision="fp32",
        seed=42,
    ):
        _choose("precision", precision, _PRECISIONS)
        _choose("backend", backend, _BACKENDS)
        _check_shape(cfg, batch_size, seq_len)
        self.cfg, self.batch_size, self.seq_len = cfg, batch_size, seq_len
        self.backend = backend
        self.ops = importlib.import_module(f"llmnb.{backend}")
        self.precision = _possible(precision, backend, self.ops)
        dtype = np.float64 if precision == "fp64" else np.float32
        self._allocate(gpt2_layout(cfg, batch_size, seq_len, dtype))
        self.params, self.grads = self.memory["params"], self.memory["grads"]
        self._acts = self.memory["acts"] | self.memory["logits"]
        self._dacts = self.memory["dacts"] | self.memory["block"]
        self._batch = self.memory["batch"]
        self._layers = [self._layer(i) for i in range(cfg.num_layers)]
        self._state, self._has_gradients, self._graphs = "new", False, {}
        if seed is not None:
            self._fill_params(partial(init_params, cfg=cfg, seed=seed))

    def _allocate(self, layout):
        """The arena, with what the backend wants besides the tensors."""
        ops, self._how = self.ops, {}
        if self.backend == "cuda":
            shape = self.cfg, self.batch_size, self.seq_len
            layout |= ops.model_layout(*shape, self.precision)
            self.memory = Arena(layout, ops.zeros)
            work = self.memory["work"]["floats"]
            self.ops = ops.model_layers(work, self.precision)
            return
        if self.backend == "cpu":
            layout["work"] = layout["params"][0], {"panels": ops.work_shape()}
        sizes = footprint(layout)
        check_room(sum(sizes[x] for x in layout if x not in _OF_TRAINING))
        self.memory = Arena(layout)
        if self.backend == "cpu":
            self._how["work"] = self.memory["work"]["panels"]
            self._how["bf16"] = self.precision == "bf16"

    def _fill_params(self, function):
        """Let a function write the parameters, by way of the host's memory."""
        here, host = self.backend != "cuda", {}
        for name, x in self.params.items():
            host[name] = x if here else np.zeros(x.shape, x.dtype)
        function(host)
        for name, x in host.items():
            if not here:
                put(self.params[name], x)

    @classmethod
    def from_checkpoint(
        cls,
        path,
        batch_size,
        seq_len,
        backend="cpu",
        precision="fp32",
        tokens=None,
    ):
        """A GPT2 with weights from disk, in any format that is known.

        path: llm.c's .bin, a .safetensors file or the index of several, or
        a model folder; tokens: how many its tokenizer has, if rows beyond
        are to be padding; see llmnb.formats.checkpoint.read_config. Raises
        ValueError, naming the file, when its sizes do not fit; OSError when
        it cannot be read.
        """
        cfg = read_config(path, tokens)
        model = cls(cfg, batch_size, seq_len, backend, precision, seed=None)
        model._fill_params(partial(read_checkpoint, path, cfg))
        return model

    def save_checkpoint(self, path, precision="fp32"):
        """Write the parameters in the format that the name asks for.

        Hugging Face's layout for a name that ends in .safetensors, float32
        only; else llm.c's .bin, with precision "fp32" version 3, with
        "bf16" version 5, half as long. The file is written beside its place
        and renamed; when that fails the old one is untouched. Raises
        ValueError for a precision that the format lacks.
        """
        known = {"fp32": 3, "bf16": 5}
        if not str(path).endswith(".safetensors"):
            version = known[_choose("precision", precision, known)]
            flat = np.asarray(self.memory.flat("params"))
            write_checkpoint(path, self.cfg, flat, version)
        elif _choose("precision", precision, ["fp32"]):
            params = {n: np.asarray(x) for n, x in self.params.items()}
            write_safetensors(path, self.cfg, params)

    def forward(self, tokens, targets=None):
        """The mean loss of a batch as a float, or None without targets.

        tokens, targets: integers (B, T) in [0, V). Leaves the logits in
        `logits`. Raises TypeError or ValueError for anything else before it
        computes.
        """
        self._take(tokens, targets)
        self._state = "logits"
        self._forward()
        if targets is None:
            return None
        self._state = "loss"
        self._classify()
        return self._loss()

    def _take(self, tokens, targets):
        """Check a batch, and copy it to where the layers read it."""
        batch = {"tokens": self._checked("tokens", tokens)}
        if targets is not None:
            batch["targets"] = self._checked("targets", targets)
        for name, array in batch.items():
            put(self._batch[name], array)

    def _classify(self):
        """From the logits to each token's loss."""
        a, targets = self._acts, self._batch["targets"]
        self.ops.crossentropy_softmax_forward(
            *(a["losses"], a["lse"], a["logits"], targets),
            self.cfg.vocab_size,
        )

    def _loss(self):
        return float(np.asarray(self._acts["losses"]).mean(dtype=np.float64))

    def _checked(self, name, tokens):
        """A batch of tokens as an array, if it can be one."""
        tokens = np.asarray(tokens)
        shape = self.batch_size, self.seq_len
        if tokens.shape != shape:
            raise ValueError(
                f"GPT2.forward: {name} must have shape {shape}, "
                f"got {tokens.shape}"
            )
        check_tokens(f"GPT2.forward: {name}", tokens, self.cfg.vocab_size)
        return tokens

    def _forward(self):
        a, p = self._acts, self.params
        self.ops.encoder_forward(
            a["encoded"], self._batch["tokens"], p["wte"], p["wpe"]
        )
        x = a["encoded"]
        for w, acts, _ in self._layers:
            out = acts["residual3"]
            block_forward(self.ops, out, x, w, acts, **self._how)
            x = out
        self.ops.layernorm_forward(
            a["lnf"], a["lnf_mean"], a["lnf_rstd"], x, p["lnfw"], p["lnfb"]
        )
        self.ops.matmul_forward(
            a["logits"], a["lnf"], p["wte"], None, **self._how
        )

    def backward(self, add=False, share=1.0):
        """Write the gradients of the last loss into `grads`.

        add: True adds them to what is there, for a sum over batches. share:
        what they are multiplied by, such as 1/n in a mean over n batches.
        Raises RuntimeError unless the last call was forward with targets;
        the logits are lost.
        """
        if self._state != "loss":
            raise RuntimeError(
                "GPT2.backward: call forward(tokens, targets) first"
            )
        self._state, self._has_gradients = "backward", True
        self._backward(add, share)

    def _backward(self, add=False, share=1.0):
        if not add:
            for name in _ADDED_TO:
                self._fill(self.grads[name], 0)
        self._head_backward(add, share)
        g, d, tokens = self.grads, self._dacts, self._batch["tokens"]
        for i in reversed(range(self.cfg.num_layers)):
            w, acts, dw = self._layers[i]
            x = self._layers[i - 1][1]["residual3"]
            x = x if i else self._acts["encoded"]
            block_backward(self.ops, x, w, acts, dw, d, add, **self._how)
        self.ops.encoder_backward(g["wte"], g["wpe"], d["dstream"], tokens)

    def _head_backward(self, add, share):
        """From the losses back to the end of the residual stream."""
        a, p, g, d = self._acts, self.params, self.grads, self._dacts
        dlogits = a["logits"]  # takes the place of the logits
        self._fill(a["dlosses"], share / a["dlosses"].size)
        self.ops.crossentropy_softmax_backward(
            *(dlogits, a["dlosses"], a["logits"], a["lse"]),
            *(self._batch["targets"], self.cfg.vocab_size),
        )
        self.ops.matmul_backward(
            *(d["dln"], g["wte"], None, dlogits, a["lnf"], p["wte"]),
            **{"add_dinp": False, "add_dweight": add} | self._how,
        )
        self._fill(d["dstream"], 0)
        stream = self._layers[-1][1]["residual3"]
        self.ops.layernorm_backward(
            *(d["dstream"], g["lnfw"], g["lnfb"], d["dln"]),
            *(stream, p["lnfw"], a["lnf_mean"], a["lnf_rstd"]),
        )

    def _fill(self, array, value):
        """NumPy's fill, or the backend's own for arrays of its own."""
        getattr(self.ops, "fill", np.ndarray.fill)(array, value)

    @property
    def logits(self):
        """The logits (B, T, V) of the last forward; a view, or a copy of
        a GPU's.

        Raises RuntimeError before the first forward and after a backward,
        which puts their gradients in the same place.
        """
        self._check_logits()
        return np.asarray(self._acts["logits"])[..., : self.cfg.vocab_size]

    def logits_at(self, position):
        """The logits (B, V) of one position of the rows; a copy.

        Raises as `logits` does.
        """
        self._check_logits()
        rows = self._acts["logits"]
        rows = [np.asarray(rows[i, position]) for i in range(len(rows))]
        return np.stack(rows)[:, : self.cfg.vocab_size]

    def _check_logits(self):
        if self._state in ("new", "backward"):
            raise RuntimeError("GPT2.logits: there are none; call forward")

    def _check_gradients(self, name):
        if not self._has_gradients:
            raise RuntimeError(f"GPT2.{name}: call backward first")

    def clip_gradients(self, max_norm):
        """Scale the gradients to a norm of at most max_norm, in place.

        Returns their norm before, as a float. Raises RuntimeError before a
        backward.
        """
        self._check_gradients("clip_gradients")
        return self.ops.clip_gradients(self.memory.flat("grads"), max_norm)

    @shapes("-", **ADAMW_LIMITS)
    def update(
        self, learning_rate=1e-4, beta1=0.9, beta2=0.999, eps=1e-8,
        weight_decay=0.01, step=1, decay=None,
    ):  # fmt: skip
        """One step of AdamW on all parameters; step counts from 1.

        decay: the names of the tensors that weight_decay applies to, or
        None for all of them. Raises ValueError for a value out of range and
        for a name that is no tensor's, RuntimeError before a backward.
        """
        numbers = learning_rate, beta1, beta2, eps
        self._tune(*numbers, weight_decay, step, decay)
        self._check_gradients("update")
        self._apply(decay)

    def _tune(
        self, learning_rate=1e-4, beta1=0.9, beta2=0.999, eps=1e-8,
        weight_decay=0.01, step=1, decay=None,
    ):  # fmt: skip
        """Check AdamW's numbers, and keep them where _apply reads them."""
        for name in () if decay is None else decay:
            _choose("a name in decay", name, self.params)
        numbers = learning_rate, beta1, beta2, eps
        rows = [AdamW(*numbers, rate, step) for rate in (weight_decay, 0.0)]
        if self.backend == "cuda":
            names, places = ("decays", "stays"), self.memory["settings"]
            for name, row in zip(names, rows, strict=True):
                put(places[name], self.ops.adamw_settings(row))
            rows = [places[name] for name in names]
        self._settings = rows

    def _apply(self, decay):
        """AdamW on all parameters: those in decay, or all, decay."""
        on_gpu = self.backend == "cuda"
        update = self.ops.adamw_apply if on_gpu else self.ops.adamw_update
        names = ["flat"] if decay is None else self.params
        for name in names:
            row = self._settings[decay is not None and name not in decay]
            update(*self._flat(name), row)

    @shapes("-, -, -, above 0", **ADAMW_LIMITS)
    def step(self, tokens, targets, max_norm=math.inf, **settings):
        """Train once; returns the loss and the norm of the gradients.

        The same as forward, backward, clip_gradients(max_norm) and
        update(**settings), one after the other, and raises what they raise.
        With the cuda backend it is one launch: see llmnb.gpu.graph.
        """
        self._tune(**settings)
        if self.backend != "cuda":
            loss = self.forward(tokens, targets)
            self.backward()
            norm = self.clip_gradients(max_norm)
            self.update(**settings)
            return loss, norm
        self._take(tokens, targets)
        decay = settings.get("decay")
        key = max_norm, decay if decay is None else tuple(decay)
        if key not in self._graphs:
            whole = partial(self._whole_step, *key)
            self._graphs[key] = self.ops.Graph(whole, self.params["wte"])
        self._state, self._has_gradients = "backward", True
        self._graphs[key]()
        return self._loss(), self.ops.gradient_norm()

    def _whole_step(self, max_norm, decay):
        """All launches of a step; nothing here waits for the GPU."""
        self._forward()
        self._classify()
        self._backward()
        self.ops.clip_apply(self.memory.flat("grads"), max_norm)
        self._apply(decay)

    def _flat(self, name):
        """params, grads, m, v as 1-D arrays: one tensor's, or all."""
        groups = ("params", "grads", "m", "v")
        if name == "flat":
            return [self.memory.flat(g) for g in groups]
        return [self.memory[g][name].reshape(-1) for g in groups]

    def _layer(self, i):
        """Views of block i: its weights, activations, weights' gradients."""
        stacked = [n for n in self.params if n not in _NOT_STACKED]
        acts, turns = self.memory["acts"], self.memory["block"]
        own = [n for n in acts if n not in _SHARED]
        return (
            {n: self.params[n][i] for n in stacked},
            {n: acts[n][i] for n in own} | turns,
            {n: self.grads[n][i] for n in stacked},
        )


# %% [markdown]
# A few lines deserve a comment.
#
# - `forward` checks the tokens and *copies* them. The backward pass reads them
#   again, and by then the caller may have changed the array. It checks all
#   before it copies any, so that a batch that is refused leaves no trace.
# - `backward` walks the blocks from the last to the first with two stream
#   arrays that change places: one holds the gradient that came from above,
#   the other receives what goes below.
# - `_head_backward` passes the same array as logits and as their gradient.
#   Chapter 1.11 showed that this is safe. It is also why `logits` cannot be read
#   after `backward`, and says so.
# - The state, one word, remembers what the arrays hold, so that calls in a
#   wrong order are refused and do not return yesterday's gradient. There is
#   no `update` before the first `backward`: its moments would begin with a
#   gradient of zeros.

# %% a tiny GPT-2
cfg = GPT2Config(
    max_seq_len=5, vocab_size=7, num_layers=2, num_heads=2, channels=6
)
model = GPT2(cfg, 2, 5, backend="reference", precision="fp64", seed=1)
tokens, targets = rng.integers(0, 7, (2, 2, 5))
first = model.forward(tokens, targets)
print(model.logits.shape)
verdict("first loss", abs(first - np.log(7)) < 0.01, "is near log 7")

# %% [markdown]
# Fresh weights are small, so are the logits, and softmax of equal logits is
# the uniform guess: the first loss of an untrained model is about $\log V$. If
# yours is not, look for the mistake before training. (A loss well *below*
# $\log V$ on fresh weights means that targets leak into the input.)

# %% what is refused
for call in (
    lambda: model.forward(tokens[:, :4], targets),
    lambda: model.forward(tokens + 1, targets),
    lambda: model.forward(tokens * 0.5, targets),
    lambda: GPT2(cfg, 2, 6),
    lambda: GPT2(cfg, 2, 5, backend="gpu"),
):
    try:
        call()
        print("accepted")
    except (TypeError, ValueError) as error:
        print(error)

# %% and an order that makes no sense
model.forward(tokens)
try:
    model.backward()
except RuntimeError as error:
    print(error)

# %% [markdown]
# ## Proof
#
# Now the gradient of the whole: every parameter of a two-block GPT-2, the
# padded rows of `wte` included, against central differences. We draw the
# weights wide, so that no gradient is too small to test; only those of the
# padded rows are zero, and must be.

# %% every parameter
for x in model.params.values():
    x[...] = rng.normal(scale=0.5, size=x.shape)
model.forward(tokens, targets)
model.backward()
flat = model.memory.flat("grads").copy()
everything = model.memory.flat("params")
want = numerical_gradient(lambda: model.forward(tokens, targets), everything)
compare(f"{flat.size} of them", flat, want, tol=1e-8)

# %% [markdown]
# Would the test notice a wire that is missing? Take out the third of the three
# sums: let the encoder's backward pass do nothing, so that `wte` receives a
# gradient only from the logits. This model would train.

# %% a wire taken out
broken = SimpleNamespace(**vars(reference))
broken.encoder_backward = lambda *arrays: None
model.ops = broken
model.forward(tokens, targets)
model.backward()
wrong = model.memory.flat("grads").copy()
model.ops = reference
try:
    compare("no encoder", wrong, want, tol=1e-8)
    caught = False
except AssertionError:
    caught = True
verdict("the mistake", caught, "is caught")

# %% [markdown]
# Central differences say that the backward pass fits the forward pass. They do
# not say that the forward pass is the one we want. That attention is causal
# has to be seen directly: change the last token, and no logit before it may
# move, not by a single bit.

# %% the future is not read
model.forward(tokens)
before = model.logits.copy()
changed = tokens.copy()
changed[:, -1] = (changed[:, -1] + 1) % 7
model.forward(changed)
same = np.array_equal(model.logits[:, :-1], before[:, :-1])
verdict("the future", same, "does not reach the past")
moved = np.abs(model.logits[:, -1] - before[:, -1]).min() > 0
verdict("the present", moved, "does move")

# %% [markdown]
# ## The same on the CPU backend
#
# Nothing to write: the model asks another module for its layers.

# %% compiled, in float64
fast = GPT2(cfg, 2, 5, backend="cpu", precision="fp64")
fast.memory.flat("params")[...] = everything
got = fast.forward(tokens, targets)
compare("loss", got, model.forward(tokens, targets), tol=1e-12)
fast.backward()
compare("all gradients", fast.memory.flat("grads"), flat, tol=1e-10)

# %% [markdown]
# ## Parity with PyTorch
#
# What does it mean that two programs compute the same? Not the same bits:
# floating-point sums depend on their order, and PyTorch's order is its own.
# It means that the differences are those of rounding and nothing else. That
# can be tested, because rounding has a size. In float64 the two must agree to
# thirteen digits, in float32 to about six; a difference in the mathematics (an
# $\epsilon$ in another place, a GELU of the other form) has the same size in
# both.
#
# The script `tests/record_parity.py` holds GPT-2 in PyTorch. It ran ten steps
# of AdamW at four configurations and stored weights, tokens, losses, logits
# and all gradients. The tests check all four in both backends and precisions;
# here is one of the odd ones, with 51 channels and rows of 37 tokens.

# %% what PyTorch computed
recorded = np.load(Path("../../tests/data/parity_odd.npz"))
meta = json.loads(str(recorded["meta"]))
case = meta["case"]
print("torch", meta["torch"])
for name, value in case["model"].items():
    print(f"{name:<13}{value:>4}")
batch = recorded["tokens"]
inputs, answers = batch[:, :-1], batch[:, 1:]


# %% the same first weights, from the seed
def ours(backend, precision):
    return GPT2(
        GPT2Config(**case["model"]),
        case["batch_size"],
        case["seq_len"],
        backend,
        precision,
        case["seed"],
    )


model = ours("cpu", "fp64")
for name in ("wte", "qkvw", "fcprojw"):
    compare(name, model.params[name], recorded[f"initial.{name}"], tol=2e-8)

# %% [markdown]
# Our draws differ from PyTorch's by roundings in float32
# ([chapter 1.14](14_weights.ipynb)), which is far too much for thirteen digits. To
# compare functions and not draws, we copy PyTorch's weights into the model.
# The distance of two arrays is the norm of their difference over the norm of
# what PyTorch computed.


# %% logits and gradients of the first step
def distance(got, key):
    want = recorded[key]
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def started_as_pytorch(backend, precision):
    model = ours(backend, precision)
    for name, x in model.params.items():
        x[...] = recorded[f"initial.{name}"]
    return model


model = started_as_pytorch("cpu", "fp64")
model.forward(inputs, answers)
apart = {"logits": distance(model.logits, "logits.fp64")}
model.backward()
for name, grad in model.grads.items():
    apart[f"d{name}"] = distance(grad, f"grads.fp64.{name}")
for name, far in apart.items():
    verdict(name, far < 1e-13, "within 1e-13 of PyTorch's")

# %% [markdown]
# Ten steps of training, in float64 and float32 from PyTorch's weights, and in
# float64 from our own draws, where only the seed is shared:


# %% ten steps
def train(model, steps=10):
    losses = []
    for step in range(1, steps + 1):
        losses.append(model.forward(inputs, answers))
        model.backward()
        model.update(
            case["learning_rate"],
            *case["betas"],
            weight_decay=case["weight_decay"],
            step=step,
        )
    return np.array(losses)


losses64 = train(started_as_pytorch("cpu", "fp64"))
losses32 = train(started_as_pytorch("cpu", "fp32"))
compare("ten, float64", losses64, recorded["losses.fp64"], tol=1e-13)
compare("ten, float32", losses32, recorded["losses.fp32"], tol=1e-6)
drawn = train(ours("cpu", "fp64"))
compare("ten, own draws", drawn, recorded["losses.fp64"], tol=1e-6)
verdict("training", losses32[-1] < losses32[0] - 0.5, "lowers the loss")

# %% [markdown]
# ## See it
#
# How large is the difference for each tensor, and how does it compare with
# what rounding alone does? PyTorch recorded the same step in float32 and in
# float64. The distance between these two is the rounding error of float32. If
# our float32 gradient is about as close to the float64 truth as PyTorch's is,
# rounding explains it.

# %% distance from the float64 gradient
model = started_as_pytorch("cpu", "fp32")
model.forward(inputs, answers)
model.backward()
us, torch = {}, {}
for name, grad in model.grads.items():
    exact = f"grads.fp64.{name}"
    us[name] = distance(grad, exact)
    torch[name] = distance(recorded[f"grads.fp32.{name}"], exact)
verdict("every tensor", max(us.values()) < 5e-6, "within 5e-06 of float64")
close = all(us[name] < 3 * torch[name] for name in us)
verdict("every tensor", close, "less than 3 x PyTorch's")

# %% draw it
fig, ax = plt.subplots(figsize=(7.5, 3.6), dpi=100)
at = np.arange(len(us))
ax.semilogy(
    at, list(torch.values()), "s", color=PALETTE["orange"], label="PyTorch"
)
ax.semilogy(at, list(us.values()), "o", color=PALETTE["blue"], label="llmnb")
ax.set_xticks(at, list(us), rotation=60, ha="right")
ax.set(
    ylim=(1e-8, 1e-5), ylabel="relative distance\nfrom the float64 gradient"
)
ax.grid(axis="y", color=PALETTE["pale"])
ax.spines[["top", "right"]].set_visible(False)
ax.legend(frameon=False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.15.2. The float32 gradients of llmnb and of PyTorch, each compared
# with PyTorch's float64 gradient, tensor by tensor. Both are off by a few
# parts in ten million, which is the rounding error of float32. Ours is often
# the larger, by less than a factor of three: our sums take another order.*

# %% [markdown]
# ## On a GPU
#
# All layers have been written a third time, for a GPU, in the chapters where
# they were derived. The two lists of calls above need no change: `ops` is
# `llmnb.cuda`. What does change is where the memory is, and who waits for
# whom.
#
# A GPU has memory of its own. Kernels reach nothing else, and the processor
# that runs Python, called the *host*, reaches it only by copies over a bus,
# which is ten to a hundred times slower than either memory. A model that
# copied its activations back and forth would do little else. So everything
# stays on the device: parameters, gradients, AdamW's averages, activations.
# In a step two small things go up, the batch and AdamW's numbers, and two
# come down, the loss of each token and the norm of the gradient.
#
# A launch does not wait. It puts a kernel into a queue and returns, and the
# GPU works the queue off in order. Only a copy to the host must wait until
# what it copies is there. Between two copies the host may run ahead.

# %% what crosses the bus in a step of GPT-2
B, T, settings = 4, 1024, 2 * 8
up = 4 * (2 * B * T + settings)
down = 4 * (B * T + 1)
stays = sum(footprint(gpt2_layout(GPT2Config(), B, T)).values())
print(f"up    {up:>14,} bytes\ndown  {down:>14,} bytes")
print(f"stays {stays:>14,} bytes")

# %% [markdown]
# ### The arena on the device
#
# The arena of [chapter 1.13](13_memory.ipynb) is a block of bytes with a table
# of names. For a GPU it gets its block from another function, and the rest
# is as it was: a slice of a device's array is a view, and so are `.view` and
# `.reshape`. Where NumPy wrote into an array, two small tools take over.
# `put`, of chapter 1.13, copies an array of the host's to the device, and
# `fill` is the shortest kernel of this book.

# %% imports of the model's GPU side tags=["export"] module="cuda.model"
import os
import warnings
from functools import partial
from inspect import signature
from types import SimpleNamespace

import numpy as np

from llmnb.cuda import adamw, attention, crossentropy, encoder, gelu
from llmnb.cuda import layernorm, matmul, residual
from llmnb.cuda.cublas import cublas_backward, cublas_forward
from llmnb.cuda.cublas import cublas_scratch, no_cublas
from llmnb.gpu.graph import Graph
from llmnb.gpu.launch import kernel, missing, simulated, to_host
from llmnb.gpu.simulator import cuda


# %% fill an array tags=["export"] module="cuda.model"
@kernel
def _fill_flat(array, value):
    i = cuda.grid(1)
    if i < array.size:
        array[i] = value


def fill(array, value):
    """Write one number into all elements of a device's array."""
    flat = array.reshape(-1)
    _fill_flat[-(-flat.size // 256), 256](flat, flat.dtype.type(value))


# %% a block of zeros tags=["export"] module="cuda.model"
def zeros(nbytes):
    """Zeroed bytes on the GPU, or else on the simulated one; for an Arena.

    Raises MemoryError when the GPU has not as many.
    """
    if missing():
        return simulated(np.zeros(nbytes, np.uint8))
    from numba import cuda as real

    try:
        block = real.device_array(nbytes, np.uint8)
    except real.cudadrv.driver.CudaAPIError as error:
        if "OUT_OF_MEMORY" in str(error):
            raise MemoryError(f"{nbytes:,} bytes on the GPU") from None
        raise
    fill(block, 0)
    return block


# %% [markdown]
# A vector of four needs an address that is a multiple of 16 bytes. That is
# why chapter 1.13 puts the tensors with rows of $C$ first in their group: if 4
# divides $C$, each of them begins at such an address, and so does each
# block's part of it.
#
# Two groups come on top. Some layers need scratch memory, for sums that
# blocks of threads pass on; none needs it for longer than its own call, so
# all share one array, as long as the longest wish. And AdamW reads its
# numbers from memory ([chapter 1.12](12_adamw.ipynb) says why), one row of
# them for tensors that decay and one for the others.
#
# Whose products? [Chapter 1.7](07_matmul.ipynb) has its own, and hands plans
# to NVIDIA's cuBLASLt where that is installed. The model takes the library's
# if it can, and the variable `LLMNB_MATMUL` chooses otherwise. Only the
# library has products in TF32 (`precision="tf32"`).


# %% is a GPU wanted in vain tags=["export"] module="cuda.model"
def no_gpu():
    """Why there is none where one is wanted; else empty.

    Empty, too, where LLMNB_CUDA=simulator asks for the simulator.
    """
    return "" if os.environ.get("LLMNB_CUDA") == "simulator" else missing()


# %% the GPU in words tags=["export"] module="cuda.model"
def gpu():
    """The name of the GPU and whose products it takes, or why there is none."""
    if missing():
        return f"none: {missing()}"
    from numba import cuda as real

    name = real.get_current_device().name
    name = name.decode() if isinstance(name, bytes) else name
    return f"{name}, products by {products()}"


# %% which products tags=["export"] module="cuda.model"
def products():
    """Whose products a GPT2 takes on a GPU: "cublas" or "llmnb".

    cuBLASLt's where it can be had, else those of chapter 1.7. The variable
    LLMNB_MATMUL chooses: ValueError when it asks for what there is not.
    """
    asked = os.environ.get("LLMNB_MATMUL", "")
    if asked not in ("", "cublas", "llmnb"):
        raise ValueError(
            f"LLMNB_MATMUL must be 'cublas' or 'llmnb', got {asked!r}"
        )
    if asked == "cublas" and no_cublas():
        raise ValueError(f"LLMNB_MATMUL asks for cuBLASLt: {no_cublas()}")
    return asked or ("llmnb" if no_cublas() else "cublas")


# %% what a model wants besides its tensors tags=["export"] module="cuda.model"
def model_layout(cfg, batch_size, seq_len, precision="fp32"):
    """Groups of the arena that a GPT2 on a GPU has besides those of others.

    work: scratch memory that the layers take turns with. settings: AdamW's
    numbers for tensors that decay, and for those that do not. Raises
    ValueError for a precision of "tf32" where it cannot be had. Where there
    is no GPU, though one is wanted, a warning says why.
    """
    if no_gpu():
        warnings.warn(
            f"GPT2: {no_gpu()}; the kernels run on the simulator, which is "
            "for tests of small models",
            stacklevel=4,
        )
    if precision == "tf32" and products() != "cublas":
        why = no_cublas() or "LLMNB_MATMUL asks for other products"
        raise ValueError(f"GPT2: precision 'tf32' needs cuBLASLt: {why}")
    B, T, C, NH = batch_size, seq_len, cfg.channels, cfg.num_heads
    wanted = [
        layernorm.layernorm_scratch(B * T, C),
        attention.attention_scratch(B, T, NH),
        adamw.clip_scratch(),
        *[matmul.matmul_scratch(B * T, n * C) for n in (1, 3, 4)],
    ]
    if products() == "cublas":
        wanted.append(cublas_scratch())
    rows = dict.fromkeys(("decays", "stays"), (adamw.adamw_scratch(),))
    return {
        "work": (np.float32, {"floats": (max(wanted),)}),
        "settings": (np.float32, rows),
    }


# %% the layers of a model tags=["export"] module="cuda.model"
LAYERS = (
    encoder, layernorm, matmul, attention, gelu, residual, crossentropy,
    adamw,
)  # fmt: skip


def model_layers(work, precision="fp32"):
    """The layers as a GPT2 calls them: none of them allocates.

    work: as `model_layout` says. precision: "fp32" or "tf32". Returns an
    object with the functions of all layers.
    """
    found = {}
    for module in LAYERS:
        for name in module.__all__:
            found[name] = getattr(module, name)
    if products() == "cublas":
        tf32 = {"tf32": precision == "tf32"}
        found["matmul_forward"] = partial(cublas_forward, **tf32)
        found["matmul_backward"] = partial(cublas_backward, **tf32)
    for name, function in found.items():
        if callable(function) and "work" in signature(function).parameters:
            found[name] = partial(function, work=work)
    norm = partial(_norm, work)
    return SimpleNamespace(**found, fill=fill, Graph=Graph, gradient_norm=norm)


def _norm(work):
    """What clip_apply has left behind."""
    return float(to_host(work[:1])[0])


# %% [markdown]
# Here is a GPT-2 of two blocks on the device. Where there is no GPU, a
# warning says so, once, and the kernels run on the simulator of
# [chapter 3.1](../3_gpu/01_threads.ipynb); we keep it quiet, so that this page reads the
# same everywhere. We also ask for our own products, because their launches
# are to be counted.

# %% a model on the device
import os


def on_gpu(cfg, batch_size, seq_len, **how):
    """A GPT2 on a GPU, or without a word on the simulated one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return GPT2(cfg, batch_size, seq_len, "cuda", **how)


os.environ["LLMNB_MATMUL"] = "llmnb"
tiny = GPT2Config(8, 61, 2, 2, 16)
gpu = on_gpu(tiny, 2, 8)
for group, size in gpu.memory.sizes().items():
    print(f"{group:<9} {size:>7,} bytes")
verdict("parameters", hasattr(gpu.params["wte"], "copy_to_host"), "on it")

# %% [markdown]
# ### The step as one graph
#
# How many launches is a step? The forward pass has a handful for each layer,
# the backward pass more, and AdamW one for each tensor. Every launch costs
# the host some microseconds of Python and driver, whatever its size. As long
# as the kernels take longer than that, the queue never runs dry and nobody
# notices. For a small model they do not, and the GPU waits for Python.
#
# But the list of launches is the same in every step: the same kernels on the
# same addresses, because nothing in the arena ever moves. So let the driver
# write the list down once, while the functions run, and then launch the
# whole list with one call. That is a *CUDA graph*. It sets three
# conditions. Nothing in it may wait for the GPU or allocate; so the batch and
# the settings are copied before the launch, and the results after it.
# Numbers among the arguments are recorded with their values; so what changes
# from step to step lies in arrays. And no decision of the host's can stand
# between two kernels.

# %% imports of the graph tags=["export"] module="gpu.graph"
import functools
import gc
import weakref

from llmnb.gpu.launch import DeviceArray, stream


# %% a graph tags=["export"] module="gpu.graph"
class Graph:
    """What a function launches, as one launch.

    function: called with nothing, it launches kernels on a device's arrays
    and does nothing else: it must not allocate, copy or wait. like: one of
    those arrays. A call runs the function as it is on the simulated GPU,
    and so does the first call on a real one, which compiles what is not
    compiled yet. The second call there records what is launched, as a CUDA
    graph, and from then on a call launches the record. A record holds
    addresses and numbers: what is to change between two calls must lie in
    the arrays. Raises RuntimeError when the driver refuses.
    """

    def __init__(self, function, like):
        self.function, self.calls, self._made = function, 0, None
        self._simulated = isinstance(like, DeviceArray)

    def __call__(self):
        self.calls += 1
        if self._simulated or self.calls == 1:
            self.function()
            return
        from cuda.bindings import driver

        if self._made is None:
            self._made = _recorded(self.function)
            weakref.finalize(self, driver.cuGraphExecDestroy, self._made)
        _asked(driver.cuGraphLaunch(self._made, _stream().handle))


# %% a stream to record on tags=["exporti"] module="gpu.graph"
@functools.cache
def _stream():
    """A stream of our own: the default one cannot be recorded.

    It waits for what was put on the default stream before, and that for it.
    """
    from numba import cuda as real

    return real.stream()


def _asked(answer):
    """What the driver answers: raise its error, or return its values."""
    code, *values = answer
    if int(code):
        raise RuntimeError(f"CUDA driver: {code.name}")
    return values[0] if len(values) == 1 else values


# %% record tags=["exporti"] module="gpu.graph"
def _recorded(function):
    """An executable graph of what a function launches; nothing runs yet."""
    from cuda.bindings import driver
    from numba import cuda as real

    place = _stream()
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    place.synchronize()
    gc.collect()  # what dies now is not freed while we record
    with real.defer_cleanup(), stream(place):
        _asked(driver.cuStreamBeginCapture(place.handle, mode))
        try:
            function()
        finally:  # leave the mode whatever happened
            answer = driver.cuStreamEndCapture(place.handle)
    graph = _asked(answer)
    try:
        return _asked(driver.cuGraphInstantiate(graph, 0))
    finally:
        driver.cuGraphDestroy(graph)


# %% [markdown]
# `GPT2.step` does with it what `forward`, `backward`, `clip_gradients` and
# `update` do one by one. On the host it calls the four. On a GPU it calls
# what is inside them, without the copies to the host in between, and that is
# what the graph records:
#
# ```text
# host   tokens, targets, settings       one launch      losses, norm
#           | copied up                     |                ^ copied down
# GPU       v       forward, losses, backward, norm and clip, AdamW
# ```
#
# The first call runs the functions as they are, so that every kernel is
# compiled and cuBLASLt has chosen its own; the second records; from then on a
# step is one launch. The stream that is recorded is not the one on which
# copies run. CUDA keeps the two in order: what is put on the default stream
# waits for the other streams, and they for it.
#
# On the simulator a call of the graph calls the functions, in the same
# order, so all but the recording itself is tested anywhere. The recording
# has not run on hardware yet. When it has, `llmnb bench --backend cuda` says
# what it is worth, and the results page shows it.
#
# ### Proof
#
# First the gradient of every tensor, against the reference in float64, with
# weights drawn wide as above. `watch` checks each access of the simulated
# GPU as it goes.

# %% every tensor, on the device
from llmnb.gpu.simulator import watch

draw = np.random.default_rng(13)
exact = GPT2(tiny, 2, 8, "reference", "fp64")
weights = draw.normal(scale=0.5, size=parameter_count(tiny))
for each in (exact, gpu):
    put(each.memory.flat("params"), weights)
batch = draw.integers(0, 61, (2, 2, 8))
with watch() as seen:
    loss, norm = gpu.step(*batch, decay=["wte", "wpe"])
compare("loss", loss, exact.forward(*batch), tol=1e-5)
exact.backward()
for name, want in exact.grads.items():
    apart = np.linalg.norm(np.asarray(gpu.grads[name]) - want)
    close = apart < 5e-6 * np.linalg.norm(want)
    verdict(f"d{name}", close, "within 5e-06 of float64")

# %% [markdown]
# `seen.launches` holds what was launched, so we can count: by the layer that
# a kernel belongs to, and what a model of any depth $L$ launches in a step.

# %% launches, counted
from collections import Counter

small = on_gpu(GPT2Config(5, 29, 1, 2, 8), 2, 5, seed=3)
data = draw.integers(0, 29, (2, 2, 5))
with watch() as one:
    small.step(*data, decay=["wte", "wpe"])
where = Counter(k.__module__.split(".")[-1] for k, *_ in seen.launches)
for name, count in sorted(where.items()):
    print(f"{name:<13} {count:>4}")
each = len(seen.launches) - len(one.launches)
rest = len(one.launches) - each
print(f"a step: {rest} + {each} L, for GPT-2 124M {rest + 12 * each}")

# %% [markdown]
# Then ten steps of training, with the losses and the norms of the CPU
# backend from the same seed. AdamW starts each run with clean averages.


# %% ten steps, on the device
def ten(model):
    how = {"learning_rate": 1e-2, "decay": ["wte", "fcw"]}
    return np.array(
        [model.step(*data, 1.0, step=k, **how) for k in range(1, 11)]
    )


got = ten(on_gpu(GPT2Config(5, 29, 1, 2, 8), 2, 5, seed=3))
want = ten(GPT2(GPT2Config(5, 29, 1, 2, 8), 2, 5, "cpu", seed=3))
compare("ten losses", got[:, 0], want[:, 0], tol=1e-5)
compare("ten norms", got[:, 1], want[:, 1], tol=1e-4)
verdict("training", got[-1, 0] < got[0, 0] - 0.5, "lowers the loss")


# %% draw a step
def lane(ax, y, boxes, colour):
    for start, width in boxes:
        ax.add_patch(
            plt.Rectangle((start, y), width, 0.7, fc=colour, ec="white")
        )


fig, axes = plt.subplots(2, 1, figsize=(7.5, 2.6), dpi=100, sharex=True)
calls = [(2 + 2 * k, 2) for k in range(12)]
kernels = [(3.7 + 2 * k, 0.9) for k in range(12)]
queue = [(4 + 0.95 * k, 0.9) for k in range(12)]
plans = ("launch by launch", calls, kernels), ("a graph", [(2, 2)], queue)
for ax, (title, host, device) in zip(axes, plans, strict=True):
    end = device[-1][0] + 0.9
    lane(ax, 1, [(0, 2), (max(end, host[-1][0] + 2), 2)], PALETTE["grey"])
    lane(ax, 1, host, PALETTE["orange"])
    lane(ax, 0, device, PALETTE["blue"])
    ax.set(xlim=(0, 31), ylim=(-0.2, 2), xticks=[], yticks=[0.35, 1.35])
    ax.set_yticklabels(["GPU", "host"])
    ax.set_title(title, loc="left", size=10)
    ax.spines[["top", "right", "bottom"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 1.15.3. A step of small kernels, drawn and not measured. Grey: copies
# of the batch and of the results; orange: launches; blue: kernels. Launched
# one by one, a kernel that takes less time than a launch leaves the GPU
# waiting for the host. As a graph the kernels follow each other.*
#
# A training run has decisions, too. It may leave out an update whose loss
# stands out, or add up the gradients of several batches
# ([chapter 1.16](16_training.ipynb)). There the four methods are called one by
# one, as on the host.

# %% [markdown]
# ## Count it
#
# [Chapter 1.4](04_gpt2.ipynb) counted $6N + 6LCT$ operations a token. Divide them
# by the time that a step takes, and you have the speed at which the machine
# works, in operations a second. The four products of a block should come near
# the speed of [chapter 1.7](07_matmul.ipynb); all that stands between them, and
# AdamW, adds time and few operations. Here is a model of 3 million parameters.

# %% a step, timed tags=["nbval-ignore-output"]
from llmnb.config import flops_per_token

cfg = GPT2Config(128, 1024, 4, 4, 256)
model = GPT2(cfg, 4, 128)
tokens = rng.integers(0, 1024, (4, 128))


def step():
    model.forward(tokens, tokens)
    model.backward()
    model.update(step=1)


step()
seconds = fastest(step, runs=3)
work = flops_per_token(cfg, 128) * tokens.size
print(machine())
print(f"{parameter_count(cfg):,} parameters, {model.memory.nbytes:,} bytes")
print(
    f"{work / seconds / 1e9:.0f} GFLOP/s, "
    f"{tokens.size / seconds:,.0f} tokens/s"
)

# %% [markdown]
# ## Take away
#
# - The model is a list of calls; the backward pass is the list reversed.
# - What was read twice receives two gradients. GPT-2 has three such places in
#   kind, and central differences on the whole model watch over them.
# - The first loss is about $\log V$. The future does not reach the past.
# - Parity is a statement about the size of differences: float64 tells
#   mathematics from rounding.
# - On a GPU everything stays where the kernels are. A batch and sixteen
#   numbers go up, losses and a norm come down, and what is launched in
#   between is the same in every step, so it can be recorded.

# %% [markdown]
# ## Design note
#
# The class could have been a tree of small objects, a `Block` with an
# `Attention` and an `MLP`, each with its `forward` and `backward`. Frameworks
# do it so, and for a model that changes every day it pays. Here the model is
# fixed, and objects would hide the one thing this chapter is about: which
# array goes where. Two lists of ten calls show it.
#
# The order in which a step runs is fixed too. That gives up some speed: the
# gradient of a block's weights could be computed while the next block's
# begins. In return the list on the page is what happens, and a run that goes
# wrong can be followed call by call.

# %% [markdown]
# ## Exercises
#
# **1** (★). Let the model learn one batch by heart. How low can the loss go?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# To zero, nearly, unless the same tokens so far are followed by different
# ones in the batch. It is the quickest test that a training loop works at all.
# :::


# %% exercise 1 tags=["hide-cell"]
def overfit(steps=60):
    cfg = GPT2Config(16, 64, 2, 2, 32)
    model = GPT2(cfg, 2, 16, seed=3)
    batch = np.random.default_rng(0).integers(0, 64, (2, 17))
    for step in range(1, steps + 1):
        last = model.forward(batch[:, :-1], batch[:, 1:])
        model.backward()
        model.update(1e-2, 0.9, 0.99, weight_decay=0.0, step=step)
    return last


# %% exercise 1, checked
verdict("by heart", overfit() < 0.05, "loss below 0.05")

# %% [markdown]
# **2** (★★). The gradient of `wte` is a sum of two. Compute the encoder's share
# and the logits' share apart, and show that they add up.
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# Run the backward pass with the encoder's backward switched off, as above:
# that leaves the logits' share. For the encoder's share give the product at
# the logits a scratch array as its `dweight`.
# :::


# %% exercise 2 tags=["hide-cell"]
def share(without):
    small = GPT2Config(5, 7, 2, 2, 6)
    model = GPT2(small, 2, 5, "reference", "fp64")
    ops = SimpleNamespace(**vars(reference))
    if without == "encoder":
        ops.encoder_backward = lambda *arrays: None
    if without == "logits":

        def only_dinp(dinp, dweight, *rest, **how):
            if dweight is model.grads["wte"]:
                dweight.fill(0)
                dweight = np.empty_like(dweight)
            reference.matmul_backward(dinp, dweight, *rest, **how)

        ops.matmul_backward = only_dinp
    model.ops = ops
    batch = np.arange(10).reshape(2, 5) % 7
    model.forward(batch, batch[::-1])
    model.backward()
    return model.grads["wte"].copy()


# %% exercise 2, checked
parts = share("encoder"), share("logits")
compare("two shares", parts[0] + parts[1], share("nothing"), tol=1e-12)
sizes = [np.abs(part).max() for part in parts]
verdict("neither", min(sizes) > 1e-4, "is zero")

# %% [markdown]
# **3** (★★★). Two half batches, each with its own loss, should give the
# gradient of the whole batch as the mean of theirs. Show it with `add=True`,
# and say what would go wrong if every gradient were overwritten.
#
# :::{admonition} Solution to exercise 3
# :class: dropdown
# The loss is a mean over tokens, so for halves of equal size the gradient is
# the mean of the two. A `backward` that overwrites loses the first half's; with
# `add=True` the second half's come on top, and the sum is divided by 2. This
# is how one trains with batches that do not fit in memory.
# :::


# %% exercise 3 tags=["hide-cell"]
def gradient(rows, parts):
    small = GPT2Config(5, 7, 2, 2, 6)
    model = GPT2(small, len(rows) // parts, 5, "reference", "fp64")
    for i, part in enumerate(np.split(rows, parts)):
        model.forward(part, (part + 1) % 7)
        model.backward(add=i > 0)
    return model.memory.flat("grads") / parts


# %% exercise 3, checked
rows = np.random.default_rng(5).integers(0, 7, (4, 5))
compare("two halves", gradient(rows, 2), gradient(rows, 1), tol=1e-12)

# %% [markdown]
# **4** (★★). On a GPU, `step` leaves out what waits between its parts. Show
# that it computes what `forward`, `backward`, `clip_gradients` and `update`
# do one by one, to the last bit. Which of these four wait for the GPU?
#
# :::{admonition} Solution to exercise 4
# :class: dropdown
# `forward`, which copies the losses to the host, and `clip_gradients`, which
# copies the norm. `backward` only launches. `update` copies numbers to the
# device and launches. The kernels and their order are the same either way,
# and each of them adds in an order of its own that never changes, so the
# bits are the same.
# :::


# %% exercise 4 tags=["hide-cell"]
def after_a_step(one_by_one):
    model = on_gpu(GPT2Config(5, 29, 1, 2, 8), 2, 5, seed=4)
    if one_by_one:
        model.forward(*data)
        model.backward()
        model.clip_gradients(0.5)
        model.update(1e-2)
    else:
        model.step(*data, 0.5, learning_rate=1e-2)
    return np.asarray(model.memory.flat("params"))


# %% exercise 4, checked
same = np.array_equal(after_a_step(True), after_a_step(False))
verdict("one by one", same, "or in one: the same bits")

# %% [markdown]
# ## Further reading
#
# - Press and Wolf (2017),
#   [Using the Output Embedding to Improve Language Models](https://arxiv.org/abs/1608.05859):
#   why one table may serve at both ends.
# - Karpathy (2024), [llm.c](https://github.com/karpathy/llm.c): `train_gpt2.c`
#   has the same list of calls in C; compare it with `block_forward`.
# - Goldberg (1991),
#   [What Every Computer Scientist Should Know About Floating-Point Arithmetic](https://doi.org/10.1145/103162.103163):
#   where the digits go when sums change their order.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("1.15")
