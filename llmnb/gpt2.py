# Written by `make export` from notebooks/13_model.py: edit that file.

"""Assemble GPT-2 and prove its gradient.

The layers of the chapters before make the model; its losses, its logits and
every gradient are those of PyTorch.
"""

__all__ = [
    "GPT2",
    "block_backward",
    "block_forward",
]


# imports of the model
import importlib
import warnings

import numpy as np

from llmnb.arena import Arena
from llmnb.checkpoint import (
    read_checkpoint,
    read_config,
    write_checkpoint,
    write_safetensors,
)
from llmnb.checks import check_tokens
from llmnb.init import init_params
from llmnb.layout import gpt2_layout


# one block, forward
def block_forward(ops, out, inp, w, a, **how):
    """One block: attention, then the feed-forward half, both residual.

    out, inp: (B, T, C). w and a map names to this block's weights and
    activations, as in llmnb.layout, with those that blocks take turns with;
    a is overwritten. ops: the layers. how: what else ops takes for its
    products, such as scratch memory.

    Derived in chapter 13.
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


# one of its two LayerNorms
def _normalise(ops, name, inp, w, a):
    ops.layernorm_forward(
        *(a["ln"], a[f"{name}_mean"], a[f"{name}_rstd"]),
        *(inp, w[f"{name}w"], w[f"{name}b"]),
    )


# the feed-forward half, backward
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


# the attention half, backward
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


# one block, backward
def block_backward(ops, inp, w, a, dw, d, add=False, **how):
    """Take d["dstream"] from a block's output to its input.

    inp: (B, T, C). w, a: this block's weights and activations, as
    block_forward left them; dw: the gradients of its weights; d: the
    gradients of its activations, as in llmnb.layout. d["dstream"] holds the
    gradient of the output and receives that of the input; the rest of d is
    overwritten. add: whether to add to dw's matrices and their biases or to
    overwrite them; LayerNorm's are always added to. ops, how: as for
    block_forward.

    Derived in chapter 13.
    """
    _feedforward_backward(ops, w, a, dw, d, add, how)
    _attention_half_backward(ops, inp, w, a, dw, d, add, how)


# choose
_DTYPES = {"fp32": np.float32, "fp64": np.float64, "bf16": np.float32}
_BACKENDS = ("reference", "cpu")
# gradients that layers add to: backward clears them, the others it overwrites
_ADDED_TO = ("wpe", "ln1w", "ln1b", "ln2w", "ln2b", "lnfw", "lnfb")
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
    if precision != "bf16":
        return precision
    if backend != "cpu":
        raise ValueError("GPT2: precision 'bf16' needs the backend 'cpu'")
    if ops.has_bf16():
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


# the model
class GPT2:
    """GPT-2 with its gradients and its optimiser, in one block of memory.

    cfg: a GPT2Config. batch_size (B) and seq_len (T): the shape of every
    batch. backend: "cpu" or "reference". precision: "fp32", "fp64", or, for
    the cpu backend, "bf16": float32 with the factors of all products rounded
    to bfloat16. Where the processor has no such products a warning says so
    and precision becomes "fp32".
    seed: of the initial weights; None leaves them zero. Raises ValueError
    for a value out of range and MemoryError when the block cannot be had.

    params and grads map llm.c's names to arrays, memory is the arena, and
    ops holds the layers: any object with their names will do.

    Derived in chapter 13.
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
        dtype = _DTYPES[_choose("precision", precision, _DTYPES)]
        _choose("backend", backend, _BACKENDS)
        _check_shape(cfg, batch_size, seq_len)
        self.cfg, self.batch_size, self.seq_len = cfg, batch_size, seq_len
        self.ops = importlib.import_module(f"llmnb.{backend}")
        self.precision = _possible(precision, backend, self.ops)
        layout = gpt2_layout(cfg, batch_size, seq_len, dtype)
        if backend == "cpu":
            layout["work"] = dtype, {"panels": self.ops.work_shape()}
        self.memory = Arena(layout)
        self._how = {}
        if backend == "cpu":
            self._how["work"] = self.memory["work"]["panels"]
            self._how["bf16"] = self.precision == "bf16"
        self.params, self.grads = self.memory["params"], self.memory["grads"]
        self._acts = self.memory["acts"] | self.memory["logits"]
        self._dacts = self.memory["dacts"] | self.memory["block"]
        self._batch = self.memory["batch"]
        self._layers = [self._layer(i) for i in range(cfg.num_layers)]
        self._state = "new"
        if seed is not None:
            init_params(self.params, cfg, seed)

    @classmethod
    def from_checkpoint(
        cls, path, batch_size, seq_len, backend="cpu", precision="fp32"
    ):
        """A GPT2 with weights from disk, in any format that is known.

        path: llm.c's .bin, a .safetensors file or the index of several, or
        a model folder; see llmnb.checkpoint.read_config. Raises ValueError,
        naming the file, when its sizes do not fit; OSError when it cannot
        be read.
        """
        cfg = read_config(path)
        model = cls(cfg, batch_size, seq_len, backend, precision, seed=None)
        read_checkpoint(path, cfg, model.params)
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
            flat = self.memory.flat("params")
            write_checkpoint(path, self.cfg, flat, version)
        elif _choose("precision", precision, ["fp32"]):
            write_safetensors(path, self.cfg, self.params)

    def forward(self, tokens, targets=None):
        """The mean loss of a batch as a float, or None without targets.

        tokens, targets: integers (B, T) in [0, V). Leaves the logits in
        `logits`. Raises TypeError or ValueError for anything else before it
        computes.
        """
        batch = {"tokens": self._checked("tokens", tokens)}
        if targets is not None:
            batch["targets"] = self._checked("targets", targets)
        for name, array in batch.items():
            self._batch[name][...] = array
        self._state = "logits"
        self._forward()
        if targets is None:
            return None
        self._state = "loss"
        a = self._acts
        self.ops.crossentropy_softmax_forward(
            a["losses"],
            a["lse"],
            a["logits"],
            self._batch["targets"],
            self.cfg.vocab_size,
        )
        return float(a["losses"].mean(dtype=np.float64))

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
        self._state = "backward"
        if not add:
            for name in _ADDED_TO:
                self.grads[name].fill(0)
        self._head_backward(add, share)
        a, g, d = self._acts, self.grads, self._dacts
        inputs = [a["encoded"], *a["residual3"][:-1]]
        for x, layer in zip(inputs[::-1], self._layers[::-1], strict=True):
            w, acts, dw = layer
            block_backward(self.ops, x, w, acts, dw, d, add, **self._how)
        tokens = self._batch["tokens"]
        self.ops.encoder_backward(g["wte"], g["wpe"], d["dstream"], tokens)

    def _head_backward(self, add, share):
        """From the losses back to the end of the residual stream."""
        a, p, g, d = self._acts, self.params, self.grads, self._dacts
        dlogits = a["logits"]  # takes the place of the logits
        a["dlosses"].fill(share / a["dlosses"].size)
        self.ops.crossentropy_softmax_backward(
            *(dlogits, a["dlosses"], a["logits"], a["lse"]),
            *(self._batch["targets"], self.cfg.vocab_size),
        )
        self.ops.matmul_backward(
            *(d["dln"], g["wte"], None, dlogits, a["lnf"], p["wte"]),
            **{"add_dinp": False, "add_dweight": add} | self._how,
        )
        d["dstream"].fill(0)
        self.ops.layernorm_backward(
            *(d["dstream"], g["lnfw"], g["lnfb"], d["dln"]),
            *(a["residual3"][-1], p["lnfw"], a["lnf_mean"], a["lnf_rstd"]),
        )

    @property
    def logits(self):
        """The logits (B, T, V) of the last forward; a view.

        Raises RuntimeError before the first forward and after a backward,
        which puts their gradients in the same place.
        """
        if self._state in ("new", "backward"):
            raise RuntimeError("GPT2.logits: there are none; call forward")
        return self._acts["logits"][..., : self.cfg.vocab_size]

    def clip_gradients(self, max_norm):
        """Scale the gradients to a norm of at most max_norm, in place.

        Returns their norm before, as a float.
        """
        return self.ops.clip_gradients(self.memory.flat("grads"), max_norm)

    def update(
        self,
        learning_rate=1e-4,
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
        weight_decay=0.01,
        step=1,
        decay=None,
    ):
        """One step of AdamW on all parameters; step counts from 1.

        decay: the names of the tensors that weight_decay applies to, or
        None for all of them. Raises ValueError for a value out of range and
        for a name that is no tensor's.
        """
        for name in () if decay is None else decay:
            _choose("a name in decay", name, self.params)
        numbers = learning_rate, beta1, beta2, eps
        if decay is None:
            groups = [("flat", weight_decay)]
        else:
            groups = [(n, weight_decay * (n in decay)) for n in self.params]
        for name, rate in groups:
            self.ops.adamw_update(*self._flat(name), *numbers, rate, step)

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
