# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       backend: "What a model asks of the machine that it runs on."
# ---

# %% [markdown]
# # Backends: what a model asks of its machine
#
# > A room of layers and eleven short answers are all that a model needs to run on a
# > machine of another kind.
#
# *Reading time: 14 minutes. You need: the model
# ([chapter 1.17](../1_by_hand/17_model.ipynb)).*

# %% [markdown]
# ## Where we are
#
# The model of [chapter 1.17](../1_by_hand/17_model.ipynb) calls layers by their
# names, and does not know who wrote them: those in NumPy, the compiled ones of Part
# 2, or the GPU's of Part 3. Layers are most of what a model asks of a machine. The
# rest is here, in one class, so that the model has no line that begins with `if
# backend ==`. At the end of this chapter you can
#
# - name everything that a model asks of the machine that it runs on;
# - say which answers a new machine must give itself, and which it inherits;
# - run the model on layers of your own;
# - say when a pass may be replayed, and what it costs to ask each time.

# %% [markdown]
# ## Setup

# %% setup
from collections import Counter
from types import SimpleNamespace

from llmnb import cpu, reference
from llmnb.book.verify import verdict
from llmnb.config import GPT2Config
from llmnb.model.gpt2 import GPT2

# %% [markdown]
# ## The questions
#
# How is memory had, filled and written? What do an optimiser's settings look like
# there? How is a whole step run? A *room* is a folder of the package with one function
# for each layer. Written here for NumPy, most answers are a line. A
# room of layers that answers some of them in another way has a class `Backend` of its
# own, which inherits the others: [chapter 2.7](../2_cpu/07_step.ipynb) does it for
# compiled layers, [chapter 3.11](../3_gpu/11_step.ipynb) for a GPU, where a whole
# step is recorded once and then played. A room whose precisions differ in more
# than their products names a backend for one of them in `PRECISE`, as
# [chapter 3.16](../3_gpu/16_bf16_training.ipynb) does.
#
# ## The same calls again
#
# The second step of a training run does what the first one did: the same layers, on
# the same arrays, which hold other numbers. Yet before each of its calls Python
# looks the arrays up by name, and the layer asks again: are these arrays fit, do they
# overlap, where are their rows, which compiled function takes them? With wide layers
# nobody notices. For a small model it is more than a tenth of a step
# ([chapter 2.8](../2_cpu/08_time.ipynb)).
#
# The answers are those of the first step. So let the first step write down what all
# the asking came to: which functions were called in the end, and with what. The next
# step calls these, one after the other. Who does the work, a kernel or a line of
# NumPy, has itself called by `noted`, and `recorded` gathers the calls.
# A record is of one thread, so that two models may learn at once.

# %% imports of the backend tags=["export"]
import importlib
import threading

import numpy as np

from llmnb.arena import Arena
from llmnb.checks import check_room

# %% which backends there are tags=["export"]
BACKENDS = ("reference", "cpu", "cuda")
# precisions, and the backends that have them
PRECISIONS = {
    "fp32": BACKENDS,
    "fp64": ("reference", "cpu"),
    "bf16": ("cpu", "cuda"),
    "tf32": ("cuda",),
}


# %% calls that are noted down tags=["export"]
class _Notes(threading.local):
    calls = None  # a list while they are written down


_notes = _Notes()


def noted(function, *args):
    """Call a function, and note the call down where `recorded` listens."""
    if _notes.calls is not None:
        _notes.calls.append((function, args))
    return function(*args)


def recorded(function):
    """Call a function; returns the calls that it noted down, in order.

    Each is a function and its arguments.
    """
    before, _notes.calls = _notes.calls, []
    try:
        function()
        return _notes.calls
    finally:
        _notes.calls = before


