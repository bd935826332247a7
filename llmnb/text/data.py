# Written by `make export` from notebooks/1_by_hand/02_tokens.py: edit that file.

"""Shards of tokens, and the batches that are read from them."""

__all__ = [
    "DataLoader",
    "SHARD_NAME",
    "Shards",
    "find_shards",
    "read_shard",
    "sample_tokens",
    "shard_length",
    "write_shard",
]


# imports of the data
import errno
import io
import os
import re
from pathlib import Path

import numpy as np

from llmnb.files import replacing, what_is


# the header of a shard
SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_BYTES = 1024


# write a shard
def write_shard(path, tokens):
    """Write tokens as a shard in llm.c's format, uint16.

    tokens: one dimension of integers in [0, 65536), at least one and fewer
    than 2**31. The file is written beside `path` and renamed into place.
    Raises TypeError or ValueError for other tokens.

    Derived in chapter 1.2.
    """
    tokens = _check_stream("write_shard: tokens", tokens)
    if not 0 < tokens.size < 2**31:
        raise ValueError(
            f"write_shard: a shard must hold 1 to {2**31 - 1} tokens, "
            f"got {tokens.size}"
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high > 65535:
        bad = low if low < 0 else high
        raise ValueError(
            f"write_shard: tokens must lie in [0, 65536), got {bad}"
        )
    header = np.zeros(256, "<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, tokens.size
    with replacing(path) as file:
        header.tofile(file)
        tokens.astype("<u2", copy=False).tofile(file)


# check a stream of tokens
def _check_stream(name, tokens):
    """The tokens as a one-dimensional integer array, or an error."""
    tokens = np.asarray(tokens)
    if not np.issubdtype(tokens.dtype, np.integer):
        raise TypeError(f"{name} must be integers, got {tokens.dtype}")
    if tokens.ndim != 1:
        raise ValueError(
            f"{name} must have one dimension, got shape {tokens.shape}"
        )
    return tokens


# read a shard's header
def shard_length(path):
    """The number of tokens in a shard, from its header alone.

    Raises ValueError, naming the file, what is wrong and what would be
    right, for a file shorter than its header, another magic number or
    version, a size that does not match the count, and a pipe or a device.

    Derived in chapter 1.2.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path}: a shard must be a regular file")
    with open(path, "rb", buffering=0) as file:
        size, header = os.fstat(file.fileno()).st_size, file.read(12)
    if size < HEADER_BYTES or len(header) < 12:
        what = what_is(path, SHARD_MAGIC)
        raise ValueError(
            f"{path}: a shard has a header of {HEADER_BYTES} bytes, "
            f"the file has {size}" + (what and f": {what}")
        )
    magic, version, count = np.frombuffer(header, "<i4").tolist()
    right = HEADER_BYTES + 2 * count
    for ok, what, must, got in (
        (magic == SHARD_MAGIC, "magic number", SHARD_MAGIC, magic),
        (version == SHARD_VERSION, "version", SHARD_VERSION, version),
        (count > 0, "token count", "positive", count),
        (size == right, f"size for {count} tokens", f"{right} bytes", size),
    ):
        if not ok:
            other = what_is(path, SHARD_MAGIC)
            raise ValueError(
                f"{path}: the {what} must be {must}, got {got}"
                + (other and f": {other}")
            )
    return count


# read a shard
def read_shard(path):
    """Map a shard's tokens into memory, read only.

    Returns a np.memmap, uint16, of shape (N,). Raises ValueError as
    `shard_length` does.

    Derived in chapter 1.2.
    """
    count = shard_length(path)
    return np.memmap(path, "<u2", "r", offset=HEADER_BYTES, shape=(count,))


# the shards of a folder
SHARD_NAME = re.compile(r"(?:.*_)?(train|val)(?:_\d+)?\.bin")


def find_shards(folder):
    """The shards in a folder: two lists of paths, (train, val), by name.

    Raises FileNotFoundError when either list is empty.

    Derived in chapter 1.2.
    """
    found = {"train": [], "val": []}
    for path in sorted(Path(folder).iterdir()):
        if match := SHARD_NAME.fullmatch(path.name):
            found[match[1]].append(path)
    for part, paths in found.items():
        if not paths:
            raise FileNotFoundError(
                f"{folder} has no {part}.bin and no *{part}_*.bin: it must "
                "hold shards for training and for validation"
            )
    return found["train"], found["val"]


# many shards as one text
class Shards:
    """The tokens of many shards, of which none is open.

    paths: the shards, in order. lengths: how many tokens each holds, from
    its header. len() is the sum; np.asarray() reads them all. Raises
    ValueError for a damaged header.

    Derived in chapter 1.2.
    """

    def __init__(self, paths):
        self.paths = list(paths)
        self.lengths = [shard_length(path) for path in self.paths]

    def __len__(self):
        return sum(self.lengths)

    def __array__(self, dtype=None, copy=None):
        parts = zip(self.paths, self.lengths, strict=True)
        return np.concatenate([_first_tokens(*x) for x in parts], dtype=dtype)


# a sample of them
def sample_tokens(tokens, count):
    """At most `count` tokens, an array: from an array or from `Shards`.

    Of an array the first are taken, of shards the first of each of up to 64
    that lie evenly among them.

    Derived in chapter 1.2.
    """
    if not isinstance(tokens, Shards):
        return tokens[:count]
    chosen = tokens.paths[:: -(-len(tokens.paths) // 64)]
    share = count // len(chosen)
    return np.concatenate([_first_tokens(path, share) for path in chosen])


def _first_tokens(path, count):
    count = min(count, shard_length(path))
    return np.fromfile(path, "<u2", count, offset=HEADER_BYTES)


# a shard that is read in parts
class _File:
    """An open shard; a slice of it is read, at most seq_len + 1 tokens."""

    def __init__(self, path, seq_len):
        shard_length(path)  # checks it
        self.path, self.file = path, io.FileIO(path)
        self.room = np.empty(seq_len + 1, "<u2")

    def __getitem__(self, part):
        room, got = self.room[: part.stop - part.start], 0
        raw, more = memoryview(room).cast("B"), 1
        self.file.seek(HEADER_BYTES + 2 * part.start)
        while got < len(raw) and more:
            more = self.file.readinto(raw[got:])
            got += more
        if not more:
            gone = part.start + got // 2
            what = f"has been cut short, token {gone:,} is gone"
            raise OSError(errno.EIO, what, str(self.path))
        return room

    def __del__(self):
        if hasattr(self, "file"):
            self.file.close()


# shards and their order
def _open(shard, seq_len):
    """A shard's tokens: a path is opened, an array is taken as it is."""
    if isinstance(shard, (str, os.PathLike)):
        return _File(shard, seq_len)
    return np.asarray(shard)


def _check_array(shard):
    """The number of tokens in an array, or an error when some are none."""
    tokens, name = np.asarray(shard), "DataLoader: tokens"
    if tokens.size:  # of no elements the type says nothing
        _check_stream(name, tokens)
        for bad in (int(tokens.min()), int(tokens.max())):
            _check_int(name, bad, 0, 2**31)
    return tokens.size


def _count_windows(shard, batch_size, seq_len):
    """W of (1.2.9), or an error when there is not one batch."""
    path = isinstance(shard, (str, os.PathLike))
    count = shard_length(shard) if path else _check_array(shard)
    if count < batch_size * seq_len + 1:
        raise ValueError(
            f"DataLoader: {shard if path else 'an array'} has {count} "
            f"tokens, one batch of {batch_size} x {seq_len} needs "
            f"{batch_size * seq_len + 1}"
        )
    return (count - 1) // seq_len


def _fill_order(order, key):
    """Write 0, 1, 2, ... into `order`, shuffled by `key` unless it is None."""
    order[:] = np.arange(len(order))
    if key is not None:
        np.random.RandomState(key).shuffle(order)


# what an epoch is made of
class _Epochs:
    """Shards cut into windows, and the order of both in every epoch."""

    def __init__(self, shards, batch_size, seq_len, seed, shuffle):
        if isinstance(shards, (str, os.PathLike, np.ndarray)):
            shards = [shards]
        self.shards, self.seed, self.shuffle = list(shards), seed, shuffle
        if not self.shards:
            raise ValueError("DataLoader: the list of shards is empty")
        counts = [_count_windows(s, batch_size, seq_len) for s in self.shards]
        self.windows, self.batch_size = counts, batch_size
        self.seq_len = seq_len
        self.shard_order = np.empty(len(counts), np.int64)
        self.window_order = np.empty(max(counts), np.int64)
        self.entered = self.tokens = None

    def enter(self, epoch, shard):
        """Make ready the shard of this place; return its batches."""
        if self.entered != (epoch, shard):
            key = [self.seed, epoch] if self.shuffle else None
            _fill_order(self.shard_order, key)
            k = int(self.shard_order[shard])
            key = key and [*key, k]
            _fill_order(self.window_order[: self.windows[k]], key)
            self.tokens = _open(self.shards[k], self.seq_len)
            self.entered = epoch, shard
            self.batches = self.windows[k] // self.batch_size
        return self.batches


# a place that can be read and set
class _Place:
    """Where a loader stands among its epochs."""

    def reset(self):
        """Go back to the first batch of epoch 0."""
        self._place = {"epoch": 0, "shard": 0, "position": 0}

    @property
    def state(self):
        """Place of the next batch: epoch, shard of it, batch of that."""
        return dict(self._place)

    @state.setter
    def state(self, state):
        if set(state) != {"epoch", "shard", "position"}:
            raise ValueError(
                f"DataLoader: state must have epoch, shard and position, "
                f"got {sorted(state)}"
            )
        epoch, shard = state["epoch"], state["shard"]
        _check_int("DataLoader: epoch", epoch, 0, 2**32)
        _check_int("DataLoader: shard", shard, 0, len(self._epochs.shards))
        batches = self._epochs.enter(epoch, shard)
        _check_int("DataLoader: position", state["position"], 0, batches)
        self._place = {name: int(value) for name, value in state.items()}


# check a whole number
def _check_int(name, value, low, high):
    """Raise unless value is an integer in [low, high)."""
    if not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be int, got {type(value).__name__}")
    if not low <= value < high:
        raise ValueError(f"{name} must lie in [{low}, {high}), got {value}")


# the data loader
class DataLoader(_Place):
    """Batches of tokens and targets from shards, epoch after epoch.

    shards: a list of paths of shards and of integer arrays of shape (N,).
    Each must hold batch_size * seq_len + 1 tokens or more. With shuffle,
    every epoch takes the shards, and the windows of a shard, in an order
    drawn from seed; without, as they lie. The windows of a shard that do not
    fill a batch are left out of that epoch. Raises TypeError or ValueError,
    for tokens of an array that are not in [0, 2**31) too, and OSError when
    a shard has been cut short since.

    batches_per_epoch: batches in one epoch. shards: a list of what was
    given. state: the place of the next batch, a dict of ints; set it to go
    on from there. reset(): back to the start.

    Derived in chapter 1.2.
    """

    def __init__(self, shards, batch_size, seq_len, seed=0, shuffle=True):
        _check_int("DataLoader: batch_size", batch_size, 1, 2**31)
        _check_int("DataLoader: seq_len", seq_len, 1, 2**31)
        _check_int("DataLoader: seed", seed, 0, 2**32)
        self._epochs = _Epochs(shards, batch_size, seq_len, seed, shuffle)
        self.shards, windows = self._epochs.shards, self._epochs.windows
        self.batches_per_epoch = sum(w // batch_size for w in windows)
        self._tokens = np.empty((batch_size, seq_len), np.int32)
        self._targets = np.empty((batch_size, seq_len), np.int32)
        self.reset()

    def next_batch(self):
        """The next batch: (tokens, targets), int32, (batch_size, seq_len).

        Both arrays are the loader's own and are overwritten by the next
        call: nothing is allocated at a step. Copy what you want to keep.
        """
        place, (B, T) = self._place, self._tokens.shape
        batches = self._epochs.enter(place["epoch"], place["shard"])
        first = place["position"] * B
        for b, w in enumerate(self._epochs.window_order[first : first + B]):
            window = self._epochs.tokens[w * T : w * T + T + 1]
            self._tokens[b] = window[:-1]  # (1.2.8)
            self._targets[b] = window[1:]
        place["position"] += 1
        if place["position"] == batches:
            place["position"], place["shard"] = 0, place["shard"] + 1
        if place["shard"] == len(self._epochs.shards):
            place["shard"], place["epoch"] = 0, place["epoch"] + 1
        return self._tokens, self._targets
