# Written by `make export` from notebooks/4_practice/04_published.py: edit that file.

"""llm.c's starter pack: a state to compare with."""

__all__ = [
    "Check",
    "FLOOR",
    "GRADIENT",
    "HEADER_BYTES",
    "LATER",
    "LOGITS",
    "LONGEST_TOKEN",
    "LOSS",
    "LOSSES",
    "STATE_MAGIC",
    "STATE_VERSION",
    "State",
    "TOKENIZER_MAGIC",
    "TOKENIZER_VERSION",
    "accept",
    "encoding_of",
    "read_encoding",
    "read_state",
    "read_tokenizer",
    "relative_error",
    "write_state",
    "write_tokenizer",
]


# imports of the starter pack
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llmnb.formats.checkpoint import CHUNK, read_config
from llmnb.checks import check_tokens
from llmnb.config import GPT2Config
from llmnb.model.tensors import parameter_shapes
from llmnb.files import read_small, replacing, what_is
from llmnb.model.gpt2 import GPT2


# the debug state
STATE_MAGIC, STATE_VERSION = 20240327, 2
HEADER_BYTES = 1024


class State(NamedTuple):
    """A batch, and what a model makes of it.

    tokens, targets: int32 (B, T). logits: float32 (B, T, V). loss: a float.
    grads: a mapping from the 16 names to float32 arrays.

    Derived in chapter 4.4.
    """

    tokens: np.ndarray
    targets: np.ndarray
    logits: np.ndarray
    loss: float
    grads: dict


# its parts
def _parts(cfg, B, T):
    """The shapes of what stands behind the header, in order."""
    return {
        "tokens": (B, T),
        "targets": (B, T),
        "logits": (B, T, cfg.vocab_size),
        "loss": (1,),
        **parameter_shapes(cfg),
    }


def _check_header(path, rows):
    """Raise for the first row whose `ok` is False; the first is the kind."""
    for ok, what, must, got in rows:
        if not ok:
            other = what_is(path, rows[0][2])
            raise ValueError(
                f"{path}: the {what} must be {must}, got {got}"
                + (other and f": {other}")
            )


def _read_header(path, count):
    """The first numbers of a header, once it is known to be whole."""
    size = os.path.getsize(path)
    if size < HEADER_BYTES:
        what = what_is(path)
        raise ValueError(
            f"{path}: {size} bytes are too few for a header of {HEADER_BYTES}"
            + (what and f": {what}")
        )
    return size, *np.fromfile(path, "<i4", count).tolist()


# read a debug state
def read_state(path, cfg):
    """Map llm.c's debug state of a model into memory, read only.

    cfg: the model's configuration, which fixes V and the gradients' shapes.
    Returns a State. Raises ValueError, naming the file, when it is none of
    version 2, when its length is not what B, T and cfg require, and for
    tokens that the model lacks.

    Derived in chapter 4.4.
    """
    size, magic, version, B, T = _read_header(path, 4)
    counts = {n: math.prod(s) for n, s in _parts(cfg, B, T).items()}
    right, longest = HEADER_BYTES + 4 * sum(counts.values()), cfg.max_seq_len
    rows = (
        (magic == STATE_MAGIC, "magic number", STATE_MAGIC, magic),
        (version == STATE_VERSION, "version", STATE_VERSION, version),
        (B > 0, "batch size", "positive", B),
        (0 < T <= longest, "length", f"in [1, {longest}]", T),
        (size == right, "size for this model", f"{right} bytes", size),
    )
    _check_header(path, rows)
    numbers, arrays, at = np.memmap(path, "<i4", "r", HEADER_BYTES), {}, 0
    for name, shape in _parts(cfg, B, T).items():
        part = numbers[at : at + counts[name]].reshape(shape)
        whole = name in ("tokens", "targets")
        arrays[name] = part if whole else part.view("<f4")
        at += counts[name]
    batch = [arrays.pop(name) for name in ("tokens", "targets")]
    for name, array in zip(("tokens", "targets"), batch, strict=True):
        check_tokens(f"{path}: {name}", array, cfg.vocab_size)
    logits, loss = arrays.pop("logits"), float(arrays.pop("loss")[0])
    return State(*batch, logits, loss, arrays)


