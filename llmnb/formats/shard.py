# Written by `make export` from notebooks/4_practice/09_shards.py: edit that file.

"""llm.c's shards: tokens in files."""

__all__ = [
    "SHARD_NAME",
    "ShardFile",
    "Shards",
    "find_shards",
    "read_shard",
    "sample_tokens",
    "shard_length",
    "write_shard",
]


# imports of the shards
import errno
import io
import os
import re
from pathlib import Path

import numpy as np

from llmnb.checks import check_tokens
from llmnb.files import replacing
from llmnb.formats.llmc import (
    HEADER_BYTES,
    check_header,
    header_of,
    read_header,
)


# the numbers of a shard
SHARD_MAGIC = 20240520
SHARD_VERSION = 1


# write a shard
def write_shard(path, tokens):
    """Write tokens as a shard in llm.c's format, uint16.

    tokens: one dimension of integers in [0, 65536), at least one and fewer
    than 2**31. The file is written beside `path` and renamed into place.
    Raises TypeError or ValueError for other tokens.

    Derived in chapter 4.9.
    """
    tokens, name = np.asarray(tokens), "write_shard: tokens"
    check_tokens(name, tokens, 65536)
    if tokens.ndim != 1 or not 0 < tokens.size < 2**31:
        raise ValueError(
            f"{name} must be 1 to {2**31 - 1} in one dimension, got shape "
            f"{tokens.shape}"
        )
    header = header_of(SHARD_MAGIC, SHARD_VERSION, tokens.size)
    with replacing(path) as file:
        header.tofile(file)
        tokens.astype("<u2", copy=False).tofile(file)


# read a shard
def shard_length(path):
    """The number of tokens in a shard, from its header alone.

    Raises ValueError, naming the file, what is wrong and what would be
    right, for a file shorter than its header, another magic number or
    version, a size that does not match the count, and a pipe or a device.

    Derived in chapter 4.9.
    """
    size, _, count = read_header(path, SHARD_MAGIC, [SHARD_VERSION], 2)
    right = HEADER_BYTES + 2 * count
    rows = (
        (count > 0, "token count", "positive", count),
        (size == right, f"size for {count} tokens", f"{right} bytes", size),
    )
    check_header(path, SHARD_MAGIC, rows)
    return count


def read_shard(path):
    """Map a shard's tokens into memory, read only.

    Returns a np.memmap, uint16, of shape (N,). Raises ValueError as
    `shard_length` does.

    Derived in chapter 4.9.
    """
    count = shard_length(path)
    return np.memmap(path, "<u2", "r", offset=HEADER_BYTES, shape=(count,))


# the shards of a folder
SHARD_NAME = re.compile(r"(?:.*_)?(train|val)(?:_\d+)?\.bin")


def find_shards(folder):
    """The shards in a folder: two lists of paths, (train, val), by name.

    Raises FileNotFoundError when either list is empty.

    Derived in chapter 4.9.
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

    Derived in chapter 4.9.
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

    Derived in chapter 4.9.
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
class ShardFile:
    """An open shard; a slice of it is read, at most seq_len + 1 tokens.

    Raises ValueError as `shard_length` does, and OSError when the file has
    been cut short since.

    Derived in chapter 4.9.
    """

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
