# Written by `make export` from notebooks/1_by_hand/17_model.py: edit that file.

"""GPT-2 with its gradients and its optimiser."""

__all__ = ["GPT2"]


# imports of the model
import math
from functools import partial
from numbers import Integral

import numpy as np

from llmnb.arena import footprint, put
from llmnb.backend import BACKENDS, PRECISIONS, backend_named, choose
from llmnb.checks import check_tokens
from llmnb.model.init import init_params
from llmnb.model.layout import block_activations, gpt2_layout
from llmnb.model.parts import block_backward, block_forward, block_of
from llmnb.model.tensors import tensor_table
from llmnb.reference.adamw import ADAMW_LIMITS, AdamW
from llmnb.shapes import shapes


# the passes
# what a forward pass alone never writes, so that it takes no memory
_OF_TRAINING = {"grads", "m", "v", "dacts"}


class _Passes:
    """Which layer runs when, on which arrays; machine: a Backend."""

    def __init__(self, cfg, batch_size, seq_len, machine):
        self.cfg, self.batch_size, self.seq_len = cfg, batch_size, seq_len
        self._machine, self._ends = machine, block_of(cfg)
        self._allocate(gpt2_layout(cfg, batch_size, seq_len, machine.dtype))
        self.ops, self._how = machine.ops, machine.how
        self.params, self.grads = self.memory["params"], self.memory["grads"]
        self._acts = self.memory["acts"] | self.memory["logits"]
        self._dacts = self.memory["dacts"] | self.memory["block"]
        self._batch = self.memory["batch"] | {"V": cfg.vocab_size}
        self._tables = self._filled_tables()
        self._layers = [self._layer(i) for i in range(cfg.num_layers)]
        self._blocks = [block_of(cfg, i) for i in range(cfg.num_layers)]

    def _allocate(self, layout):
        """The arena, with what the backend wants besides the tensors."""
        layout |= self._machine.groups(self.cfg, self.batch_size, self.seq_len)
        sizes = footprint(layout)
        needed = sum(sizes[x] for x in layout if x not in _OF_TRAINING)
        self.memory = self._machine.allocate(layout, needed)

    def _filled_tables(self):
        """What parts look up, written once; GPT-2 has no such tables."""
        tables, places = self._ends.tables(self.cfg, self.seq_len), {}
        for name, values in tables.items():
            places[name] = self.memory["tables"][name]
            put(places[name], values)
        return places

    def _layer(self, i):
        """Views of block i: its weights, activations, weights' gradients."""
        stacked = [x.name for x in tensor_table(self.cfg) if x.stacked]
        acts, turns = self.memory["acts"], self.memory["block"]
        own = block_activations(self.cfg, self.batch_size, self.seq_len)
        return (
            {n: self.params[n][i] for n in stacked},
            {n: acts[n][i] for n in own} | turns | self._tables,
            {n: self.grads[n][i] for n in stacked},
        )

    def _stream(self):
        """From the tokens to the end of the residual stream, normed."""
        a, p, ends = self._acts, self.params, self._ends
        x = a["encoded"]
        ends.encoder.forward(self.ops, x, self._batch["tokens"], p)
        for block, (w, acts, _) in zip(
            self._blocks, self._layers, strict=True
        ):
            out = acts["residual3"]
            block_forward(block, self.ops, out, x, w, acts, **self._how)
            x = out
        ends.norm.forward(self.ops, "lnf", a["lnf"], x, p, a)

    def _forward(self):
        a, head = self._acts, self._ends.head
        self._stream()
        head.forward(self.ops, a["logits"], a["lnf"], self.params, self._how)

    def _classify(self):
        """From the logits to each token's loss."""
        a, targets = self._acts, self._batch["targets"]
        arrays = a["losses"], a["lse"], a["logits"], targets
        self.ops.crossentropy_softmax_forward(*arrays, self.cfg.vocab_size)

    def _weigh_losses(self, share=1.0):
        """Write how much each token's loss counts in what is minimised."""
        dlosses = self._acts["dlosses"]
        self._machine.fill(dlosses, share / dlosses.size)

    def _again(self, whole, *given):
        """Call a pass, which the backend may replay from the second time on.

        Not where others watch the layers: they want to see each call.
        """
        if self.ops is self._machine.ops:
            key = whole.__name__, *given
            self._machine.again(key, partial(whole, *given))
        else:
            whole(*given)

    def _clear(self, rows):
        """Zeros for the gradients that layers add to; rows: of the table."""
        for x in rows:
            if x.added:
                self._machine.fill(self.grads[x.name], 0)

    def _head_backward(self, add):
        """From the losses back to the end of the residual stream."""
        a, p, g, d = self._acts, self.params, self.grads, self._dacts
        dln, dstream = d["dln"], d["dstream"]
        self._logits_backward(dln, add)
        self._machine.fill(dstream, 0)
        x = self._layers[-1][1]["residual3"]
        self._ends.norm.backward(self.ops, "lnf", dstream, dln, x, p, a, g)

    def _logits_backward(self, dln, add):
        """From the losses through the logits; dln: the gradient of lnf."""
        arrays = self._acts, self._batch, self.params, self.grads
        self._ends.head.backward(self.ops, dln, *arrays, add, self._how)

    def _backward(self, add=False):
        if not add:
            self._clear(tensor_table(self.cfg))
        self._head_backward(add)
        for i in reversed(range(self.cfg.num_layers)):
            self._block_backward(i, add)
        self._encoder_backward()

    def _encoder_backward(self):
        d, tokens = self._dacts["dstream"], self._batch["tokens"]
        self._ends.encoder.backward(self.ops, d, tokens, self.grads)

    def _block_backward(self, i, add):
        w, acts, dw = self._layers[i]
        x = self._layers[i - 1][1]["residual3"] if i else self._acts["encoded"]
        arrays, how = (x, w, acts, dw, self._dacts), {"add": add} | self._how
        block_backward(self._blocks[i], self.ops, *arrays, **how)


