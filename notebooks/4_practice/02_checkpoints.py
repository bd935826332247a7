# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       formats.llmc: "llm.c's files: their common header, and the file of a model's weights."
# ---

# %% [markdown]
# # Checkpoints: llm.c's file of weights
#
# > A header of a thousand bytes, and then every weight: the plainest file a
# > model can have, and what must be checked before one of its numbers is
# > believed.
#
# *Reading time: 17 minutes. You need: [chapter 4.1](01_files.ipynb), the
# sixteen tensors of [chapter 1.4](../1_by_hand/04_gpt2.ipynb), and the
# rounding of [chapter 2.6](../2_cpu/06_bfloat16.ipynb).*

# %% [markdown]
# ## Where we are
#
# A model on disk is its configuration and its parameters. llm.c's format,
# `.bin`, has just these two, and nothing that would need a library to read. At
# the end of this chapter you can
#
# - read the header of such a file byte by byte;
# - ask a header five questions, in the order that protects your memory;
# - say what a checksum finds, and what it does not;
# - say what half the bytes cost.

# %% [markdown]
# ## Setup

# %% setup
import tempfile
import tracemalloc
from pathlib import Path

from llmnb.book.verify import verdict
from llmnb.model.gpt2 import GPT2

folder = Path(tempfile.mkdtemp())

# %% imports of the checkpoint tags=["export"]
import os
import zlib
from dataclasses import astuple

import numpy as np

from llmnb.config import GPT2Config
from llmnb.files import check_regular, replacing, what_is
from llmnb.model.tensors import parameter_count, parameter_shapes
from llmnb.reference.bfloat16 import from_bfloat16, to_bfloat16

# %% [markdown]
# ## The format
#
# All files of llm.c begin alike: a header of 256 int32 numbers, 1,024 bytes,
# little endian (the lowest byte first). The first is the **magic** number,
# which says what kind of file it is, and the second the version of that kind.
# Then comes the body. In the file of a model it is the parameters, number for
# number, one tensor after the other.
#
# | number | meaning |
# |---|---|
# | 0 | 20240326, which marks the file as a model |
# | 1 | the version: 3 for float32, 5 for bfloat16 |
# | 2 to 7 | `max_seq_len`, `vocab_size`, `num_layers`, `num_heads`, `channels`, padded vocabulary |
# | 8 to 253 | zero |
# | 254 | 1 if a checksum follows, else zero |
# | 255 | the checksum, CRC-32, of the numbers and then of the header without it |
#
# llm.c writes zeros behind number 7 and does not look at them, so the last
# two are ours: a weight with a flipped bit is still a number, and only a sum
# tells. It stands in the file itself, since a sum in a file of its own could
# be of another day when the machine stops between the two. Files without one
# are read as ever.
#
# With $N$ parameters, padding included, of $b$ bytes each, the file has
#
# $$ 1024 + b N \text{ bytes.} \tag{4.2.1} $$
#
# ## What a header must be checked against
#
# A header is a claim. Before one of its numbers becomes a size, an index or
# a loop's length, ask five questions, in this order:
#
# 1. *Is it whole?* A file shorter than its header has no header.
# 2. *Is it mine?* The magic number and the version say what the rest means.
# 3. *Can it be?* A size must be positive; counts are multiplied as Python
#    integers, which do not overflow, so that no product wraps around to
#    something small.
# 4. *Does it fit the file?* The sizes together predict the length, here
#    (4.2.1), to the byte. This is the check that protects memory: after it, no
#    claim is larger than what somebody took the trouble to store.
# 5. *Are the contents in range?* A weight must be finite, and a token below
#    $V$.
#
# Only then is memory taken. The first two questions are the same for all files
# of llm.c, and are asked in one place; its other files are the tokens of
# [chapter 4.9](09_shards.ipynb), the states and tokenizers of [chapter
# 4.5](05_acceptance.ipynb), and the tests of [chapter 4.22](22_choices.ipynb).