# write a debug state
def write_state(path, cfg, state):
    """Write a State in llm.c's format, version 2.

    Raises ValueError when an array has not the shape that cfg requires. The
    file appears whole or not at all.

    Derived in chapter 4.4.
    """
    arrays = state._asdict() | {"loss": np.array([state.loss])}
    arrays |= arrays.pop("grads")
    B, T = state.tokens.shape
    parts = _parts(cfg, B, T)
    for name, shape in parts.items():
        if arrays[name].shape != shape:
            raise ValueError(
                f"write_state: {name} must have shape {shape}, "
                f"got {arrays[name].shape}"
            )
    header = np.zeros(HEADER_BYTES // 4, "<i4")
    header[:4] = STATE_MAGIC, STATE_VERSION, B, T
    with replacing(path) as file:
        file.write(header.tobytes())
        for name in parts:
            kind = "<i4" if name in ("tokens", "targets") else "<f4"
            file.write(np.ascontiguousarray(arrays[name], kind).data)


# read a tokenizer
TOKENIZER_MAGIC, TOKENIZER_VERSION = 20240328, 2


def read_tokenizer(path):
    """The tokens of llm.c's tokenizer file: a list of bytes, and EOT.

    Raises ValueError, naming the file, when it is none of version 2, when
    it ends early or late, and for an empty token.

    Derived in chapter 4.4.
    """
    size, magic, version, count, eot = _read_header(path, 4)
    # a token takes two bytes at least and 256 at most
    fits = 2 * count <= size - HEADER_BYTES <= 256 * count
    rows = (
        (magic == TOKENIZER_MAGIC, "magic number", TOKENIZER_MAGIC, magic),
        (version == TOKENIZER_VERSION, "version", TOKENIZER_VERSION, version),
        (count > 0, "token count", "positive", count),
        (0 <= eot < count, "EOT", f"in [0, {count})", eot),
        (fits, "size", f"right for {count} tokens", size),
    )
    _check_header(path, rows)
    raw = read_small(path, HEADER_BYTES + (1 << 24))  # of 65,536 tokens
    tokens, at = [], HEADER_BYTES
    for number in range(count):
        length = raw[at] if at < len(raw) else 0
        token = raw[at + 1 : at + 1 + length]
        if not token or len(token) < length:
            raise ValueError(f"{path}: token {number} is empty or cut off")
        tokens.append(token)
        at += 1 + length
    if at < len(raw):
        raise ValueError(
            f"{path}: {len(raw) - at} bytes behind the last token"
        )
    return tokens, eot


# write a tokenizer
def write_tokenizer(path, encoding):
    """Write the tokens of a tiktoken.Encoding in llm.c's format.

    Raises ValueError for a token that is longer than 255 bytes, which one
    byte cannot count. The file appears whole or not at all.

    Derived in chapter 4.4.
    """
    count, body = encoding.n_vocab, []
    for number in range(count):
        token = encoding.decode_single_token_bytes(number)
        if len(token) > 255:
            raise ValueError(
                f"write_tokenizer: a token must have at most 255 bytes, "
                f"number {number} has {len(token)}"
            )
        body.append(bytes([len(token)]) + token)
    header = np.zeros(HEADER_BYTES // 4, "<i4")
    header[:4] = TOKENIZER_MAGIC, TOKENIZER_VERSION, count, encoding.eot_token
    with replacing(path) as file:
        file.write(header.tobytes() + b"".join(body))


# an encoder from a decoder
LONGEST_TOKEN = 255  # bytes; GPT-2's longest has 128


def read_encoding(path):
    """The tiktoken.Encoding of a tokenizer file, if it is a byte-level BPE.

    The text is split as GPT-2 does, which the file does not say. Raises
    ValueError, naming the file, as encoding_of does.

    Derived in chapter 4.4.
    """
    tokens, eot = read_tokenizer(path)
    if eot != len(tokens) - 1:
        raise ValueError(f"{path}: EOT must be the last token, got {eot}")
    return encoding_of(path, tokens)


def encoding_of(path, tokens):
    """A tiktoken.Encoding that merges as these tokens tell, in order.

    path: what the messages and the encoding are called by. Raises
    ValueError unless there are the 256 bytes, each other token joins two
    earlier ones, none comes twice, and the last is `<|endoftext|>`.

    Derived in chapter 4.4.
    """
    from llmnb.text.tokenizer import EOT, _encoding

    *tokens, last = tokens or [b"none"]
    if last != EOT.encode():
        raise ValueError(
            f"{path}: the last token must be {EOT}, got {last!r:.80}"
        )
    rank = {token: i for i, token in enumerate(tokens)}
    if len(rank) < len(tokens):
        raise ValueError(f"{path}: a token comes twice")
    for byte in range(256):
        if bytes([byte]) not in rank:
            raise ValueError(f"{path}: no token for the byte {byte}")
    for token, i in rank.items():
        if len(token) > LONGEST_TOKEN:
            raise ValueError(
                f"{path}: a token must have at most {LONGEST_TOKEN} bytes, "
                f"number {i} has {len(token)}"
            )
        if len(token) > 1 and not _joins(token, i, rank):
            raise ValueError(f"{path}: token {i} joins no two earlier ones")
    return _encoding(Path(path).stem, tokens)


# a token and two earlier ones
def _joins(token, i, rank):
    """Whether a token is some two tokens of lower rank, joined."""
    return any(
        rank.get(token[:k], i) < i and rank.get(token[k:], i) < i
        for k in range(1, len(token))
    )


# one check
class Check(NamedTuple):
    """One line of the acceptance test.

    error: the largest difference, divided by the largest element of what
    was expected; None where nothing was. allowed: the tolerance.

    Derived in chapter 4.4.
    """

    name: str
    error: float | None
    allowed: float

    @property
    def ok(self):
        """Whether the error is allowed; NaN is not. None without one."""
        return None if self.error is None else self.error <= self.allowed


# the tolerances
LOGITS, LOSS, GRADIENT, LATER = 2e-5, 1e-5, 1e-4, 1e-4
FLOOR = 1e-3  # a tensor whose numbers are smaller is measured against this


def relative_error(got, want):
    """max|got - want| / max|want|, piece by piece; NaN if there is one.

    Where max|want| is below 1e-3, that takes its place: a gradient that is
    zero but for rounding has no size of its own.

    Derived in chapter 4.4.
    """
    got, want = np.reshape(got, -1), np.reshape(want, -1)
    worst = scale = 0.0
    for first in range(0, want.size, CHUNK):
        a, b = got[first : first + CHUNK], want[first : first + CHUNK]
        worst = np.maximum(worst, np.abs(a - b).max())
        scale = np.maximum(scale, np.abs(b).max())
    return float(worst / np.maximum(scale, FLOOR))


# find the pack
_STATE = "_debug_state.bin"


def _find_pack(folder):
    """The paths of a pack's model, debug state and losses."""
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
    *(5.270007, 4.059707, 3.375123, 2.800783, 2.315382),
    *(1.849029, 1.394656, 0.999147, 0.624080, 0.376511),
)


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
    """Run llm.c's acceptance test on a starter pack: yields each Check.

    folder: holds NAME.bin and NAME_debug_state.bin, and perhaps
    NAME_losses.txt with ten losses. The logits, the loss and the 16
    gradients of the state's batch are compared, and then the losses of ten
    steps of AdamW on it. Raises OSError or ValueError for a missing or a
    damaged file, before anything is computed.

    Derived in chapter 4.4.
    """
    path, state_path, losses_path = _find_pack(folder)
    cfg = read_config(path)
    state = read_state(state_path, cfg)
    expected = _expected(losses_path, cfg, state)
    model = GPT2.from_checkpoint(path, *state.tokens.shape, backend)
    loss = model.forward(state.tokens, state.targets)
    logits = relative_error(model.logits, state.logits)
    yield Check("logits", logits, LOGITS)
    yield Check("loss", relative_error(loss, state.loss), LOSS)
    model.backward()
    for name, want in state.grads.items():
        error = relative_error(np.asarray(model.grads[name]), want)
        yield Check(name, error, GRADIENT)
    yield from _ten_losses(model, state, loss, expected)


# ten steps
def _ten_losses(model, state, loss, expected):
    """Ten steps of AdamW on one batch; gradients and loss are there."""
    for step, want in enumerate(expected, 1):
        if step > 1:
            loss = model.forward(state.tokens, state.targets)
            model.backward()
        error = None if want is None else relative_error(loss, want)
        yield Check(f"loss {step}", error, LATER)
        model.update(1e-4, 0.9, 0.999, 1e-8, 0.01, step)
