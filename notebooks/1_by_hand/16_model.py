# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       model.gpt2: "GPT-2 with its gradients and its optimiser."
#       backend: "What a model asks of the machine that it runs on."
# ---

# %% [markdown]
# # The whole model: GPT-2, and its gradient proved
#
# > The blocks, an encoder before them and a head behind; its losses, its logits
# > and every gradient are those of PyTorch.
#
# *Reading time: 28 minutes. You need: the block
# ([chapter 1.13](13_block.ipynb)), the arena
# ([chapter 1.14](14_memory.ipynb)) and the first weights
# ([chapter 1.15](15_weights.ipynb)). The fast versions: chapters
# [2.7](../2_cpu/07_step.ipynb) and [3.11](../3_gpu/11_step.ipynb).*

# %% [markdown]
# ## Where we are

# %% where we are
from llmnb.book.diagram import gpt2_diagram

gpt2_diagram(lit="all")

# %% [markdown]
# *Figure 1.16.1. All boxes are built, and the arrows within a block are drawn.
# This chapter draws the others.*
#
# At the end of this chapter you can
#
# - walk through a training step, forward and backward;
# - say where gradients add up, and find all three such places in GPT-2;
# - prove the gradient of the whole model;
# - state what it means that two programs compute the same training run, and
#   show it for this one and PyTorch's.

# %% [markdown]
# ## Setup

# %% setup
import json
from pathlib import Path
from types import SimpleNamespace

from llmnb import reference
from llmnb.book.verify import compare, numerical_gradient, verdict
from llmnb.config import GPT2Config

# %% imports of the model tags=["export"]
import math
from functools import partial

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
# ## What it runs on
#
# The model calls layers, and has memory that they work in. Everything else
# that it asks of a machine stands in one class: how memory is had, filled and
# written, what an optimiser's settings look like, and how a whole step is run.
# Written here for NumPy, each answer is a line. A room of fast layers gives
# other answers to some of the questions, and the model need not know.

# %% imports of the backend tags=["export"] module="backend"
import importlib

import numpy as np

from llmnb.arena import Arena
from llmnb.checks import check_room

# %% what a model asks of a machine tags=["export"] module="backend"
BACKENDS = ("reference", "cpu", "cuda")
# precisions, and the backends that have them
PRECISIONS = {
    "fp32": BACKENDS,
    "fp64": ("reference", "cpu"),
    "bf16": ("cpu",),
    "tf32": ("cuda",),
}


class Backend:
    """What a model asks of the machine that it runs on; here, NumPy's.

    layers: a room of layers, such as llmnb.reference. precision: one of
    `PRECISIONS`. ops: the layers as a model calls them, how: what its
    products take besides. A room of layers that does some of this in
    another way has a class `Backend` of its own.
    """

    update = "adamw_update"  # the layer that a range of parameters goes to

    def __init__(self, layers, precision):
        self.ops, self.how, self.precision = layers, {}, precision

    @property
    def dtype(self):
        """Of parameters and activations."""
        return np.float64 if self.precision == "fp64" else np.float32

    def groups(self, cfg, batch_size, seq_len):
        """Groups of the arena that it wants besides those of the model."""
        return {}

    def allocate(self, layout, needed):
        """An Arena; needed: bytes of it that will be written at once."""
        check_room(needed)
        return Arena(layout)

    def fill(self, array, value):
        """Write one number into all elements of an array."""
        array.fill(value)

    def write(self, params, function):
        """Let a function write the parameters, a dict of NumPy arrays."""
        function(params)

    def settings(self, memory, rows):
        """What AdamW takes for each of two rows of settings."""
        return rows

    def clip(self, ops, grads, max_norm):
        """Clip the gradients within a step; `norm` knows their norm then."""
        self._norm = ops.clip_gradients(grads, max_norm)

    def norm(self):
        """The norm of the gradients that `clip` found, a float."""
        return self._norm

    def run(self, key, whole, params):
        """Call a whole step; key: what it depends on besides its arrays."""
        whole()


# %% find a backend tags=["export"] module="backend"
def choose(what, value, choices):
    """The value, if it is among the choices; else raises ValueError."""
    if value not in choices:
        listed = ", ".join(map(repr, choices))
        raise ValueError(f"{what} must be one of {listed}, got {value!r}")
    return value


