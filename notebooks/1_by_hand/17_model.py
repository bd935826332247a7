# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       model.gpt2: "GPT-2 with its gradients and its optimiser."
# ---

# %% [markdown]
# # The model: the page, made ready for training
#
# > The same arithmetic as the page, in one block of memory and behind a guarded
# > door; its losses, its logits and every gradient are those of PyTorch.
#
# *Reading time: 30 minutes. You need: the page ([chapter 1.14](14_page.ipynb)), the
# block ([chapter 1.13](13_block.ipynb)), the arena ([chapter
# 1.16](16_memory.ipynb)) and the first weights ([chapter 1.15](15_weights.ipynb)).
# The fast versions: chapters [2.7](../2_cpu/07_step.ipynb) and
# [3.11](../3_gpu/11_step.ipynb).*
#
# ## Where we are

# %% where we are tags=["hide-input"]
from llmnb.book.diagram import gpt2_diagram

gpt2_diagram(lit="all")

# %% [markdown]
# *Figure 1.17.1. All boxes are built, all arrows are drawn, and every array has its
# place. What is left is to run the layers on the arrays, and to put a door in front.*
#
# The page of [chapter 1.14](14_page.ipynb) is GPT-2. To train for hours one wants
# more: no array that is made anew in every step, no wrong batch that trains in
# silence, gradients summed over several batches, and the freedom to exchange
# NumPy's layers for faster ones. At the end of this chapter you can
#
# - find every line of the page in the model, and say what each line more is for;
# - say which calls in which order make a training step, and what refuses any other;
# - state what it means that two programs compute the same training run, and
#   show it for this model, the page and PyTorch.
#
# ## Setup

# %% setup
import json
from pathlib import Path
from types import SimpleNamespace

from llmnb import reference
from llmnb.book.verify import compare, verdict
from llmnb.config import GPT2Config
from llmnb.reference import gpt2 as page

# %% imports of the model tags=["export"]
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

# %% [markdown]
# `choose`, `check_tokens` and the decorator `shapes` look at arguments and refuse what
# is wrong ([appendix A.9](../appendix/09_checks.ipynb)).
#
# ## The passes
#
# The first part of the model knows where the arrays are and in which order the layers
# run. It has no arithmetic of its own, and is the page once more:
#
# | the page | here |
# |---|---|
# | `forward`: the stream's first line | `encoder_forward` |
# | the eight lines of a block | `block_forward` |
# | `lnf`, `logits` | the end of `_stream`, and `_forward` |
# | `lse`, `hit`, the mean | `_classify`; the door takes the mean |
# | `backward`: from `dlogits` to the first `dx` | `_head_backward` |
# | the eight twins | `block_backward` |
# | the two lines of `wte` and `wpe` at the end | `encoder_backward` |
#
# Look for four differences.
#
# - Results go into arrays that are there already. `self._acts` holds the activations
#   of [chapter 1.16](16_memory.ipynb), `self._layers` each block's views of weights,
#   activations and gradients. (`_allocate` also adds up what a forward pass alone
#   writes, `needed`: a machine that has less than that free refuses the model.)
# - What happens within a block is left to the parts of [chapter
#   1.13](13_block.ipynb), what stands before and after all blocks to `self._ends`, and
#   the layers are `self.ops`, whoever wrote them.
#   `self._machine` answers what else depends on what the model runs on ([appendix
#   A.13](../appendix/13_backend.ipynb)); with NumPy most answers are a line. There,
#   `_again` calls a pass; elsewhere it may replay what the pass did last time.
# - The page's `dx` is one array, `dstream`, for all blocks, and the gradient of the
#   logits takes the place of the logits.
# - The page's `g` is new and all 0. Here `add` says whether gradients are added to what
#   is there, for a sum over batches, and `share` is what they are multiplied by. With
#   `add=False` most layers overwrite. Only what layers always add to is set to 0 first:
#   the LayerNorms' parameters and `wpe` (rows with `added` in the table of
#   [chapter 1.13](13_block.ipynb)), and `dstream`, once the head's product is done.
#   `wte` needs no zeros: the product at the head overwrites it, and the encoder adds to
#   that at the end.

