# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       formats.safetensors: "Any named arrays in one file, by the safetensors library."
# ---

# %% [markdown]
# # safetensors: any arrays in one file
#
# > A table of names, types, shapes and places, and then the numbers: a
# > container for whatever has no format of its own, with a checksum for each
# > array.
#
# *Reading time: 14 minutes. You need: [chapter 4.1](01_files.ipynb); the checks
# of [chapter 4.2](02_checkpoints.ipynb) come back here.*

# %% [markdown]
# ## Where we are
#
# The header of a `.bin` has room for one kind of model. For anything else we
# use *safetensors*, the format of the Hugging Face hub, and it is much like
# the arena of [chapter 1.16](../1_by_hand/16_memory.ipynb): a table of names,
# types, shapes and places, then the numbers. At the end of this chapter you
# can
#
# - read the table of such a file with a text editor;
# - say why we write the file ourselves, and let a library read it;
# - say what a sum must cover so that no other array can pass for the right
#   one.

# %% [markdown]
# ## Setup

# %% setup
import os
import tempfile
from pathlib import Path

from llmnb.book.verify import verdict

folder = Path(tempfile.mkdtemp())

# %% imports of the container tags=["export"]
import json
import math
import zlib

import numpy as np

from llmnb.files import check_regular, replacing, what_is
from llmnb.reference.bfloat16 import from_bfloat16

# %% [markdown]
# ## The format
#
# | bytes | meaning |
# |---|---|
# | 0 to 7 | $n$, the length of the table |
# | 8 to $8 + n$ | the table, as JSON: for each name its `dtype`, `shape` and `data_offsets`, counted from the table's end; under `__metadata__` pairs of strings |
# | the rest | the arrays one after the other, without a gap |
#
# By hand, for one array of two float32 numbers:

# %% one array by hand
place = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
table = json.dumps({"x": place}).encode()
body = np.array([1.0, -2.0], "<f4").tobytes()
raw = len(table).to_bytes(8, "little") + table + body
print(raw[:8].hex(" "), raw[8 : 8 + len(table)].decode(), body.hex(" "))

# %% [markdown]
# ## Write
#
# The library `safetensors` writes such a file from a copy of all arrays in
# memory. Our models fill half of a machine's memory, so we write ourselves,
# one array after the other.
#
# As in [chapter 4.2](02_checkpoints.ipynb), a checksum finds a flipped bit: one
# of each array, in the metadata, which other programs pass over. It covers the
# array's bytes and whatever says how to read them: its name, type and shape,
# and the other metadata. The sums are known when the arrays are written, so the
# table, whose length they do not change, is written twice.

# %% types by their names tags=["export"]
DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "U64": "<u8",
    "I32": "<i4",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "|u1",
    "BF16": "<u2",  # read as float32; we write none
}
NAMES = {np.dtype(v): k for k, v in DTYPES.items() if k != "BF16"}
_LONGEST_TABLE = 1 << 23  # bytes; a GPT-2 of 48 blocks takes 64 thousand
_SUMS = "llmnb.crc32"  # where the metadata keep the sums, as JSON


# %% write tensors tags=["export"]
def write_tensors(path, tensors, metadata=None):
    """Write named arrays as one safetensors file.

    tensors: a mapping from name to array, of any shape and a dtype in
    `DTYPES`, or TypeError is raised. metadata: a mapping from str to str.
    A checksum of each array goes with them; ValueError when all that takes
    more than 8 MiB, and for a name that the format or the sums have. No more
    than one array is copied at a time. The file appears whole or not at all.
    """
    note, table, at = dict(metadata or {}), {}, 0
    _check_words(tensors, note)
    # the widest numbers first, so that each array begins at a multiple of
    # its numbers' size
    order = sorted(tensors, key=lambda name: -tensors[name].itemsize)
    for name in order:
        x = tensors[name]
        table[name] = _entry(name, x, at)
        at += x.nbytes
    sums = dict.fromkeys(order, 0)
    head = _head(table, note, sums)
    with replacing(path) as file:
        file.write(head)
        for name in order:
            body = np.ascontiguousarray(tensors[name]).reshape(-1).data
            sums[name] = zlib.crc32(body, _told(table, note, name))
            file.write(body)
        file.seek(0)
        file.write(_head(table, note, sums))