def backend_named(name, precision):
    """The Backend of that name; raises ValueError for a precision it lacks."""
    if name not in PRECISIONS[precision]:
        needs = " or ".join(map(repr, PRECISIONS[precision]))
        raise ValueError(
            f"GPT2: precision {precision!r} needs the backend {needs}"
        )
    layers = importlib.import_module(f"llmnb.{name}")
    return getattr(layers, "Backend", Backend)(layers, precision)


# %% [markdown]
# ## The model
#
# Around the blocks stand the encoder before and the head after them (the last
# LayerNorm, the logits, the loss), the arena, and some care with what
# comes from outside. The class has no arithmetic of its own. It knows where the
# arrays are and in which order the layers run. Four methods are the model:
# `_forward` and `_classify` run down the diagram, `_head_backward` and
# `_backward` run up again. The others open the door, guard it, or ask AdamW to act.
#
# Reading a model from a file, and writing one, is left to
# [Part 4](../4_practice/02_checkpoints.ipynb): two methods only pass it on.

# %% choose tags=["exporti"]
# what a forward pass alone never writes, so that it takes no memory
_OF_TRAINING = {"grads", "m", "v", "dacts"}


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
        choose("GPT2: precision", precision, PRECISIONS)
        choose("GPT2: backend", backend, BACKENDS)
        _check_shape(cfg, batch_size, seq_len)
        self.cfg, self.batch_size, self.seq_len = cfg, batch_size, seq_len
        self.backend, self._machine = (
            backend,
            backend_named(backend, precision),
        )
        self.precision, self._block = self._machine.precision, block_of(cfg)
        self._allocate(
            gpt2_layout(cfg, batch_size, seq_len, self._machine.dtype)
        )
        self.ops, self._how = self._machine.ops, self._machine.how
        self.params, self.grads = self.memory["params"], self.memory["grads"]
        self._acts = self.memory["acts"] | self.memory["logits"]
        self._dacts = self.memory["dacts"] | self.memory["block"]
        self._batch = self.memory["batch"]
        self._layers = [self._layer(i) for i in range(cfg.num_layers)]
        self._state, self._has_gradients = "new", False
        if seed is not None:
            self._fill_params(partial(init_params, cfg=cfg, seed=seed))

    def _allocate(self, layout):
        """The arena, with what the backend wants besides the tensors."""
        layout |= self._machine.groups(self.cfg, self.batch_size, self.seq_len)
        sizes = footprint(layout)
        needed = sum(sizes[x] for x in layout if x not in _OF_TRAINING)
        self.memory = self._machine.allocate(layout, needed)

    def _fill_params(self, function):
        """Let a function write the parameters, wherever they are."""
        self._machine.write(self.params, function)

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
        are to be padding; see llmnb.formats.checkpoint.open_model. Raises
        ValueError, naming the file, when its sizes do not fit; OSError when
        it cannot be read.
        """
        from llmnb.formats.checkpoint import open_model

        found, sizes = open_model(path, tokens), (batch_size, seq_len)
        model = cls(found.cfg, *sizes, backend, precision, seed=None)
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
        arrays = a["losses"], a["lse"], a["logits"], targets
        self.ops.crossentropy_softmax_forward(*arrays, self.cfg.vocab_size)

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
        a, p, blocks = self._acts, self.params, self._block
        self.ops.encoder_forward(
            a["encoded"], self._batch["tokens"], p["wte"], p["wpe"]
        )
        x = a["encoded"]
        for w, acts, _ in self._layers:
            out = acts["residual3"]
            block_forward(blocks, self.ops, out, x, w, acts, **self._how)
            x = out
        blocks.norm.forward(self.ops, "lnf", a["lnf"], x, p, a)
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
            for x in tensor_table(self.cfg):
                if x.added:
                    self._machine.fill(self.grads[x.name], 0)
        self._head_backward(add, share)
        g, d, tokens = self.grads, self._dacts, self._batch["tokens"]
        for i in reversed(range(self.cfg.num_layers)):
            w, acts, dw = self._layers[i]
            x = self._layers[i - 1][1]["residual3"]
            x = x if i else self._acts["encoded"]
            arrays = x, w, acts, dw, d
            block_backward(self._block, self.ops, *arrays, add, **self._how)
        self.ops.encoder_backward(g["wte"], g["wpe"], d["dstream"], tokens)

    def _head_backward(self, add, share):
        """From the losses back to the end of the residual stream."""
        a, p, g, d = self._acts, self.params, self.grads, self._dacts
        dlogits = a["logits"]  # takes the place of the logits
        dln, dstream = d["dln"], d["dstream"]
        self._machine.fill(a["dlosses"], share / a["dlosses"].size)
        self.ops.crossentropy_softmax_backward(
            dlogits, a["dlosses"], a["logits"], a["lse"],
            self._batch["targets"], self.cfg.vocab_size,
        )  # fmt: skip
        how = {"add_dinp": False, "add_dweight": add} | self._how
        self.ops.matmul_backward(
            dln, g["wte"], None, dlogits, a["lnf"], p["wte"], **how
        )
        self._machine.fill(dstream, 0)
        x = self._layers[-1][1]["residual3"]
        self._block.norm.backward(self.ops, "lnf", dstream, dln, x, p, a, g)

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
        for name in decay or ():
            choose("GPT2: a name in decay", name, self.params)
        numbers = learning_rate, beta1, beta2, eps
        rows = [AdamW(*numbers, rate, step) for rate in (weight_decay, 0.0)]
        self._settings = self._machine.settings(self.memory, rows)

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

    @shapes("-, -, -, above 0", **ADAMW_LIMITS)
    def step(self, tokens, targets, max_norm=math.inf, **settings):
        """Train once; returns the loss and the norm of the gradients.

        The same as forward, backward, clip_gradients(max_norm) and
        update(**settings), one after the other, and raises what they raise.
        With the cuda backend it is one launch: see llmnb.gpu.graph.
        """
        self._tune(**settings)
        self._take(tokens, targets)
        decay = settings.get("decay")
        decay = decay if decay is None else tuple(decay)
        self._state, self._has_gradients = "backward", True
        whole = partial(self._whole_step, max_norm, decay)
        self._machine.run((max_norm, decay), whole, self.params)
        return self._loss(), self._machine.norm()

    def _whole_step(self, max_norm, decay):
        """All of a step; nothing here waits for a GPU."""
        self._forward()
        self._classify()
        self._backward()
        self._machine.clip(self.ops, self.memory.flat("grads"), max_norm)
        self._apply(decay)

    def _layer(self, i):
        """Views of block i: its weights, activations, weights' gradients."""
        stacked = [x.name for x in tensor_table(self.cfg) if x.stacked]
        acts, turns = self.memory["acts"], self.memory["block"]
        own = block_activations(self.cfg, self.batch_size, self.seq_len)
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
# - `_backward` walks the blocks from the last to the first. One array, `dstream`,
#   carries the gradient of the stream: it comes into a block as that of its
#   output and leaves as that of its input.
# - `_head_backward` passes the same array as logits and as their gradient.
#   [Chapter 1.11](11_crossentropy.ipynb) showed that this is safe. It is also why `logits` cannot be read
#   after `backward`, and says so.
# - The state, one word, remembers what the arrays hold, so that calls in a
#   wrong order are refused and do not return yesterday's gradient. There is
#   no `update` before the first `backward`: its moments would begin with a
#   gradient of zeros.