# %% the passes tags=["exporti"]
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


# %% [markdown]
# ## The update
#
# AdamW runs over flat ranges of the parameters, those that decay and those that do
# not ([chapter 1.12](12_adamw.ipynb)). `_tune` makes two rows of settings, the first
# with weight decay and the second without; `_settings[not decays]` picks one, for
# `False` counts as 0. `_machine.update` is the name of the layer that updates, with
# NumPy `adamw_update`. `_whole_step` is a training step from the tokens to the new
# parameters.


# %% the update tags=["exporti"]
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


# %% [markdown]
# ## The door
#
# What a user of the model sees. Each method checks, calls one or two of the methods
# you have read, and answers. A word, `_state`, remembers what the arrays hold, so
# that calls in an order that makes no sense are refused:
#
# | `_state` | after | `backward` | `logits` |
# |---|---|---|---|
# | `"new"` | the model was made, or a `forward` was cut short | refused | refused |
# | `"logits"` | `forward` without targets | refused | given |
# | `"loss"` | `forward` with targets | runs | given |
# | `"backward"` | `backward`, or a whole `step` | refused | refused: their gradients have their place |
#
# So no loss is differentiated twice. `update` and `clip_gradients` need gradients that
# are whole: they are refused before the first `backward`, and after one that was cut
# short. Else they never are: which gradients are summed before a step is the caller's
# choice.
#
# The decorator `shapes` checks AdamW's numbers ([appendix
# A.9](../appendix/09_checks.ipynb)). In `step`, `_machine.run` calls the whole step;
# with NumPy that is all it does. A GPU may replay the one before, which layers of your
# own in `ops` would not see: they are called without it. Reading a model from a file,
# and writing one, is left to [Part 4](../4_practice/02_checkpoints.ipynb): two methods
# only pass it on.


# %% a shape tags=["exporti"]
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


# %% the model tags=["export"]
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


# %% [markdown]
# `forward` checks the tokens and *copies* them. The backward pass reads them again,
# and by then the caller may have changed the array. It checks all before it copies
# any, so that a batch that is refused leaves no trace. There is no `update` before the
# first `backward`: AdamW's averages would begin with a gradient of zeros.
#
# A tiny model, and its first loss. By the rule of [chapter 1.14](14_page.ipynb) it is
# nearer to $\log V$ than $0.02 \sqrt C$, about 0.05 here.

# %% a tiny GPT-2
rng = np.random.default_rng(12)
cfg = GPT2Config(
    max_seq_len=5, vocab_size=7, num_layers=2, num_heads=2, channels=6
)
model = GPT2(cfg, 2, 5, backend="reference", precision="fp64", seed=1)
tokens, targets = rng.integers(0, 7, (2, 2, 5))
first = model.forward(tokens, targets)
print(model.logits.shape)
verdict("first loss", abs(first - np.log(7)) < 0.02 * 6**0.5, "is near log 7")

# %% what is refused
for call in (
    lambda: model.forward(tokens[:, :4], targets),
    lambda: model.forward(tokens + 1, targets),
    lambda: model.forward(tokens[::-1], targets + 7),
    lambda: GPT2(cfg, 2, 6),
):
    try:
        call()
        verdict("the call", False, "is refused")
    except ValueError as error:
        print(error)

same = np.array_equal(model.memory["batch"]["tokens"], tokens)
verdict("the batch", same, "is still the first")

# %% and orders that make no sense
model.backward()
for call in (
    lambda: model.backward(),
    lambda: model.logits,
    lambda: model.forward(tokens) or model.backward(),
    lambda: GPT2(cfg, 2, 5, backend="reference").update(),
):
    try:
        call()
        verdict("the call", False, "is refused")
    except RuntimeError as error:
        print(error)

# %% [markdown]
# ## Proof: the page, bit by bit
#
# The page's gradient was proved against central differences, so the model must give
# what the page gives. In float64 both do the same operations on the same numbers in
# the same order, so they may be held to the same bits, wide weights and padded rows
# included.

