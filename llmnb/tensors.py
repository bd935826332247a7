# Written by `make export` from notebooks/02_memory.py: edit that file.

"""Lay out one block of memory.

One allocation holds every tensor of the model as a named view, so the
footprint is known before training begins and never grows.
"""

__all__ = [
    "DTYPES",
    "NAMES",
    "TensorFile",
    "write_tensors",
]


# imports of the container
import json

import numpy as np

from llmnb.files import replacing


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


# write tensors
def write_tensors(path, tensors, metadata=None):
    """Write named arrays as one safetensors file.

    tensors: a mapping from name to array, of any shape and a dtype in
    `DTYPES`, or TypeError is raised. metadata: a mapping from str to str.
    No more than one array is copied at a time. The file appears whole or
    not at all.

    Derived in chapter 2.
    """
    table, at = {"__metadata__": dict(metadata or {})}, 0
    # the widest numbers first, so that each array begins at a multiple of
    # its numbers' size
    order = sorted(tensors, key=lambda name: -tensors[name].itemsize)
    for name in order:
        x = tensors[name]
        table[name] = _entry(name, x, at)
        at += x.nbytes
    head = json.dumps(table).encode()
    head += b" " * (-len(head) % 8)
    with replacing(path) as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name in order:
            file.write(np.ascontiguousarray(tensors[name]).reshape(-1).data)


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


# read tensors
class TensorFile:
    """The arrays of a safetensors file, each read when it is asked for.

    Raises ValueError, naming the file, when it is not a whole safetensors
    file, and OSError when it cannot be read. metadata: a dict of str. names:
    a list. file[name] is a new array; bfloat16 becomes float32. ValueError
    for a dtype that is not in `DTYPES`, KeyError for an unknown name.

    Derived in chapter 2.
    """

    def __init__(self, path):
        from safetensors import SafetensorError, safe_open

        self.path = path
        with open(path, "rb") as file:
            try:
                with safe_open(path, framework="numpy") as checked:
                    self.metadata = dict(checked.metadata() or {})
            except SafetensorError as error:
                raise ValueError(
                    f"{path}: not a whole safetensors file ({error})"
                ) from None
            size = int.from_bytes(file.read(8), "little")
            self._table = json.loads(file.read(size))
        self._table.pop("__metadata__", None)
        self._start = 8 + size
        self.names = list(self._table)

    def shape(self, name):
        """The shape of an array, a tuple; nothing is read."""
        return tuple(self._table[name]["shape"])

    def dtype(self, name):
        """The format's name for an array's type, such as "F32"."""
        return self._table[name]["dtype"]

    def __getitem__(self, name):
        kind, (start, stop) = self.dtype(name), self._span(name)
        if kind not in DTYPES:
            raise ValueError(f"{self.path}: {name} is {kind}, not a number")
        offset, dtype = self._start + start, np.dtype(DTYPES[kind])
        count = (stop - start) // dtype.itemsize
        x = np.fromfile(self.path, dtype, count, offset=offset)
        if x.size != count:
            raise ValueError(f"{self.path}: ends within {name}")
        if kind == "BF16":
            x = (x.astype(np.uint32) << 16).view(np.float32)
        return x.reshape(self.shape(name))

    def _span(self, name):
        return self._table[name]["data_offsets"]
