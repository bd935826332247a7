# Written by `make export` from notebooks/4_practice/02_checkpoints.py: edit that file.

"""llm.c's files: their common header, and the file of a model's weights."""

__all__ = [
    "HEADER", "HEADER_BYTES", "MAGIC", "bin_header", "check_header",
    "config_of", "header_of", "read_bin", "read_header", "write_checkpoint",
]


# imports of the checkpoint
import os
import zlib
from dataclasses import astuple

import numpy as np

from llmnb.config import GPT2Config
from llmnb.files import check_regular, replacing, what_is
from llmnb.model.tensors import parameter_count, parameter_shapes
from llmnb.reference.bfloat16 import from_bfloat16, to_bfloat16


# the header of all files
HEADER = 256  # int32 numbers
HEADER_BYTES = 4 * HEADER


def header_of(magic, version, *numbers):
    """The header of one of llm.c's files: an array of int32.

    Derived in chapter 4.2.
    """
    header = np.zeros(HEADER, "<i4")
    header[: 2 + len(numbers)] = magic, version, *numbers
    return header


def read_header(path, magic, versions, count):
    """The size of a file, and the first `count` numbers behind its magic.

    The numbers are version first. Raises ValueError, naming the file, what
    is wrong and what would be right, for a pipe or a device, for a file that
    is shorter than its header, and for another magic number or version.

    Derived in chapter 4.2.
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
    """Raise ValueError for the first row (ok, what, must, got) not ok.

    Derived in chapter 4.2.
    """
    for ok, what, must, got in rows:
        if not ok:
            other = what_is(path, magic)
            raise ValueError(
                f"{path}: the {what} must be {must}, got {got}"
                + (other and f": {other}")
            )


# the numbers of a model's file
MAGIC = 20240326
_BODIES = {3: "<f4", 5: "<u2"}  # a version and how its numbers are stored
_SUMMED = 1  # in a header with a checksum, the last number but one
_PORTION = 1 << 22  # numbers read or written at a time: 16 MiB of float32


# write a checkpoint
def write_checkpoint(path, cfg, params, version=3):
    """Write a model in llm.c's .bin format.

    params: a mapping from llm.c's names to arrays, as `GPT2.params`.
    version: 3 for float32, 5 for bfloat16, rounded from float32 to nearest;
    ValueError for another, and for arrays of another model's shapes. The
    file appears whole or not at all.

    Derived in chapter 4.2.
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


# the shapes of what is written
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


# pieces
def _pieces(arrays):
    """Some arrays, flat, as views of at most _PORTION numbers."""
    for array in arrays:
        flat = np.asarray(array).reshape(-1)
        for first in range(0, flat.size, _PORTION):
            yield flat[first : first + _PORTION]


# read a header
def bin_header(path):
    """Version and configuration of a .bin, checked against its length.

    Derived in chapter 4.2.
    """
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
    """The GPT2Config of five sizes; ValueError names the file.

    Derived in chapter 4.2.
    """
    try:
        return GPT2Config(*sizes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


# the numbers behind a header
def read_bin(path, version, params):
    """Fill params, checked before, from the numbers behind the header.

    params: a mapping from names to arrays in the order of the file. Raises
    ValueError when the file ends early or does not match its checksum.

    Derived in chapter 4.2.
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