# %% the model and the page
for x in model.params.values():
    x[...] = rng.normal(scale=0.5, size=x.shape)
loss = model.forward(tokens, targets)
logits = model.logits.copy()
model.backward()
p, NH, V = model.params, cfg.num_heads, cfg.vocab_size
want, kept = page.forward(p, tokens, targets, NH, V)
g = page.backward(p, tokens, targets, NH, kept)
verdict("loss", loss == want, "has the page's bits")
verdict("logits", np.array_equal(logits, kept["logits"]), "have them")
same = [np.array_equal(model.grads[name], g[name]) for name in p]
verdict(f"{len(same)} gradients", all(same), "have them")

# %% [markdown]
# A wire that is left out would show at once: a gradient that is nearly right is not
# right to the last bit. In float32 the two differ by roundings, because the layer of
# [chapter 1.9](09_gelu.ipynb) computes with a constant in double precision and the
# page does not.
#
# ## Parity with PyTorch
#
# What does it mean that two programs compute the same? Not the same bits:
# floating-point sums depend on their order, and PyTorch's order is its own. It
# means that the differences are those of rounding and nothing else, *parity* in
# short. That can be tested, because rounding has a size. A float64 number carries
# sixteen digits and a float32 number seven. A result is the work of thousands of
# roundings, most of which cancel; we leave them three digits in float64 and one in
# float32. So the two must agree to thirteen digits, and to about six. A difference
# in the mathematics (an $\epsilon$ in another place, a GELU of the other form) has
# the same size in both.
#
# The script `tests/record_parity.py` holds GPT-2 in PyTorch. It ran ten steps
# of AdamW at four configurations and stored weights, tokens, losses, logits
# and all gradients. The tests check all four, in every precision; here is one of
# the odd ones, with 51 channels and rows of 37 tokens.

# %% what PyTorch computed
recorded = np.load(Path("../../tests/data/parity_odd.npz"))
meta = json.loads(str(recorded["meta"]))
case = meta["case"]
print("torch", meta["torch"], case["model"])
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


model = ours("reference", "fp64")
for name in ("wte", "qkvw", "fcprojw"):
    compare(name, model.params[name], recorded[f"initial.{name}"], tol=2e-8)

# %% [markdown]
# Our draws differ from PyTorch's by roundings in float32: neighbours below 0.125 are
# at most $7.5 \cdot 10^{-9}$ apart, and the check allows less than three such steps.
# From weights that differ so much no two results agree to thirteen digits. To compare
# functions and not draws, we copy PyTorch's weights into the model. The distance of
# two arrays is the norm of their difference over the norm of what PyTorch computed.


# %% PyTorch's weights, and a distance
def distance(got, key):
    want = recorded[key]
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def started_as_pytorch(backend, precision):
    model = ours(backend, precision)
    for name, x in model.params.items():
        x[...] = recorded[f"initial.{name}"]
    return model


# %% logits and gradients of the first step
model = started_as_pytorch("reference", "fp64")
model.forward(inputs, answers)
apart = {"logits": distance(model.logits, "logits.fp64")}
model.backward()
for name, grad in model.grads.items():
    apart[f"d{name}"] = distance(grad, f"grads.fp64.{name}")
near = [far < 1e-13 for far in apart.values()]
verdict(f"these {len(near)}", all(near), "within 1e-13 of PyTorch's")

# %% [markdown]
# And a difference in the mathematics? Exchange one layer for another that is nearly
# the same: GELU by its exact form, $x\,\Phi(x)$ with the $\Phi$ of (1.9.1), where GPT-2
# has the tangent's (1.9.2).

# %% another GELU, in both precisions
erf = np.vectorize(math.erf)


def exact_gelu(out, inp):
    out[...] = 0.5 * inp * (1 + erf(inp / math.sqrt(2)))