# %% what a model asks of a machine tags=["export"]
class Backend:
    """What a model asks of the machine that it runs on; here, NumPy's.

    layers: a room of layers, such as llmnb.reference. precision: one of
    `PRECISIONS`. ops: the layers as a model calls them, how: what its
    products take besides. A room of layers that does some of this in
    another way has a class `Backend` of its own.
    """

    update = "adamw_update"  # the layer that a range of parameters goes to
    replays = False  # whether its layers note down all that they do

    def __init__(self, layers, precision):
        self.ops, self.how, self.precision = layers, {}, precision
        self._records = {}

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
        noted(array.fill, value)

    def floats(self, array):
        """An array of activations as the host's floats."""
        return np.asarray(array)

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

    def again(self, key, function):
        """Call what does the same each time, or replay what it did.

        key: what it depends on besides the contents of its arrays.
        """
        if not self.replays:
            function()
        elif key not in self._records:
            self._records[key] = recorded(function)
        else:
            for call, args in self._records[key]:
                call(*args)

    def run(self, key, whole, params):
        """Call a whole step; key: what it depends on besides its arrays."""
        whole()


# %% find a backend tags=["export"]
def choose(what, value, choices):
    """The value, if it is among the choices; else raises ValueError."""
    if value not in choices:
        listed = ", ".join(map(repr, choices))
        raise ValueError(f"{what} must be one of {listed}, got {value!r}")
    return value


def backend_named(name, precision):
    """The Backend of that name; raises ValueError for a precision it lacks."""
    choose("GPT2: precision", precision, PRECISIONS)
    if name not in PRECISIONS[precision]:
        needs = " or ".join(map(repr, PRECISIONS[precision]))
        raise ValueError(
            f"GPT2: precision {precision!r} needs the backend {needs}"
        )
    layers = importlib.import_module(f"llmnb.{name}")
    kind = getattr(layers, "PRECISE", {}).get(precision)
    kind = kind or getattr(layers, "Backend", Backend)
    return kind(layers, precision)


# %% [markdown]
# Replaying is right where three things hold.
#
# - *All work is noted.* What is not noted is done once and never again, so a backend
#   says with `replays` that its layers keep to it. NumPy's do not, and are called.
# - *Nothing depends on what is in the arrays.* A record has no `if`. Clipping has one,
#   for it scales only gradients that are too long; so it is no pass, and is called.
#   The same goes for numbers: AdamW's change from step to step.
# - *Nobody watches.* If `model.ops` was exchanged, as below, the new layers want to see
#   each call. It must be exchanged as a whole: that a function of the compiled room
#   itself was replaced, by `cpu.gelu_forward = ...`, no record knows.
#
# What else a pass depends on is its key: `backward` has one record for gradients
# that are written and one for gradients that are added. The arrays live as long
# as the record, and so does the scratch that a layer had allocated: a replay takes it
# again.
#
# The compiled room sets `replays`, and has answers of its own to `groups` and
# `allocate`, for the scratch of its products. The GPU's answers all but `dtype`,
# `floats` and `again` itself, and updates with another layer.
#
# Here is a record. The two passes of a model of one block call layers 27 times and
# have nine arrays filled. It comes to these calls:

# %% what a step comes to
from llmnb.backend import recorded  # the list that the package's layers know

small = GPT2Config(8, 20, num_layers=1, num_heads=2, channels=8)
model = GPT2(small, 2, 8, backend="cpu")
model.ops = SimpleNamespace(**vars(cpu))  # so that it keeps no record itself
tokens = np.arange(16).reshape(2, 8)


def passes():
    model.forward(tokens, tokens)
    model.backward()


calls = recorded(passes)
for kind, count in sorted(Counter(f.__name__ for f, _ in calls).items()):
    print(f"{kind:<20} {count:>3}")

# %% [markdown]
# `_launch` is a kernel on all threads, the two of the encoder run on one, `add_rows`
# adds up a norm's gradients and `fill` writes one number everywhere. The batch is
# copied to its place before a pass begins, and that is not noted: the same record
# serves for other tokens. On the same ones the calls lead to the same gradients, with
# no model and no layer around them:

# %% the calls alone
want = [x.copy() for x in model.grads.values()]
for x in model.grads.values():
    x.fill(7)
for function, given in calls:
    function(*given)
same = map(np.array_equal, model.grads.values(), want)
record, step_grads = calls, model.grads
verdict("all gradients", all(same), "are the same bits")

# %% [markdown]
# ## Layers of your own
#
# `ops` is looked up at each call, so any object with the layers' names will do. This one counts the
# calls of a training step, and leaves the arithmetic to NumPy.

