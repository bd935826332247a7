# Written by `make export` from notebooks/1_by_hand/15_model.py: edit that file.

"""GPT-2 with its gradients and its optimiser."""

__all__ = [
    "GPT2",
    "block_backward",
    "block_forward",
]


# imports of the model
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


# one block, forward
def block_forward(ops, out, inp, w, a, **how):
    """One block: attention, then the feed-forward half, both residual.

    out, inp: (B, T, C). w and a map names to this block's weights and
    activations, as in llmnb.model.layout, with those that blocks take turns with;
    a is overwritten. ops: the layers. how: what else ops takes for its
    products, such as scratch memory.

    Derived in chapter 1.15.
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
    gradients of its activations, as in llmnb.model.layout. d["dstream"] holds the
    gradient of the output and receives that of the input; the rest of d is
    overwritten. add: whether to add to dw's matrices and their biases or to
    overwrite them; LayerNorm's are always added to. ops, how: as for
    block_forward.

    Derived in chapter 1.15.
    """
    _feedforward_backward(ops, w, a, dw, d, add, how)
    _attention_half_backward(ops, inp, w, a, dw, d, add, how)


# choose
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


# the model
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

    Derived in chapter 1.15.
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
