# Written by `make export` from notebooks/12_model.py: edit that file.

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
def block_forward(ops, out, inp, w, a, projected):
    """One block: attention, then the feed-forward half, both residual.

    out, inp, projected: (B, T, C); projected is scratch. w and a map names
    to this block's weights and activations, as in llmnb.layout; a is
    overwritten. ops: the layers.

    Derived in chapter 12.
    """
    ops.layernorm_forward(
        a["ln1"], a["ln1_mean"], a["ln1_rstd"], inp, w["ln1w"], w["ln1b"]
    )
    ops.matmul_forward(a["qkv"], a["ln1"], w["qkvw"], w["qkvb"])
    ops.attention_forward(a["atty"], a["att_lse"], a["qkv"])
    ops.matmul_forward(projected, a["atty"], w["attprojw"], w["attprojb"])
    ops.residual_forward(a["residual2"], inp, projected)
    x = a["residual2"]
    ops.layernorm_forward(
        a["ln2"], a["ln2_mean"], a["ln2_rstd"], x, w["ln2w"], w["ln2b"]
    )
    ops.matmul_forward(a["fch"], a["ln2"], w["fcw"], w["fcb"])
    ops.gelu_forward(a["fch_gelu"], a["fch"])
    ops.matmul_forward(projected, a["fch_gelu"], w["fcprojw"], w["fcprojb"])
    ops.residual_forward(out, x, projected)


# the feed-forward half, backward
def _feedforward_backward(ops, dout, w, a, dw, d):
    ops.residual_backward(d["dresidual2"], d["dprojected"], dout)
    ops.matmul_backward(
        d["dfch_gelu"],
        dw["fcprojw"],
        dw["fcprojb"],
        d["dprojected"],
        a["fch_gelu"],
        w["fcprojw"],
    )
    ops.gelu_backward(d["dfch"], d["dfch_gelu"], a["fch"])
    ops.matmul_backward(
        d["dln"], dw["fcw"], dw["fcb"], d["dfch"], a["ln2"], w["fcw"]
    )
    ops.layernorm_backward(
        d["dresidual2"],
        dw["ln2w"],
        dw["ln2b"],
        d["dln"],
        a["residual2"],
        w["ln2w"],
        a["ln2_mean"],
        a["ln2_rstd"],
    )


# the attention half, backward
def _attention_half_backward(ops, dinp, inp, w, a, dw, d):
    d["dprojected"].fill(0)
    d["dln"].fill(0)
    ops.residual_backward(dinp, d["dprojected"], d["dresidual2"])
    ops.matmul_backward(
        d["datty"],
        dw["attprojw"],
        dw["attprojb"],
        d["dprojected"],
        a["atty"],
        w["attprojw"],
    )
    ops.attention_backward(
        d["dqkv"], d["datty"], a["qkv"], a["atty"], a["att_lse"]
    )
    ops.matmul_backward(
        d["dln"], dw["qkvw"], dw["qkvb"], d["dqkv"], a["ln1"], w["qkvw"]
    )
    ops.layernorm_backward(
        dinp,
        dw["ln1w"],
        dw["ln1b"],
        d["dln"],
        inp,
        w["ln1w"],
        a["ln1_mean"],
        a["ln1_rstd"],
    )


# one block, backward
def block_backward(ops, dinp, dout, inp, w, a, dw, d):
    """Add a block's gradients to dinp and to dw.

    dinp, dout, inp: (B, T, C). w, a: this block's weights and activations,
    as block_forward left them; dw: the gradients of its weights; d: scratch
    for the gradients of its activations, zero on entry. ops: the layers.

    Derived in chapter 12.
    """
    _feedforward_backward(ops, dout, w, a, dw, d)
    _attention_half_backward(ops, dinp, inp, w, a, dw, d)


