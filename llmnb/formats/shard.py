# Written by `make export` from notebooks/4_practice/09_shards.py: edit that file.

"""llm.c's shards: tokens in files."""

__all__ = [
    "ShardFile", "Shards", "find_shards", "read_shard", "sample_tokens",
    "shard_kind", "shard_length", "write_shard",
]


# imports of the shards
import errno
import io
import re
from pathlib import Path

import numpy as np

from llmnb.checks import check_tokens
from llmnb.files import check_regular, replacing
from llmnb.formats.llmc import (
    HEADER_BYTES, check_header, header_of, read_header,
)
from llmnb.text.tokenizer import token_dtype


# the numbers of a shard
# bytes of a token -> the magic number and the version
_KINDS = {2: (20240520, 1), 4: (20240801, 7)}


# write a shard
def write_shard(path, tokens, vocab_size=None):
    """Write tokens as a shard in llm.c's format, uint16 or uint32.

    tokens: one dimension of integers in [0, vocab_size) and below 2**31, at
    least one and fewer than 2**31. vocab_size: up to 65,536 a token takes two
    bytes, beyond that four; None is one more than the largest. It is written
    beside `path` and renamed into place. Raises TypeError or ValueError for
    other tokens.

    Derived in chapter 4.9.
    """
    tokens, name = np.asarray(tokens), "write_shard: tokens"
    most = 2**31 if vocab_size is None else min(vocab_size, 2**31)
    check_tokens(name, tokens, most)
    if tokens.ndim != 1 or not 0 < tokens.size < 2**31:
        raise ValueError(
            f"{name} must be 1 to {2**31 - 1} in one dimension, got shape "
            f"{tokens.shape}"
        )
    kind = token_dtype(vocab_size or int(tokens.max()) + 1)
    with replacing(path) as file:
        # not tofile, whose error on a full disk names neither
        file.write(header_of(*_KINDS[kind.itemsize], tokens.size))
        file.write(np.ascontiguousarray(tokens, kind.newbyteorder("<")))


# read a shard
def shard_kind(path):
    """The number of tokens in a shard and their dtype, from its header alone.

    Raises ValueError, naming the file, what is wrong and what would be
    right, for a file shorter than its header, another magic number or
    version, a size that does not match the count, and a pipe or a device.

    Derived in chapter 4.9.
    """
    width = 4 if _is_wide(path) else 2
    magic, version = _KINDS[width]
    size, _, count = read_header(path, magic, [version], 2)
    right = HEADER_BYTES + width * count
    rows = (
        (count > 0, "token count", "positive", count),
        (size == right, f"size for {count} tokens", f"{right} bytes", size),
    )
    check_header(path, magic, rows)
    return count, np.dtype(f"<u{width}")


def _is_wide(path):
    """Whether a file begins as one with four bytes a token does."""
    check_regular(path)
    with open(path, "rb", buffering=0) as file:
        return file.read(4) == _KINDS[4][0].to_bytes(4, "little")


def shard_length(path):
    """The number of tokens in a shard; raises as `shard_kind` does.

    Derived in chapter 4.9.
    """
    return shard_kind(path)[0]


def read_shard(path):
    """Map a shard's tokens into memory, read only.

    Returns a np.memmap, uint16 or uint32, of shape (N,). Raises ValueError
    as `shard_kind` does.

    Derived in chapter 4.9.
    """
    count, kind = shard_kind(path)
    return np.memmap(path, kind, "r", offset=HEADER_BYTES, shape=(count,))


# the shards of a folder
_SHARD_NAME = re.compile(r"(?:.*_)?(train|val)(?:_\d+)?\.bin")


def find_shards(folder):
    """The shards in a folder: two lists of paths, (train, val), by name.

    Raises FileNotFoundError when either list is empty.

    Derived in chapter 4.9.
    """
    found = {"train": [], "val": []}
    for path in sorted(Path(folder).iterdir()):
        if match := _SHARD_NAME.fullmatch(path.name):
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
        whole = [_first_tokens(path) for path in self.paths]
        return np.concatenate(whole, dtype=dtype)


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


def _first_tokens(path, count=-1):
    kind = shard_kind(path)[1]
    return np.fromfile(path, kind, count, offset=HEADER_BYTES)


# a shard that is read in parts
class ShardFile:
    """An open shard; a slice of it is read, at most seq_len + 1 tokens.

    Raises ValueError as `shard_kind` does, and OSError when the file has
    been cut short since.

    Derived in chapter 4.9.
    """

    def __init__(self, path, seq_len):
        kind = shard_kind(path)[1]
        self.path, self.file = path, io.FileIO(path)
        self.room = np.empty(seq_len + 1, kind)

    def __getitem__(self, part):
        room, got = self.room[: part.stop - part.start], 0
        raw, more = memoryview(room).cast("B"), 1
        self.file.seek(HEADER_BYTES + room.itemsize * part.start)
        while got < len(raw) and more:
            more = self.file.readinto(raw[got:])
            got += more
        if not more:
            gone = part.start + got // room.itemsize
            what = f"has been cut short, token {gone:,} is gone"
            raise OSError(errno.EIO, what, str(self.path))
        return room

    def __del__(self):
        if hasattr(self, "file"):
            self.file.close()