# %% a room that counts
calls = {}


def counted(name, layer):
    def call(*args, **how):
        calls[name] = calls.get(name, 0) + 1
        return layer(*args, **how)

    return call


cfg = GPT2Config(8, 20, num_layers=3, num_heads=2, channels=8)
model = GPT2(cfg, 2, 8, backend="reference")
names = [n for n in reference.__all__ if n.endswith(("_forward", "_backward"))]
ops = {n: counted(n, getattr(reference, n)) for n in names}
model.ops = SimpleNamespace(**vars(reference) | ops)
tokens = np.arange(16).reshape(2, 8)
model.forward(tokens, tokens)
model.backward()
for name in sorted(calls):
    print(f"{name:<30} {calls[name]:>3}")

# %% [markdown]
# Three blocks have four products each, and the logits are one more: 13 calls of
# `matmul_forward`. LayerNorm runs forward 13 times and backward 7: the backward pass of each
# block computes two outputs again that were not kept.

# %% as the text says
verdict("products", calls["matmul_forward"] == 4 * 3 + 1, "are 13")
verdict("norms", calls["layernorm_forward"] == 2 * 3 + 1 + 6, "are 13")
verdict("their twins", calls["layernorm_backward"] == 2 * 3 + 1, "are 7")

# %% [markdown]
# ## Take away
#
# - A machine is a room of layers and a `Backend`; what it does not say is done as
#   NumPy does it.
# - A precision is a property of a backend: one table says who has which.
# - What is the same in every step is asked once, and what came of it is replayed.
#
# ## Exercises
#
# **1** (★). How often does a model of $L$ blocks call `matmul_backward` in a step?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# Once for each product of the forward pass: four times a block, and once for the
# logits, $4L + 1$.
# :::

# %% exercise 1, checked tags=["hide-cell"]
backward = calls["matmul_backward"]
verdict("exercise 1", backward == 4 * cfg.num_layers + 1, "are 4 L + 1")

# %% [markdown]
# **2** (★★). Give the model another bend than GELU: $x^2$ where $x$ is positive, and 0
# elsewhere. Write the two functions, put them into a room, and prove one element of
# a gradient by a central difference.
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# The slope is $2 \max(x, 0)$. `gelu_backward` adds to `dinp`, unless it is told to
# overwrite. The model in float64 has a loss that is exact enough to be differenced.
# :::

# %% exercise 2 tags=["hide-cell"]


def square_forward(out, inp):
    out[...] = np.maximum(inp, 0) ** 2


def square_backward(dinp, dout, inp, add=True):
    grad = dout * 2 * np.maximum(inp, 0)
    dinp[...] = dinp + grad if add else grad


def loss_of(model):
    return model.forward(tokens, tokens)


bent = GPT2(cfg, 2, 8, backend="reference", precision="fp64")
layers = {"gelu_forward": square_forward, "gelu_backward": square_backward}
bent.ops = SimpleNamespace(**vars(reference) | layers)
for w in bent.params.values():
    w *= 5  # so that the bend matters

# %% exercise 2, checked tags=["hide-cell"]
loss_of(bent)
bent.backward()
weight, found = bent.params["fcw"], bent.grads["fcw"][0, 0, 0]
sides = []
for step in (1e-5, -2e-5):
    weight[0, 0, 0] += step
    sides.append(loss_of(bent))
slope = (sides[0] - sides[1]) / 2e-5
verdict("the gradient", abs(slope / found - 1) < 1e-5, "is the difference's")

# %% [markdown]
# **3** (★★). In the record of the small model some fills write zeros. Why must these calls
# be in it, and what would a replay without them leave in the gradients?
#
# :::{admonition} Solution to exercise 3
# :class: dropdown
# Layers add to some gradients. Without the fills these would still hold those of the
# step before, and be the sum of both.
# :::

# %% exercise 3, checked tags=["hide-cell"]
for _ in range(2):
    for function, given in record:
        if function.__name__ != "fill":
            function(*given)
stale = map(np.array_equal, step_grads.values(), want)
verdict("exercise 3", not all(stale), "other gradients")

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("A.13")