# %% its words tags=["exporti"]
def _check_words(tensors, note):
    """Raise for names and metadata that no reader would take."""
    for word in (*tensors, *note, *note.values()):
        if not isinstance(word, str):
            raise TypeError(
                f"write_tensors: names and metadata must be str, got {word!r}"
            )
    for name, words in (("__metadata__", tensors), (_SUMS, note)):
        if name in words:
            raise ValueError(f"write_tensors: {name} is taken, as a name")


# %% a row of the table tags=["exporti"]
def _entry(name, x, at):
    kind = NAMES.get(x.dtype)
    if kind is None:
        known = ", ".join(d.name for d in NAMES)
        raise TypeError(
            f"write_tensors: {name} must be one of {known}, got {x.dtype}"
        )
    places = [at, at + x.nbytes]
    return {"dtype": kind, "shape": list(x.shape), "data_offsets": places}


# %% the table and its sums tags=["exporti"]
def _head(table, note, sums):
    """The file up to its arrays, of one length for any sums."""
    kept = json.dumps({name: f"{x:08x}" for name, x in sums.items()})
    table = {"__metadata__": note | {_SUMS: kept}} | table
    head = json.dumps(table).encode()
    if len(head) > _LONGEST_TABLE:
        raise ValueError(
            f"write_tensors: names and metadata must take at most "
            f"{_LONGEST_TABLE:,} bytes, got {len(head):,}"
        )
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head


def _told(table, note, name):
    """The sum of all that says how to read an array; its bytes go on."""
    row = table[name]["dtype"], table[name]["shape"]
    return zlib.crc32(json.dumps([note, name, row], sort_keys=True).encode())


# %% [markdown]
# ## Read
#
# Reading is the library's job: it knows how a table can lie. Names that
# overlap, offsets beyond the end, a shape that does not match its bytes, a
# table of a gigabyte: it refuses them all before a number is read. What it
# cannot give to NumPy is bfloat16, a type that NumPy does not have: the upper
# half of a float32 ([chapter 2.6](../2_cpu/06_bfloat16.ipynb)). So after the
# library has checked the table we read the bytes ourselves. What the library
# allows is a table of 100 MB, which grows to twenty times that when Python
# parses it: we allow eight.


# %% read tensors tags=["export"]
class TensorFile:
    """The arrays of a safetensors file, each read when it is asked for.

    Raises ValueError, naming the file, when it is not a whole safetensors
    file, and OSError when it cannot be read. metadata: a dict of str. names:
    a list. file[name] is a new array; bfloat16 becomes float32. ValueError
    for a dtype that is not in `DTYPES` and for an array that does not match
    the checksum it was written with, KeyError for an unknown name.
    """

    def __init__(self, path):
        from safetensors import SafetensorError, safe_open

        check_regular(path)
        self.path = path
        try:
            with open(path, "rb") as file:
                size = int.from_bytes(file.read(8), "little")
                if size > _LONGEST_TABLE:
                    raise ValueError(f"a table of {size:,} bytes is too long")
                with safe_open(path, framework="numpy"):
                    self._table = json.loads(file.read(size))
            self.metadata = self._table.pop("__metadata__", None) or {}
            if not all(isinstance(x, dict) for x in self._table.values()):
                raise ValueError("a row of its table must be an object")
            self._sums = dict(json.loads(self.metadata.pop(_SUMS, "{}")))
        except (SafetensorError, ValueError, TypeError, RecursionError) as e:
            why = what_is(path) or f"{e!s:.200}"  # which may quote the table
            raise ValueError(
                f"{path}: not a whole safetensors file ({why})"
            ) from None
        self._start = 8 + size
        self.names = list(self._table)

    def shape(self, name):
        """The shape of an array, a tuple; nothing is read."""
        return tuple(self._table[name]["shape"])

    def dtype(self, name):
        """The format's name for an array's type, such as "F32"."""
        return self._table[name]["dtype"]

    def __getitem__(self, name):
        kind, shape = self.dtype(name), self.shape(name)
        if kind not in DTYPES:
            raise ValueError(f"{self.path}: {name} is {kind}, not a number")
        at = self._start + self._table[name]["data_offsets"][0]
        x = np.fromfile(self.path, DTYPES[kind], math.prod(shape), offset=at)
        if x.size != math.prod(shape):
            raise ValueError(f"{self.path}: ends within {name}")
        self._check(name, x)
        if kind == "BF16":
            x = from_bfloat16(x)
        return x.reshape(shape)

    def _check(self, name, x):
        """Raise unless an array has the sum it was written with, if any."""
        found = zlib.crc32(x, _told(self._table, self.metadata, name))
        if self._sums.get(name, f"{found:08x}") != f"{found:08x}":
            raise ValueError(
                f"{self.path}: {name} is damaged, its checksum is not the one "
                "it was written with: take another copy, or write it anew"
            )


