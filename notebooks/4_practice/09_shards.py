# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       formats.shard: "llm.c's shards: tokens in files."
# ---

# %% [markdown]
# # Shards: tokens in files
#
# > Two bytes a token behind llm.c's header: a text encoded once, read as often
# > as you like, and larger than the memory.
#
# *Reading time: 16 minutes. You need: [chapter
# 1.3](../1_by_hand/03_batches.ipynb) and the header of [chapter
# 4.2](02_checkpoints.ipynb).*

# %% [markdown]
# ## Where we are
#
# Encoding a text takes longer than reading it, and the tokens take half the
# space. So they are kept. At the end of this chapter you can
#
# - read a file of tokens byte by byte;
# - say when a mapped file kills a process, and read it so that it does not;
# - train on a text of ten thousand files with one of them open.

# %% [markdown]
# ## Setup

# %% setup
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

from llmnb.book.diagram import PALETTE
from llmnb.book.verify import verdict
from llmnb.text import tokenizer

BLUE, GREY, ORANGE = (PALETTE[x] for x in ("blue", "pale", "orange"))
folder = Path(tempfile.mkdtemp())

# %% imports of the shards tags=["export"]
import errno
import io
import re
from pathlib import Path

import numpy as np

from llmnb.checks import check_tokens
from llmnb.files import check_regular, replacing
from llmnb.formats.llmc import (
    HEADER_BYTES,
    check_header,
    header_of,
    read_header,
)
from llmnb.text.tokenizer import token_dtype

# %% [markdown]
# ## The format
#
# The format is llm.c's, so that its files and ours can be exchanged. A file is
# a **shard**: a large text is spread over several. It begins with the header
# of [chapter 4.2](02_checkpoints.ipynb), of which three numbers are used:
#
# $$ \begin{gathered}
# \underbrace{20240520}_{\text{magic}}\;
# \underbrace{1}_{\text{version}}\;
# \underbrace{N}_{\text{count}}\; 0\; \dots\; 0 \\
# \text{size} = 1024 + 2N \text{ bytes}
# \end{gathered} \tag{4.9.1} $$
#
# Then come $N$ tokens of two bytes each: $V \le 65{,}536$ fits uint16, half of
# what int32 would take. The vocabularies of
# [chapter 5.8](../5_modern/08_tokenizers.ipynb) are larger. Their tokens take four bytes,
# in a file that begins with 20240801 and 7, as llm.c's do.

# %% the numbers of a shard tags=["exporti"]
# bytes of a token -> the magic number and the version
_KINDS = {2: (20240520, 1), 4: (20240801, 7)}


# %% write a shard tags=["export"]
def write_shard(path, tokens, vocab_size=None):
    """Write tokens as a shard in llm.c's format, uint16 or uint32.

    tokens: one dimension of integers in [0, vocab_size) and below 2**31, at
    least one and fewer than 2**31. vocab_size: up to 65,536 a token takes two
    bytes, beyond that four; None is one more than the largest. It is written
    beside `path` and renamed into place. Raises TypeError or ValueError for
    other tokens.
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


# %% [markdown]
# Reading maps the file into memory: no byte is read until it is looked at,
# and a shard larger than the memory is no trouble. Before that, each number
# of (4.9.1) is checked.


# %% read a shard tags=["export"]
def shard_kind(path):
    """The number of tokens in a shard and their dtype, from its header alone.

    Raises ValueError, naming the file, what is wrong and what would be
    right, for a file shorter than its header, another magic number or
    version, a size that does not match the count, and a pipe or a device.
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
    """The number of tokens in a shard; raises as `shard_kind` does."""
    return shard_kind(path)[0]


def read_shard(path):
    """Map a shard's tokens into memory, read only.

    Returns a np.memmap, uint16 or uint32, of shape (N,). Raises ValueError
    as `shard_kind` does.
    """
    count, kind = shard_kind(path)
    return np.memmap(path, kind, "r", offset=HEADER_BYTES, shape=(count,))


# %% [markdown]
# A short text, and its shard in hexadecimal:

# %% a short text
PASSAGE = """\
By noon the boats return. The man counts again. When the count is right he
walks home; when it is wrong he waits on the wall until it is. That's all he
does. Nobody asked him to, nobody pays him, and nobody in the harbour would
think of going out on a morning when he was not there to count them.
"""
enc = tokenizer.train(PASSAGE, 300)
stream = np.array([enc.eot_token, *enc.encode_ordinary(PASSAGE)], np.uint16)

# %% a shard in hexadecimal
shard = folder / "text.bin"
write_shard(shard, stream)
raw = shard.read_bytes()
for start in (0, 1008, 1024):
    row = raw[start : start + 16]
    print(f"{start:>5}  {row.hex(' ')}")
print(len(raw), "bytes =", HEADER_BYTES, "+ 2 *", len(stream))

# %% [markdown]
# Read the first row from the left, lowest byte first. `88 d8 34 01` is
# $\mathtt{0x0134d888} = 20240520$; then comes 1; then the count. At 1024
# stands the first token, `2b 01`: $\mathtt{0x012b} = 299$, which is
# `<|endoftext|>` of a vocabulary of 300.

# %% the header read by hand
header = [int.from_bytes(raw[i : i + 4], "little") for i in (0, 4, 8)]
first = int.from_bytes(raw[1024:1026], "little")
print(header, first, enc.decode([first]))
verdict("shard", np.array_equal(read_shard(shard), stream), "read == written")

# %% the shard drawn
fig, ax = plt.subplots(figsize=(8, 1.5), dpi=100)
fields = [
    (0, 4, "magic", ORANGE), (4, 8, "version", BLUE), (8, 12, "count", ORANGE),
    (12, 20, "zeros ...", GREY), (20, 22, "", BLUE), (22, 24, "", BLUE),
    (24, 26, "", BLUE), (26, 30, "...", GREY),
]  # fmt: skip
for a, b, label, colour in fields:
    box = plt.Rectangle((a, 0), b - a, 1, facecolor=colour, edgecolor="white")
    ax.add_patch(box)
    ink = PALETTE["ink"] if colour == GREY else "white"
    ax.text((a + b) / 2, 0.5, label, ha="center", va="center", color=ink)
for x, label in [(0, "0"), (4, "4"), (8, "8"), (12, "12"), (20, "1024")]:
    ax.text(x, 1.15, label, size=9, ha="left")
ax.text(20, -0.2, "tokens, two bytes each", va="top")
ax.text(0, -0.2, "header, 256 int32", va="top")
ax.set(xlim=(-0.3, 30.3), ylim=(-0.65, 1.5))
ax.axis("off")
fig.subplots_adjust(0, 0, 1, 1)
plt.show()

# %% [markdown]
# *Figure 4.9.1. A shard from its first byte on, with the offsets over it:
# three int32 that are used, zeros up to byte 1024, then two bytes a token. Not
# to scale.*
#
# Four damaged shards and what is said about them:

# %% damaged shards
wrong = folder / "wrong.bin"
for damaged in (
    raw[:100],
    (20240521).to_bytes(4, "little") + raw[4:],
    raw[:4] + b"\2" + raw[5:],
    raw[:-1],
):
    wrong.write_bytes(damaged)
    try:
        read_shard(wrong)
    except ValueError as error:
        print(str(error).replace(f"{folder}{os.sep}", ""))

# %% [markdown]
# ## A folder of shards
#
# Some shards of a text are for training, the others for validation, and their
# names say which: `train.bin` and `val.bin` when there is one of each, else
# `train_000000.bin` and so on. llm.c puts the name of the text in front, as in
# `fineweb_train_000001.bin`. The order is that of the names.

# %% the shards of a folder tags=["export"]
_SHARD_NAME = re.compile(r"(?:.*_)?(train|val)(?:_\d+)?\.bin")