for precision, tol in (("fp32", 1e-6), ("fp64", 1e-13)):
    model = started_as_pytorch("reference", precision)
    model.forward(inputs)
    far = distance(model.logits, f"logits.{precision}")
    verdict(precision, far < tol, f"within {tol:.0e}")
    others = vars(reference) | {"gelu_forward": exact_gelu}
    model.ops = SimpleNamespace(**others)
    model.forward(inputs)
    far = distance(model.logits, f"logits.{precision}")
    print(f"with the exact GELU {far:.0e}")

# %% [markdown]
# The wrong GELU is as far off in float64 as in float32. That is eight times what we
# allow float32, and eighty million times what we allow float64. With a tolerance of
# $10^{-5}$, which is usual in float32, nobody would have noticed.
#
# Ten steps of training, in float64 and float32 from PyTorch's weights, and in
# float64 from our own draws, where only the seed is shared. There the weights differ by
# $10^{-8}$ before the first step, so we allow the losses what we allow float32:


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


# %% from PyTorch's weights, and from our own
losses64 = train(started_as_pytorch("reference", "fp64"))
losses32 = train(started_as_pytorch("reference", "fp32"))
compare("ten, float64", losses64, recorded["losses.fp64"], tol=1e-13)
compare("ten, float32", losses32, recorded["losses.fp32"], tol=1e-6)
drawn = train(ours("reference", "fp64"))
compare("ten, own draws", drawn, recorded["losses.fp64"], tol=1e-6)
verdict("training", losses32[-1] < losses32[0] - 0.5, "lowers the loss")

# %% [markdown]
# ## Take away
#
# - The model is the page, with its arrays laid out beforehand and a door in front.
# - Two programs with the same operations in the same order have the same bits; that
#   is the sharpest test there is.
# - Parity is a statement about the size of differences: float64 tells
#   mathematics from rounding.
#
# ## Design note
#
# The order in which a step runs is fixed. That gives up some speed: the gradient of
# a block's weights could be computed while the next block's begins. In return the
# list on the page is what happens, and a run that goes wrong can be followed call
# by call.
#
# ## Exercises
#
# **1** (★). Let the model learn one batch by heart. How low can the loss go?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# To zero, nearly, unless the same tokens so far are followed by different
# ones in the batch. It is the quickest test that a training loop works at all.
# :::


# %% exercise 1, checked tags=["hide-cell"]
def overfit(steps=60):
    cfg = GPT2Config(16, 64, 2, 2, 32)
    model = GPT2(cfg, 2, 16, "reference", seed=3)
    batch = np.random.default_rng(0).integers(0, 64, (2, 17))
    for step in range(1, steps + 1):
        last = model.forward(batch[:, :-1], batch[:, 1:])
        model.backward()
        model.update(1e-2, 0.9, 0.99, weight_decay=0.0, step=step)
    return last


verdict("by heart", overfit() < 0.05, "loss below 0.05")

# %% [markdown]
# **2** (★★★). Two half batches, each with its own loss, should give the
# gradient of the whole batch as the mean of theirs. Show it with `add=True`,
# and say what would go wrong if every gradient were overwritten.
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# The loss is a mean over tokens, so for halves of equal size the gradient is
# the mean of the two. A `backward` that overwrites loses the first half's; with
# `add=True` the second half's come on top, and the sum is divided by 2. (With
# `share=1/2` in both calls, `backward` does that itself.) This is how one trains
# with batches that do not fit in memory.
# :::


# %% exercise 2, checked tags=["hide-cell"]
def gradient(rows, parts):
    small = GPT2Config(5, 7, 2, 2, 6)
    model = GPT2(small, len(rows) // parts, 5, "reference", "fp64")
    for i, part in enumerate(np.split(rows, parts)):
        model.forward(part, (part + 1) % 7)
        model.backward(add=i > 0)
    return model.memory.flat("grads") / parts


rows = np.random.default_rng(5).integers(0, 7, (4, 5))
compare("two halves", gradient(rows, 2), gradient(rows, 1), tol=1e-12)

# %% [markdown]
# ## Further reading
#
# - Goldberg (1991), [What Every Computer Scientist Should Know About Floating-Point
#   Arithmetic](https://doi.org/10.1145/103162.103163): where the digits go when sums
#   change their order.
#
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("1.17")