# choose
_DTYPES = {"fp32": np.float32, "fp64": np.float64}
_BACKENDS = ("reference", "cpu")
# tensors that the blocks share: all others have a leading L
_NOT_STACKED = {"wte", "wpe", "lnfw", "lnfb"}
_SHARED = {
    "encoded",
    "projected",
    "lnf",
    "lnf_mean",
    "lnf_rstd",
    "logits",
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
    batch. backend: "cpu" or "reference". precision: "fp32" or "fp64".
    seed: of the initial weights; None leaves them zero. Raises ValueError
    for a value out of range and MemoryError when the block cannot be had.

    params and grads map llm.c's names to arrays, memory is the arena, and
    ops holds the layers: any object with their names will do.

    Derived in chapter 12.
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
        self.memory = Arena(gpt2_layout(cfg, batch_size, seq_len, dtype))
        self.params, self.grads = self.memory["params"], self.memory["grads"]
        self._acts, self._batch = self.memory["acts"], self.memory["batch"]
        self._layers = [self._layer(i) for i in range(cfg.num_layers)]
        self._state = "new"
        if seed is not None:
            init_params(self.params, cfg, seed)

    @classmethod
    def from_checkpoint(
        cls, path, batch_size, seq_len, backend="cpu", precision="fp32"
    ):
        """A GPT2 with the weights of a file in llm.c's .bin format.

        Raises ValueError, naming the file, when its header, its length or
        its sizes do not fit; FileNotFoundError when there is none.
        """
        cfg = read_config(path)
        model = cls(cfg, batch_size, seq_len, backend, precision, seed=None)
        read_checkpoint(path, model.memory.flat("params"))
        return model

    def save_checkpoint(self, path):
        """Write the parameters in float32, in the format the name asks for.

        Hugging Face's layout for a name that ends in .safetensors, else
        llm.c's .bin, version 3. The file is written beside its place and
        renamed; when that fails the old one is untouched.
        """
        if str(path).endswith(".safetensors"):
            write_safetensors(path, self.cfg, self.params)
        else:
            write_checkpoint(path, self.cfg, self.memory.flat("params"))

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
            block_forward(self.ops, out, x, w, acts, a["projected"])
            x = out
        self.ops.layernorm_forward(
            a["lnf"], a["lnf_mean"], a["lnf_rstd"], x, p["lnfw"], p["lnfb"]
        )
        self.ops.matmul_forward(a["logits"], a["lnf"], p["wte"], None)

    def backward(self):
        """Write the gradients of the last loss into `grads`.

        Raises RuntimeError unless the last call was forward with targets;
        the logits are lost.
        """
        if self._state != "loss":
            raise RuntimeError(
                "GPT2.backward: call forward(tokens, targets) first"
            )
        self._state = "backward"
        self.memory.flat("grads").fill(0)
        dx = self._head_backward()
        a, g = self._acts, self.grads
        inputs = [a["encoded"], *a["residual3"][:-1]]
        dy = self.memory["stream"]["below"]
        for x, layer in zip(inputs[::-1], self._layers[::-1], strict=True):
            w, acts, dw = layer
            dx, dy = dy, dx
            dx.fill(0)
            self.memory.flat("block").fill(0)
            d = self.memory["block"]
            block_backward(self.ops, dx, dy, x, w, acts, dw, d)
        tokens = self._batch["tokens"]
        self.ops.encoder_backward(g["wte"], g["wpe"], dx, tokens)

    def _head_backward(self):
        """From the losses back to the end of the residual stream."""
        a, p, g, ops = self._acts, self.params, self.grads, self.ops
        dlogits = a["logits"]  # takes the place of the logits
        a["dlosses"].fill(1 / a["dlosses"].size)
        ops.crossentropy_softmax_backward(
            dlogits,
            a["dlosses"],
            a["logits"],
            a["lse"],
            self._batch["targets"],
            self.cfg.vocab_size,
        )
        dlnf, dx = self.memory["block"]["dln"], self.memory["stream"]["above"]
        dlnf.fill(0)
        dx.fill(0)
        ops.matmul_backward(dlnf, g["wte"], None, dlogits, a["lnf"], p["wte"])
        ops.layernorm_backward(
            dx,
            g["lnfw"],
            g["lnfb"],
            dlnf,
            a["residual3"][-1],
            p["lnfw"],
            a["lnf_mean"],
            a["lnf_rstd"],
        )
        return dx

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
        acts = [n for n in self._acts if n not in _SHARED]
        return (
            {n: self.params[n][i] for n in stacked},
            {n: self._acts[n][i] for n in acts},
            {n: self.grads[n][i] for n in stacked},
        )