# %% any arrays, there and back
arrays = {
    "weights": np.random.default_rng(3).normal(size=(3, 5)).T,
    "step": np.array(17),
    "nothing": np.zeros((0, 4), np.float32),
}
write_tensors(folder / "any.safetensors", arrays, {"note": "hello"})
file = TensorFile(folder / "any.safetensors")
print(file.metadata, {x: file.shape(x) for x in file.names})
same = all(np.array_equal(file[x], arrays[x]) for x in arrays)
verdict("arrays", same, "come back to the last bit")

# %% the file made by hand
(folder / "hand.safetensors").write_bytes(raw)
file = TensorFile(folder / "hand.safetensors")
verdict("by hand", file["x"].tolist() == [1.0, -2.0], "is read")

# %% a file that ends early
whole = (folder / "any.safetensors").read_bytes()
(folder / "short.safetensors").write_bytes(whole[:-8])
try:
    TensorFile(folder / "short.safetensors")
except ValueError as error:
    print(str(error).replace(f"{folder}{os.sep}", ""))

# %% a bit that flips
flipped = bytearray(whole)
flipped[-1] ^= 1
(folder / "flipped.safetensors").write_bytes(flipped)
try:
    file = TensorFile(folder / "flipped.safetensors")
    _ = file["step"], file["weights"]
except ValueError as error:
    print(str(error).replace(f"{folder}{os.sep}", ""))

# %% [markdown]
# Could two arrays of one size change places? The bytes of each would be whole,
# and only their names wrong. The sum covers the name, so it is caught:

# %% two names that change places
pair = {"a": np.zeros(4, np.float32), "b": np.ones(4, np.float32)}
write_tensors(folder / "pair.safetensors", pair)
raw = (folder / "pair.safetensors").read_bytes()
swapped = raw.replace(b'"a": {', b'"c": {').replace(b'"b": {', b'"a": {')
(folder / "pair.safetensors").write_bytes(
    swapped.replace(b'"c": {', b'"b": {')
)
try:
    _ = TensorFile(folder / "pair.safetensors")["a"]
except ValueError as error:
    verdict("the wrong name", "damaged" in str(error), "is caught")

# %% [markdown]
# ## Take away
#
# - A table of names and places, then the numbers: what an arena is in memory,
#   this is on the disk.
# - Writing is simple, and we do it to save a copy. Reading what strangers
#   wrote is not, and the library does it.
# - A sum that covers only the bytes lets bytes pass under another name.
#
# ## Design note
#
# PyTorch's own files are *pickles*, programs for a small machine that can call
# any function; to read one is to run what a stranger wrote. safetensors was
# made so that reading is only reading. Its table is JSON, which has no room
# for anything that runs. We read no pickles, at the price that a few old
# models must be converted first, by somebody who trusts them.
#
# ## Exercises
#
# **1** (★). Why are the widest numbers written first?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# So that each array begins at a multiple of its numbers' size, which a program
# that maps the file into memory needs. Behind float64 arrays anything narrower is
# aligned; behind a uint8 array of 3 nothing would be. The table is filled up with
# blanks to a multiple of 8 for the same reason.
# :::

# %% exercise 1, checked tags=["hide-cell"]
odd = {
    "a": np.zeros(3, np.uint8),
    "b": np.zeros(3),
    "c": np.zeros(1, np.int32),
}
write_tensors(folder / "odd.safetensors", odd)
raw = (folder / "odd.safetensors").read_bytes()
size = int.from_bytes(raw[:8], "little")
table = json.loads(raw[8 : 8 + size])
starts = {x: 8 + size + table[x]["data_offsets"][0] for x in odd}
right = all(starts[x] % odd[x].itemsize == 0 for x in odd)
verdict("exercise 1", right, "each begins at a multiple of its width")

# %% [markdown]
# ## Further reading
#
# - [The format's page](https://huggingface.co/docs/safetensors): the table,
#   and what a reader must refuse.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("4.3")
