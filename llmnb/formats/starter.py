# Written by `make export` from notebooks/4_practice/05_acceptance.py: edit that file.

"""llm.c's starter pack: a state to compare with."""

__all__ = [
    "Check", "DebugState", "LOSSES", "accept", "read_debug_state",
    "relative_error", "write_debug_state",
]


# imports of the starter pack
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llmnb.checks import check_tokens
from llmnb.config import GPT2Config
from llmnb.files import read_small, replacing
from llmnb.formats.checkpoint import read_config
from llmnb.formats.llmc import HEADER_BYTES, check_header
from llmnb.formats.llmc import header_of, read_header
from llmnb.model.gpt2 import GPT2
from llmnb.model.tensors import parameter_shapes


# the debug state
_MAGIC, _VERSION = 20240327, 2


class DebugState(NamedTuple):
    """A batch, and what a model makes of it.

    tokens, targets: int32 (B, T). logits: float32 (B, T, V). loss: a float.
    grads: a mapping from the 16 names to float32 arrays.

    Derived in chapter 4.5.
    """

    tokens: np.ndarray
    targets: np.ndarray
    logits: np.ndarray
    loss: float
    grads: dict


# its parts
_KINDS = {"tokens": "<i4", "targets": "<i4"}  # all else is float32


def _parts(cfg, B, T):
    """The shapes of what stands behind the header, in order."""
    return {
        "tokens": (B, T),
        "targets": (B, T),
        "logits": (B, T, cfg.vocab_size),
        "loss": (1,),
        **parameter_shapes(cfg),
    }


# read a debug state
def read_debug_state(path, cfg):
    """Map llm.c's debug state of a model into memory, read only.

    cfg: the model's configuration, which fixes V and the gradients' shapes.
    Returns a DebugState. Raises ValueError, naming the file, when it is none
    of version 2, when its length is not what B, T and cfg require, and for
    tokens that the model lacks.

    Derived in chapter 4.5.
    """
    size, _, B, T = read_header(path, _MAGIC, [_VERSION], 3)
    parts, longest = _parts(cfg, B, T), cfg.max_seq_len
    right = HEADER_BYTES + 4 * sum(map(math.prod, parts.values()))
    rows = (
        (B > 0, "batch size", "positive", B),
        (0 < T <= longest, "length", f"in [1, {longest}]", T),
        (size == right, "size for this model", f"{right} bytes", size),
    )
    check_header(path, _MAGIC, rows)
    arrays, at = {}, HEADER_BYTES
    for name, shape in parts.items():
        arrays[name] = np.memmap(path, _KINDS.get(name, "<f4"), "r", at, shape)
        at += arrays[name].nbytes
    for name in _KINDS:
        check_tokens(f"{path}: {name}", arrays[name], cfg.vocab_size)
    tokens, targets, logits, loss = map(arrays.pop, [*parts][:4])
    return DebugState(tokens, targets, logits, float(loss[0]), arrays)


# write a debug state
def write_debug_state(path, cfg, state):
    """Write a DebugState in llm.c's format, version 2.

    Raises ValueError when an array has not the shape that cfg requires, and
    for tokens that the model lacks; TypeError when they are no integers. The
    file appears whole or not at all.

    Derived in chapter 4.5.
    """
    arrays = state._asdict() | {"loss": np.array([state.loss])}
    arrays |= arrays.pop("grads")
    B, T = state.tokens.shape
    parts = _parts(cfg, B, T)
    for name, shape in parts.items():
        if arrays[name].shape != shape:
            raise ValueError(
                f"write_debug_state: {name} must have shape {shape}, "
                f"got {arrays[name].shape}"
            )
    for name in _KINDS:
        label = f"write_debug_state: {name}"
        check_tokens(label, arrays[name], cfg.vocab_size)
    with replacing(path) as file:
        file.write(header_of(_MAGIC, _VERSION, B, T).data)
        for name in parts:
            kind = _KINDS.get(name, "<f4")
            file.write(np.ascontiguousarray(arrays[name], kind).data)


