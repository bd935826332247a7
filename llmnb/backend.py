# Written by `make export` from notebooks/appendix/13_backend.py: edit that file.

"""What a model asks of the machine that it runs on."""

__all__ = [
    "BACKENDS", "Backend", "PRECISIONS", "backend_named", "choose", "noted",
    "recorded",
]


# imports of the backend
import importlib
import threading

import numpy as np

from llmnb.arena import Arena
from llmnb.checks import check_room


# which backends there are
BACKENDS = ("reference", "cpu", "cuda")
# precisions, and the backends that have them
PRECISIONS = {
    "fp32": BACKENDS,
    "fp64": ("reference", "cpu"),
    "bf16": ("cpu", "cuda"),
    "tf32": ("cuda",),
}


# calls that are noted down
class _Notes(threading.local):
    calls = None  # a list while they are written down


_notes = _Notes()


def noted(function, *args):
    """Call a function, and note the call down where `recorded` listens.

    Derived in chapter A.13.
    """
    if _notes.calls is not None:
        _notes.calls.append((function, args))
    return function(*args)


def recorded(function):
    """Call a function; returns the calls that it noted down, in order.

    Each is a function and its arguments.

    Derived in chapter A.13.
    """
    before, _notes.calls = _notes.calls, []
    try:
        function()
        return _notes.calls
    finally:
        _notes.calls = before


# what a model asks of a machine
class Backend:
    """What a model asks of the machine that it runs on; here, NumPy's.

    layers: a room of layers, such as llmnb.reference. precision: one of
    `PRECISIONS`. ops: the layers as a model calls them, how: what its
    products take besides. A room of layers that does some of this in
    another way has a class `Backend` of its own.

    Derived in chapter A.13.
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


# find a backend
def choose(what, value, choices):
    """The value, if it is among the choices; else raises ValueError.

    Derived in chapter A.13.
    """
    if value not in choices:
        listed = ", ".join(map(repr, choices))
        raise ValueError(f"{what} must be one of {listed}, got {value!r}")
    return value


def backend_named(name, precision):
    """The Backend of that name; raises ValueError for a precision it lacks.

    Derived in chapter A.13.
    """
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