# %% the header of all files tags=["export"]
HEADER = 256  # int32 numbers
HEADER_BYTES = 4 * HEADER


def header_of(magic, version, *numbers):
    """The header of one of llm.c's files: an array of int32."""
    header = np.zeros(HEADER, "<i4")
    header[: 2 + len(numbers)] = magic, version, *numbers
    return header


def read_header(path, magic, versions, count):
    """The size of a file, and the first `count` numbers behind its magic.

    The numbers are version first. Raises ValueError, naming the file, what
    is wrong and what would be right, for a pipe or a device, for a file that
    is shorter than its header, and for another magic number or version.
    """
    check_regular(path)
    with open(path, "rb", buffering=0) as file:
        size, raw = os.fstat(file.fileno()).st_size, file.read(HEADER_BYTES)
    least = f"at least {HEADER_BYTES} bytes"
    check_header(path, magic, [(size >= HEADER_BYTES, "size", least, size)])
    found, *numbers = np.frombuffer(raw, "<i4", count + 1).tolist()
    known = " or ".join(map(str, versions))
    rows = (
        (found == magic, "magic number", magic, found),
        (numbers[0] in versions, "version", known, numbers[0]),
    )
    check_header(path, magic, rows)
    return size, *numbers


def check_header(path, magic, rows):
    """Raise ValueError for the first row (ok, what, must, got) not ok."""
    for ok, what, must, got in rows:
        if not ok:
            other = what_is(path, magic)
            raise ValueError(
                f"{path}: the {what} must be {must}, got {got}"
                + (other and f": {other}")
            )


# %% [markdown]
# ## Write
#
# In pieces of 4 Mi numbers, so that no second copy of the model is made. The
# sum is known at the end; then the header is written once more.

# %% the numbers of a model's file tags=["export"]
MAGIC = 20240326
_BODIES = {3: "<f4", 5: "<u2"}  # a version and how its numbers are stored
_SUMMED = 1  # in a header with a checksum, the last number but one
_PORTION = 1 << 22  # numbers read or written at a time: 16 MiB of float32


# %% write a checkpoint tags=["export"]
def write_checkpoint(path, cfg, params, version=3):
    """Write a model in llm.c's .bin format.

    params: a mapping from llm.c's names to arrays, as `GPT2.params`.
    version: 3 for float32, 5 for bfloat16, rounded from float32 to nearest;
    ValueError for another, and for arrays of another model's shapes. The
    file appears whole or not at all.
    """
    if version not in _BODIES:
        raise ValueError(
            f"write_checkpoint: version must be 3 (float32) or 5 (bfloat16), "
            f"got {version!r}"
        )
    check_shapes("write_checkpoint", cfg, params)
    sizes = *astuple(cfg), cfg.padded_vocab_size
    header = header_of(MAGIC, version, *sizes).view("<u4")
    header[-2], total = _SUMMED, 0
    with replacing(path) as file:
        file.write(header.data)
        for part in _pieces(params[x] for x in parameter_shapes(cfg)):
            part = np.ascontiguousarray(part, np.float32)
            body = to_bfloat16(part) if version == 5 else part
            body = body.astype(_BODIES[version], copy=False).data
            total = zlib.crc32(body, total)
            file.write(body)
        header[-1] = zlib.crc32(header, total)
        file.seek(0)
        file.write(header.data)


# %% the shapes of what is written tags=["exporti"]
def check_shapes(name, cfg, params):
    """Raise ValueError unless params are those of a model of this cfg.

    name: what the message calls who writes them. A file of GPT-2's has no
    place for other parts, so a class made from GPT2Config wants a family of
    its own.
    """
    if cfg.family == "gpt2" and type(cfg) is not GPT2Config:
        raise ValueError(
            f"{name}: the file would be read as a GPT-2's, and this is a "
            f"{type(cfg).__name__}: give that a family of its own"
        )
    for x, shape in parameter_shapes(cfg).items():
        if params[x].shape != shape:
            raise ValueError(
                f"{name}: {x} must have shape {shape}, got {params[x].shape}"
            )