# one check
class Check(NamedTuple):
    """One line of the acceptance test.

    error: the largest difference, divided by the largest element of what
    was expected; None where nothing was. allowed: the tolerance.

    Derived in chapter 4.5.
    """

    name: str
    error: float | None
    allowed: float

    @property
    def ok(self):
        """Whether the error is allowed; NaN is not. None without one."""
        return None if self.error is None else self.error <= self.allowed


# the tolerances
_LOGITS, _LOSS, _GRADIENT, _LATER = 2e-5, 1e-5, 1e-4, 1e-4
_FLOOR = 1e-3  # a tensor whose numbers are smaller is measured against this


def relative_error(got, want):
    """max|got - want| / max|want|; NaN if there is one.

    Where max|want| is below 1e-3, that takes its place: a gradient that is
    zero but for rounding has no size of its own.

    Derived in chapter 4.5.
    """
    scale = np.maximum(np.max(np.abs(want)), _FLOOR)
    return float(np.max(np.abs(np.subtract(got, want))) / scale)


# find the pack
_STATE = "_debug_state.bin"


def _find_pack(folder):
    """The paths of a pack's model, debug state and losses."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    states = sorted(Path(folder).glob("*" + _STATE))
    if len(states) != 1:
        raise ValueError(
            f"{folder}: must hold one file *{_STATE}, got {len(states)}"
        )
    name = states[0].name.removesuffix(_STATE)
    beside = states[0].with_name
    return beside(f"{name}.bin"), states[0], beside(f"{name}_losses.txt")


# what the losses should be
# llm.c's ten losses of GPT-2 124M on its starter pack
LOSSES = (
    5.270007, 4.059707, 3.375123, 2.800783, 2.315382,
    1.849029, 1.394656, 0.999147, 0.624080, 0.376511,
)  # fmt: skip


def _expected(path, cfg, state):
    """Ten losses to compare with, or ten times None."""
    if path.exists():
        words = read_small(path, 1 << 16).decode("ascii", "replace").split()
        try:
            losses = [float(word) for word in words]
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if len(losses) != 10:
            raise ValueError(f"{path}: must hold 10 losses, got {len(losses)}")
        return losses
    known = cfg == GPT2Config() and state.tokens.shape == (4, 64)
    if known and abs(state.loss - LOSSES[0]) < 1e-3:
        return LOSSES
    return [None] * 10


# the acceptance test
def accept(folder, backend="cpu"):
    """Run llm.c's acceptance test on a starter pack: an iterator of Checks.

    folder: holds NAME.bin and NAME_debug_state.bin, and perhaps
    NAME_losses.txt with ten losses. The logits, the loss and the 16
    gradients of the state's batch are compared, and then the losses of ten
    steps of AdamW on it. Raises OSError or ValueError for a missing or a
    damaged file at once; the checks are computed as they are asked for.

    Derived in chapter 4.5.
    """
    path, state_path, losses_path = _find_pack(folder)
    cfg = read_config(path)
    state = read_debug_state(state_path, cfg)
    expected = _expected(losses_path, cfg, state)
    model = GPT2.from_checkpoint(path, *state.tokens.shape, backend)
    return _checks(model, state, expected)


# what is compared
def _checks(model, state, expected):
    """Logits, loss and gradients of a state's batch, and ten losses."""
    loss = model.forward(state.tokens, state.targets)
    logits = relative_error(model.logits, state.logits)
    yield Check("logits", logits, _LOGITS)
    yield Check("loss", relative_error(loss, state.loss), _LOSS)
    model.backward()
    for name, want in state.grads.items():
        error = relative_error(np.asarray(model.grads[name]), want)
        yield Check(name, error, _GRADIENT)
    yield from _ten_losses(model, state, loss, expected)


def _ten_losses(model, state, loss, expected):
    """Ten steps of AdamW on one batch; gradients and loss are there."""
    for step, want in enumerate(expected, 1):
        if step > 1:
            loss = model.forward(state.tokens, state.targets)
            model.backward()
        error = None if want is None else relative_error(loss, want)
        yield Check(f"loss {step}", error, _LATER)
        model.update(1e-4, 0.9, 0.999, 1e-8, 0.01, step)