def find_shards(folder):
    """The shards in a folder: two lists of paths, (train, val), by name.

    Raises FileNotFoundError when either list is empty.
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


# %% many shards as one text tags=["export"]
class Shards:
    """The tokens of many shards, of which none is open.

    paths: the shards, in order. lengths: how many tokens each holds, from
    its header. len() is the sum; np.asarray() reads them all. Raises
    ValueError for a damaged header.
    """

    def __init__(self, paths):
        self.paths = list(paths)
        self.lengths = [shard_length(path) for path in self.paths]

    def __len__(self):
        return sum(self.lengths)

    def __array__(self, dtype=None, copy=None):
        whole = [_first_tokens(path) for path in self.paths]
        return np.concatenate(whole, dtype=dtype)


# %% a sample of them tags=["export"]
def sample_tokens(tokens, count):
    """At most `count` tokens, an array: from an array or from `Shards`.

    Of an array the first are taken, of shards the first of each of up to 64
    that lie evenly among them.
    """
    if not isinstance(tokens, Shards):
        return tokens[:count]
    chosen = tokens.paths[:: -(-len(tokens.paths) // 64)]
    share = count // len(chosen)
    return np.concatenate([_first_tokens(path, share) for path in chosen])


def _first_tokens(path, count=-1):
    kind = shard_kind(path)[1]
    return np.fromfile(path, kind, count, offset=HEADER_BYTES)


# %% a folder of two kinds
two = folder / "two"
two.mkdir()
for name in ("val.bin", "train_000000.bin", "train_000001.bin"):
    write_shard(two / name, stream)
several, single = find_shards(two)
print([x.name for x in several], [x.name for x in single])
count = len(Shards(several))
verdict("two shards", count == 2 * len(stream), "the sum of their tokens")

# %% [markdown]
# ## Read without a map
#
# A large text is ten thousand shards. The loader of [chapter
# 1.3](../1_by_hand/03_batches.ipynb) reads only their headers when it is made,
# and opens one shard at a time, for a process may have a thousand or so. It
# does not map the shard. Should somebody cut a mapped file short, the next
# look behind its end kills the process without a word; a read that comes out
# short is an error that can name the file. It costs a window a microsecond or
# two.


# %% a shard that is read in parts tags=["export"]
class ShardFile:
    """An open shard; a slice of it is read, at most seq_len + 1 tokens.

    Raises ValueError as `shard_kind` does, and OSError when the file has
    been cut short since.
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


# %% files in the place of arrays
from llmnb.text.data import DataLoader

loaders = [DataLoader([x], 2, 8, seed=3) for x in (stream, shard)]
same = all(
    np.array_equal(loaders[0].next_batch(), loaders[1].next_batch())
    for _ in range(20)
)
verdict("20 batches", same, "the same from the file")

# %% a shard that is cut short
_ = shard.write_bytes(raw[: len(raw) // 2])
try:
    for _ in range(20):
        loaders[1].next_batch()
except OSError as error:
    print(type(error).__name__, error.strerror)
_ = shard.write_bytes(raw)

# %% [markdown]
# ## Take away
#
# - A shard is a header of 1,024 bytes and two bytes a token, or four where the
#   vocabulary has more than 65,536.
# - A map is comfortable, and dies without a word when its file shrinks; a read
#   is an error with a name.
# - What thousands of files hold is known from their headers.
#
# ## Design note
#
# One file for the whole text would need no names and no order. But a large
# file is hard to move, must be written by one process, and when a byte of it
# is bad all of it is. With shards of a hundred million tokens a bad one is
# written anew.
#
# ## Exercises
#
# **1** (★). How many tokens has a shard of 200,001,024 bytes, and how many
# batches of 16 × 1,024 does the loader take from it?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# $(200{,}001{,}024 - 1024)/2 = 10^8$ tokens, by (1.3.2) 97,656 windows, and
# 6,103 batches.
# :::

# %% exercise 1 tags=["hide-cell"]
tokens = (200_001_024 - 1024) // 2
answer = tokens, (tokens - 1) // 1024 // 16

# %% exercise 1, checked
verdict("exercise 1", answer == (10**8, 6103), f"{answer[1]:,} batches")

# %% [markdown]
# ## Further reading
#
# - [llm.c](https://github.com/karpathy/llm.c): `dev/data/data_common.py`
#   writes such files, `llmc/dataloader.h` reads them.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("4.9")