# %% a tiny GPT-2
rng = np.random.default_rng(12)
cfg = GPT2Config(
    max_seq_len=5, vocab_size=7, num_layers=2, num_heads=2, channels=6
)
model = GPT2(cfg, 2, 5, backend="reference", precision="fp64", seed=1)
tokens, targets = rng.integers(0, 7, (2, 2, 5))
first = model.forward(tokens, targets)
print(model.logits.shape)
verdict("first loss", abs(first - np.log(7)) < 0.04, "is near log 7")

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
# and all gradients. The tests check all four in every backend and precision;
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


model = ours("reference", "fp64")
for name in ("wte", "qkvw", "fcprojw"):
    compare(name, model.params[name], recorded[f"initial.{name}"], tol=2e-8)

# %% [markdown]
# Our draws differ from PyTorch's by roundings in float32
# ([chapter 1.15](15_weights.ipynb)), which is far too much for thirteen digits. To
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


model = started_as_pytorch("reference", "fp64")
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
# - The model is a list of calls; the backward pass is the list reversed.
# - What was read twice receives two gradients. GPT-2 has three such places in
#   kind, and central differences on the whole model watch over them.
# - The first loss is about $\log V$. The future does not reach the past.
# - Parity is a statement about the size of differences: float64 tells
#   mathematics from rounding.

# %% [markdown]
# ## Design note
#
# The class could have been a tree of small objects, a `Block` with an
# `Attention` and an `MLP`, each with its `forward` and `backward`. Frameworks
# do it so, and for a model that changes every day it pays. Here the model is
# fixed, and objects would hide the one thing this chapter is about: which
# array goes where. A list of calls shows it.
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

gained("1.16")