# the update
class _Updates(_Passes):
    """What AdamW does with the gradients, and a whole step."""

    def _tune(self, rule, decay):
        """Keep the settings, an AdamW, where _apply reads them.

        Returns the names in decay, or None for all, as _apply takes them.
        """
        decay = decay if decay is None else tuple(decay)
        for name in decay or ():
            choose("GPT2: a name in decay", name, self.params)
        rows = [rule, rule._replace(weight_decay=0.0)]
        self._settings = self._machine.settings(self.memory, rows)
        return decay

    def _apply(self, decay):
        """AdamW on all parameters: those in decay, or all, decay."""
        update = getattr(self.ops, self._machine.update)
        flat = [self.memory.flat(g) for g in ("params", "grads", "m", "v")]
        for start, stop, decays in self._ranges(decay):
            row = self._settings[not decays]
            update(*[x[start:stop] for x in flat], row)

    def _ranges(self, decay):
        """Ranges of the flat parameters that decay, or do not; in order.

        Neighbours in memory that are alike are one range: of the tensors
        that usually decay, which lie first, and of the others, there are two.
        """
        ranges, stop = [], 0
        for name, x in self.params.items():
            start, stop = stop, stop + x.size
            decays = decay is None or name in decay
            if ranges and ranges[-1][2] == decays:
                start = ranges.pop()[0]
            ranges.append((start, stop, decays))
        return ranges

    def _whole_step(self, max_norm, decay):
        """All of a step; nothing here waits for a GPU."""
        self._again(self._forward)
        self._again(self._classify)
        self._weigh_losses()
        self._again(self._backward)
        self._machine.clip(self.ops, self.memory.flat("grads"), max_norm)
        self._apply(decay)


# a shape
def _check_shape(cfg, batch_size, seq_len):
    """The two sizes as Python's integers; raises ValueError."""
    for name, n in (("batch_size", batch_size), ("seq_len", seq_len)):
        if not isinstance(n, Integral) or n < 1:
            raise ValueError(
                f"GPT2: {name} must be a positive integer, got {n!r}"
            )
    if seq_len > cfg.max_seq_len:
        raise ValueError(
            f"GPT2: seq_len must be at most max_seq_len = {cfg.max_seq_len}, "
            f"got {seq_len}"
        )
    return int(batch_size), int(seq_len)