# %% pieces tags=["exporti"]
def _pieces(arrays):
    """Some arrays, flat, as views of at most _PORTION numbers."""
    for array in arrays:
        flat = np.asarray(array).reshape(-1)
        for first in range(0, flat.size, _PORTION):
            yield flat[first : first + _PORTION]


# %% [markdown]
# ## Read
#
# The six sizes of the header are compared with the length of the file, by
# (4.2.1), before anything is allocated.


# %% read a header tags=["export"]
def bin_header(path):
    """Version and configuration of a .bin, checked against its length."""
    size, version, *sizes = read_header(path, MAGIC, [*_BODIES], 7)
    cfg = config_of(path, sizes[:5])
    width = np.dtype(_BODIES[version]).itemsize
    right = HEADER_BYTES + width * parameter_count(cfg)
    padded = cfg.padded_vocab_size
    rows = (
        (sizes[5] == padded, "padded vocabulary", padded, sizes[5]),
        (size == right, "size for this model", f"{right} bytes", size),
    )
    check_header(path, MAGIC, rows)
    return version, cfg


def config_of(path, sizes):
    """The GPT2Config of five sizes; ValueError names the file."""
    try:
        return GPT2Config(*sizes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


# %% [markdown]
# The reader fills arrays that the caller has: a model's own. Nothing else of
# the size of the model exists.


# %% the numbers behind a header tags=["export"]
def read_bin(path, version, params):
    """Fill params, checked before, from the numbers behind the header.

    params: a mapping from names to arrays in the order of the file. Raises
    ValueError when the file ends early or does not match its checksum.
    """
    with open(path, "rb") as file:
        header, total = np.fromfile(file, "<u4", HEADER), 0
        for name, array in params.items():
            for part in _pieces([array]):
                body = np.fromfile(file, _BODIES[version], part.size)
                if body.size != part.size:
                    raise ValueError(f"{path}: ends within {name}")
                total = zlib.crc32(body, total)
                part[...] = from_bfloat16(body) if version == 5 else body
    _check_sum(path, header, total)


def _check_sum(path, header, total):
    """Raise unless a .bin has the sum that its header keeps, if any."""
    marked, kept = header[-2:].tolist()
    header[-1] = 0
    if marked == _SUMMED and kept != zlib.crc32(header, total):
        raise ValueError(
            f"{path} is damaged, its checksum is not the one in its header: "
            "take another copy, or write it anew, as `llmnb train --resume` "
            "does for a run"
        )


# %% [markdown]
# Here is a small model's file, and what is said of four others, each in less
# than a megabyte of memory.

# %% four bad files
model = GPT2(GPT2Config(64, 1000, 2, 4, 64), 1, 8, "reference")
write_checkpoint(folder / "model.bin", model.cfg, model.params)
whole = (folder / "model.bin").read_bytes()
header = np.frombuffer(whole[:1024], np.int32).copy()
header[4] = 1_000_000  # claims a million blocks
bad_files = {
    "short.bin": whole[:-100],
    "headless.bin": whole[:100],
    "other.bin": b"GGUF" + whole[4:],
    "liar.bin": header.tobytes() + whole[1024:],
}
tracemalloc.start()
for name, raw in bad_files.items():
    (folder / name).write_bytes(raw)
    try:
        bin_header(folder / name)
    except ValueError as error:
        print(str(error).replace(f"{folder}{os.sep}", ""))

# %% a claim costs no memory
tracemalloc.reset_peak()
before = tracemalloc.get_traced_memory()[0]
try:
    bin_header(folder / "liar.bin")
except ValueError:
    peak = tracemalloc.get_traced_memory()[1] - before
tracemalloc.stop()
verdict("a million blocks", peak < 1 << 20, "refused in less than 1 MiB")

# %% [markdown]
# What a header claims, the length of the file confirms or refutes. A bit that
# flips in a weight changes no length, and is found by the sum:

# %% a bit that flips
flipped = bytearray(whole)
flipped[5000] ^= 1
(folder / "flipped.bin").write_bytes(flipped)
params = {n: np.empty(x) for n, x in parameter_shapes(model.cfg).items()}
read_bin(folder / "model.bin", 3, params)
same = all(np.array_equal(params[n], model.params[n]) for n in params)
verdict("model.bin", same, "comes back to the last bit")
try:
    read_bin(folder / "flipped.bin", 3, params)
except ValueError as error:
    verdict("flipped.bin", "damaged" in str(error), "is caught")

# %% [markdown]
# ## Count it
#
# What GPT-2 124M takes, and what version 5 saves. The price is in
# [chapter 2.6](../2_cpu/06_bfloat16.ipynb): every weight is off by at most
# $2^{-8}$ of itself, which does for a model that is used, and not for one that
# goes on training.

# %% bytes on disk
N = parameter_count(GPT2Config())
for version, dtype in _BODIES.items():
    size = HEADER_BYTES + np.dtype(dtype).itemsize * N
    print(f"version {version} {size:>13,} bytes")
verdict("version 3", HEADER_BYTES + 4 * N == 497_904_640, "as llm.c's file")
write_checkpoint(folder / "half.bin", model.cfg, model.params, version=5)
sizes = [
    (folder / f"{x}.bin").stat().st_size - 1024 for x in ("model", "half")
]
verdict("half.bin", sizes[0] == 2 * sizes[1], "half the body")

# %% [markdown]
# ## Take away
#
# - A header is a claim. The length of the file is the evidence, and memory
#   comes after it.
# - A checksum belongs into the file that it is about. It finds accidents, not
#   intent: who wants to deceive computes it anew.
# - Half the bytes are one number in the header.
#
# ## Design note
#
# A file of raw numbers has no room for what comes later: another tensor,
# another type, a note on how it was made. Every change needs a new version
# number, and every reader must know all of them. In exchange it is read by
# twenty lines in any language, and a C program maps it into memory and is
# done. The next chapter has a container for everything else.
#
# ## Exercises
#
# **1** (★). At which byte of GPT-2 124M's version 3 does `wpe` begin?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# Behind the header and `wte`, which has $V_p C$ numbers of four bytes:
# $1024 + 4 \cdot 50304 \cdot 768 = 154{,}534{,}912$.
# :::

# %% exercise 1 tags=["hide-cell"]
start = 1024 + 4 * 50304 * 768

# %% exercise 1, checked
first = parameter_shapes(GPT2Config())["wte"]
verdict("wpe", start == HEADER_BYTES + 4 * int(np.prod(first)), f"at {start}")

# %% [markdown]
# **2** (★★). Which single flipped bits of the header does the reader refuse? Try
# each bit of the first eight numbers, and one of every other.
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# Magic, version and sizes fix the length or must be equal, with two exceptions:
# the number of heads changes no shape, and 1,001 tokens are padded to the same
# 1,024 as 1,000. The sum finds those, and all other flips, for it covers the
# header too; only a flip of number 254 itself turns the sum off.
# :::


# %% exercise 2 tags=["hide-cell"]
def refused(bit):
    raw = bytearray(whole)
    raw[bit // 8] ^= 1 << bit % 8
    (folder / "flip.bin").write_bytes(raw)
    try:
        version, _ = bin_header(folder / "flip.bin")
        read_bin(folder / "flip.bin", version, params)
    except ValueError:
        return True
    return False


# %% exercise 2, checked
bits = [*range(8 * 32), *range(8 * 32, 8 * 1024, 32)]
missed = [bit // 32 for bit in bits if not refused(bit)]
verdict("flipped bits", missed == [254], "refused, but for number 254")

# %% [markdown]
# ## Further reading
#
# - [llm.c](https://github.com/karpathy/llm.c): `gpt2_build_from_checkpoint` in
#   `train_gpt2.c` reads the file, `write_model` in `train_gpt2.py` writes it.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("4.2")
