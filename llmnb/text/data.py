# Written by `make export` from notebooks/1_by_hand/03_batches.py: edit that file.

"""The tokens of a text, cut into batches of tokens and targets."""

__all__ = ["DataLoader", "split"]


# imports of the data
import os

import numpy as np

from llmnb.checks import check_tokens


# train and validation
def split(tokens, validation=None):
    """Cut tokens into (train, validation); both are views.

    tokens: array of shape (N,). The first `validation` tokens are set aside;
    by default 32,768, as llm.c does, or a tenth of the tokens if that is
    less. Raises ValueError unless both parts hold a token.

    Derived in chapter 1.3.
    """
    if validation is None:
        validation = min(32768, len(tokens) // 10)
    if not 0 < validation < len(tokens):
        raise ValueError(
            f"split: validation must lie between 0 and the number of tokens, "
            f"{len(tokens)}, got {validation}"
        )
    return tokens[validation:], tokens[:validation]


# check what is given
def check_int(name, value, low, high):
    """Raise unless value is an integer in [low, high)."""
    if not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be int, got {type(value).__name__}")
    if not low <= value < high:
        raise ValueError(f"{name} must lie in [{low}, {high}), got {value}")


def _check_array(shard):
    """The number of tokens in an array, or an error when some are none."""
    tokens, name = np.asarray(shard), "DataLoader: tokens"
    if tokens.size:  # of no elements the type says nothing
        check_tokens(name, tokens, 2**31)
    if tokens.ndim != 1:
        raise ValueError(
            f"{name} must have one dimension, got shape {tokens.shape}"
        )
    return tokens.size


# shards and their order
def _is_path(shard):
    return isinstance(shard, (str, os.PathLike))


def _open(shard, seq_len):
    """A shard's tokens: a path is opened, an array is taken as it is."""
    if _is_path(shard):
        from llmnb.formats.shard import ShardFile

        return ShardFile(shard, seq_len)
    return np.asarray(shard)


def _count_windows(shard, batch_size, seq_len):
    """The windows of (1.3.2), or an error when there is not one batch."""
    if _is_path(shard):
        from llmnb.formats.shard import shard_length

        count, name = shard_length(shard), shard
    else:
        count, name = _check_array(shard), "an array"
    if count < batch_size * seq_len + 1:
        raise ValueError(
            f"DataLoader: {name} has {count} tokens, one batch of "
            f"{batch_size} x {seq_len} needs {batch_size * seq_len + 1}"
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
            self.entered = None  # nor the old place, should this one fail
            key = [self.seed, epoch] if self.shuffle else None
            _fill_order(self.shard_order, key)
            k = int(self.shard_order[shard])
            key = key and [*key, k]
            _fill_order(self.window_order[: self.windows[k]], key)
            self.tokens = _open(self.shards[k], self.seq_len)
            self.batches = self.windows[k] // self.batch_size
            self.entered = epoch, shard  # last, when all else is there
        return self.batches


# a place that can be read and set
PLACE = "epoch", "shard", "position"


class _Bookmark:
    """Where a loader stands among its epochs."""

    def reset(self):
        """Go back to the first batch of epoch 0."""
        self._place = 0, 0, 0

    def skip(self, count=1):
        """Move on by so many batches, unread."""
        for _ in range(count):
            epoch, shard, position = self._place
            position += 1
            if position == self._epochs.enter(epoch, shard):
                position, shard = 0, shard + 1
            if shard == len(self._epochs.shards):
                shard, epoch = 0, epoch + 1
            self._place = epoch, shard, position  # at once, or not at all

    @property
    def state(self):
        """Place of the next batch: epoch, shard of it, batch of that."""
        return dict(zip(PLACE, self._place, strict=True))

    @state.setter
    def state(self, state):
        if set(state) != set(PLACE):
            raise ValueError(
                f"DataLoader: state must have epoch, shard and position, "
                f"got {sorted(state)}"
            )
        epoch, shard, position = (state[name] for name in PLACE)
        check_int("DataLoader: epoch", epoch, 0, 2**32)
        check_int("DataLoader: shard", shard, 0, len(self._epochs.shards))
        batches = self._epochs.enter(epoch, shard)
        check_int("DataLoader: position", position, 0, batches)
        self._place = int(epoch), int(shard), int(position)


# the data loader
class DataLoader(_Bookmark):
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
    on from there. reset(): back to the start. skip(count): on by so many
    batches.

    Derived in chapter 1.3.
    """

    def __init__(self, shards, batch_size, seq_len, seed=0, shuffle=True):
        check_int("DataLoader: batch_size", batch_size, 1, 2**31)
        check_int("DataLoader: seq_len", seq_len, 1, 2**31)
        check_int("DataLoader: seed", seed, 0, 2**32)
        B, T = int(batch_size), int(seq_len)  # NumPy's, of 8 bits, overflow
        self._epochs = _Epochs(shards, B, T, seed, shuffle)
        self.shards, windows = self._epochs.shards, self._epochs.windows
        self.batches_per_epoch = sum(w // B for w in windows)
        self._tokens = np.empty((B, T), np.int32)
        self._targets = np.empty((B, T), np.int32)
        self.reset()

    def next_batch(self):
        """The next batch: (tokens, targets), int32, (batch_size, seq_len).

        Both arrays are the loader's own and are overwritten by the next
        call: nothing is allocated at a step. Copy what you want to keep.
        """
        (epoch, shard, position), (B, T) = self._place, self._tokens.shape
        self._epochs.enter(epoch, shard)
        first = position * B
        for b, j in enumerate(self._epochs.window_order[first : first + B]):
            window = self._epochs.tokens[j * T : j * T + T + 1]
            self._tokens[b] = window[:-1]  # (1.3.1)
            self._targets[b] = window[1:]
        self.skip()
        return self._tokens, self._targets