# the model
class GPT2(_Updates):
    """GPT-2 with its gradients and its optimiser, in one block of memory.

    cfg: a GPT2Config. batch_size (B) and seq_len (T): the shape of every
    batch. backend: "cpu", "reference" or "cuda". precision: "fp32"; "fp64"
    on the host; for the cpu backend "bf16": float32 with the factors of all
    products rounded to bfloat16. Where the processor has no such products a
    warning says so and precision becomes "fp32". For the cuda backend
    "bf16": activations too, parameters float32; and "tf32": factors rounded
    to 10 bits after the point; both on tensor cores.
    seed: of the initial weights; None leaves them zero. Raises ValueError
    for a value out of range and MemoryError when the block cannot be had.

    params and grads map llm.c's names to arrays, memory is the arena, and
    ops holds the layers: any object with their names will do. With the cuda
    backend the arrays are the GPU's: np.asarray copies one to the host, and
    llmnb.arena.put overwrites one. Where there is no GPU a warning says so,
    and the kernels are simulated.

    Derived in chapter 1.17.
    """

    backends = BACKENDS  # of this class

    def __init__(
        self, cfg, batch_size, seq_len, backend="cpu", precision="fp32",
        seed=42,
    ):  # fmt: skip
        choose("GPT2: precision", precision, PRECISIONS)
        choose(f"{type(self).__name__}: backend", backend, self.backends)
        sizes = _check_shape(cfg, batch_size, seq_len)
        machine = backend_named(backend, precision)
        super().__init__(cfg, *sizes, machine)
        self.backend, self.precision = backend, machine.precision
        self._state, self._has_gradients = "new", False
        if seed is not None:
            self._fill_params(partial(init_params, cfg=cfg, seed=seed))

    def _fill_params(self, function):
        """Let a function write the parameters, wherever they are."""
        self._machine.write(self.params, function)

    @classmethod
    def from_checkpoint(
        cls, path, batch_size, seq_len, backend="cpu", precision="fp32",
        tokens=None, **others,
    ):  # fmt: skip
        """A GPT2 with weights from disk, in any format that is known.

        path: llm.c's .bin, a .safetensors file or the index of several, or
        a model folder; tokens: how many its tokenizer has, if rows beyond
        are to be padding; see llmnb.formats.checkpoint.open_model. others:
        what a class made of this one takes besides. Raises ValueError,
        naming the file, when its sizes do not fit; OSError when it cannot
        be read.
        """
        from llmnb.formats.checkpoint import open_model

        found = open_model(path, tokens)
        how = batch_size, seq_len, backend, precision
        model = cls(found.cfg, *how, seed=None, **others)
        model._fill_params(found.read)
        return model

    def save_checkpoint(self, path, precision="fp32"):
        """Write the parameters in the format that the name asks for.

        Hugging Face's layout for a name that ends in .safetensors, float32
        only; else llm.c's .bin, with precision "fp32" version 3, with
        "bf16" version 5, half as long. The file is written beside its place
        and renamed; when that fails the old one is untouched. Raises
        ValueError for a precision that the format lacks.
        """
        from llmnb.formats.checkpoint import write_model

        params = {n: np.asarray(x) for n, x in self.params.items()}
        write_model(path, self.cfg, params, precision)

    def forward(self, tokens, targets=None):
        """The mean loss of a batch as a float, or None without targets.

        tokens, targets: integers (B, T) in [0, V). Leaves the logits in
        `logits`. Raises TypeError or ValueError for anything else before it
        computes.
        """
        self._take(tokens, targets)
        self._again(self._forward)
        self._state = "logits"
        if targets is None:
            return None
        self._again(self._classify)
        self._state = "loss"
        return self._loss()

    def _take(self, tokens, targets):
        """Check a batch, and copy it to where the layers read it."""
        batch = {"tokens": self._checked("tokens", tokens)}
        if targets is not None:
            batch["targets"] = self._checked("targets", targets)
        self._state = "new"  # until the logits are whole
        for name, array in batch.items():
            put(self._batch[name], array)

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

    def _loss(self):
        return float(np.asarray(self._acts["losses"]).mean(dtype=np.float64))

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
        self._state, self._has_gradients = "backward", False  # until whole
        self._weigh_losses(share)
        self._again(self._backward, add)
        self._has_gradients = True

    @property
    def logits(self):
        """The logits (B, T, V) of the last forward; a view, or a copy of
        a GPU's.

        Raises RuntimeError before the first forward and after a backward,
        which puts their gradients in the same place.
        """
        self._check_logits()
        logits = self._machine.floats(self._acts["logits"])
        return logits[..., : self.cfg.vocab_size]

    def logits_at(self, position):
        """The logits (B, V) of one position of the rows; a copy.

        Raises as `logits` does.
        """
        self._check_logits()
        rows = self._acts["logits"]
        rows = [rows[i, position] for i in range(len(rows))]
        rows = [self._machine.floats(x) for x in rows]
        return np.stack(rows)[:, : self.cfg.vocab_size]

    def _check_logits(self):
        if self._state in ("new", "backward"):
            raise RuntimeError(
                "GPT2.logits: there are none before a forward or after a "
                "backward; call forward"
            )

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
        numbers = learning_rate, beta1, beta2, eps, weight_decay, step
        decay = self._tune(AdamW(*numbers), decay)
        self._check_gradients("update")
        self._apply(decay)

    @shapes("-, -, -, above 0", **ADAMW_LIMITS)
    def step(self, tokens, targets, max_norm=math.inf, decay=None, **settings):
        """Train once; returns the loss and the norm of the gradients.

        The same as forward, backward, clip_gradients(max_norm) and
        update(**settings, decay=decay), one after the other, and raises
        what they raise.
        With the cuda backend it is one launch, unless `ops` was exchanged:
        see llmnb.gpu.graph.
        """
        decay = self._tune(AdamW(**settings), decay)
        self._take(tokens, self._checked("targets", targets))
        self._state, self._has_gradients = "backward", False
        whole = partial(self._whole_step, max_norm, decay)
        if self.ops is self._machine.ops:
            self._machine.run((max_norm, decay), whole, self.params)
        else:  # others watch the layers, as in _again
            whole()
        self._has_gradients = True
        return self._loss(), self._norm()

    def _norm(self):
        """Of the gradients of the last step."""
        return self._machine.norm()
