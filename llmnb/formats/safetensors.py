# Written by `make export` from notebooks/4_practice/03_safetensors.py: edit that file.

"""Any named arrays in one file, by the safetensors library."""

__all__ = ["DTYPES", "NAMES", "TensorFile", "write_tensors"]


# imports of the container
import json
import math
import zlib

import numpy as np

from llmnb.files import check_regular, replacing, what_is
from llmnb.reference.bfloat16 import from_bfloat16


# types by their names
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


# write tensors
def write_tensors(path, tensors, metadata=None):
    """Write named arrays as one safetensors file.

    tensors: a mapping from name to array, of any shape and a dtype in
    `DTYPES`, or TypeError is raised. metadata: a mapping from str to str.
    A checksum of each array goes with them; ValueError when all that takes
    more than 8 MiB, and for a name that the format or the sums have. No more
    than one array is copied at a time. The file appears whole or not at all.

    Derived in chapter 4.3.
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


# its words
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


# a row of the table
def _entry(name, x, at):
    kind = NAMES.get(x.dtype)
    if kind is None:
        known = ", ".join(d.name for d in NAMES)
        raise TypeError(
            f"write_tensors: {name} must be one of {known}, got {x.dtype}"
        )
    places = [at, at + x.nbytes]
    return {"dtype": kind, "shape": list(x.shape), "data_offsets": places}


# the table and its sums
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


# read tensors
class TensorFile:
    """The arrays of a safetensors file, each read when it is asked for.

    Raises ValueError, naming the file, when it is not a whole safetensors
    file, and OSError when it cannot be read. metadata: a dict of str. names:
    a list. file[name] is a new array; bfloat16 becomes float32. ValueError
    for a dtype that is not in `DTYPES` and for an array that does not match
    the checksum it was written with, KeyError for an unknown name.

    Derived in chapter 4.3.
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
