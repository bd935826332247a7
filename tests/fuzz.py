"""Damaged copies of good files: a reader must answer or give one error."""

import gzip
import json
import shutil
import tracemalloc
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnb.formats.published import INDEX
from llmnb.formats.safetensors import TensorFile, write_tensors

# what a reader may raise; the command line shows each in one line
ERRORS = (ValueError, TypeError, OSError)
# numbers that headers lie with, as 4 or 8 little-endian bytes
LIES = [0, 1, -1, 2**16, 2**31 - 1, -(2**31), 2**40, 2**63 - 1, -(2**63)]


def fuzzed(count, **how):
    """Have a test run so many times, with `data` that it can draw from."""
    often = settings(deadline=None, max_examples=count, **how)
    return lambda test: often(given(data=st.data())(test))


@st.composite
def mangled(draw, good):
    """The bytes `good` after one to four of: a byte or a number changed, a
    piece cut out, the end cut off, bytes put in.

    Half of the changes fall into the first 64 bytes, where headers are.
    """
    raw = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        early = st.integers(0, min(64, len(raw)))
        at = draw(early | st.integers(0, len(raw)))
        kind = draw(st.sampled_from(["byte", "number", "cut", "end", "more"]))
        if kind == "byte":
            raw[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
        elif kind == "number":
            lie = draw(st.sampled_from(LIES))
            width = draw(st.sampled_from([4, 8]))
            at -= at % 4
            low = lie % 2 ** (8 * width)
            raw[at : at + width] = low.to_bytes(width, "little")
        elif kind == "cut":
            del raw[at : at + draw(st.integers(1, 40))]
        elif kind == "end":
            del raw[at:]
        else:
            raw[at:at] = draw(st.binary(min_size=1, max_size=40))
    return bytes(raw)


def answer(read, path, raw, limit=16 << 20):
    """What read(path) makes of `path` holding `raw`: result, or error.

    Fails when it raises anything but ERRORS, when the error names no file
    in the folder of `path`, and when NumPy or Python ask for more than
    `limit` bytes.
    """
    path.write_bytes(raw)
    tracemalloc.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged numbers, not files
            result = read(path)
    except ERRORS as error:
        assert str(path.parent) in str(error), error
        result = error
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < limit, f"{peak:,} bytes for a file of {len(raw):,}"
    return result


def damaged(data, read, good, bad):
    """What read makes of a damaged copy of a file: a result, or a short error.

    data: hypothesis' draws. bad: where the copy lies for a while, in the
    place of the good file.
    """
    try:
        found = answer(read, bad, data.draw(mangled(good.read_bytes())))
    finally:
        shutil.copy(good, bad)
    assert not isinstance(found, Exception) or len(str(found)) < 500
    return found


def refused(says, read, path, *args, **how):
    """Have a reader refuse a path in one line, which names it and says so."""
    with pytest.raises(ValueError, match=says) as error:
        read(path, *args, **how)
    text = str(error.value)
    assert str(path) in text and "\n" not in text
    assert len(text.replace(str(path), "")) < 500


def packed(name, raw):
    """Bytes as a file of that name holds them, by its ending."""
    if name.endswith(".gz"):
        return gzip.compress(raw, mtime=0)
    if name.endswith(".zst"):
        return pytest.importorskip("zstandard").compress(raw)
    return raw


def altered(table, changes):
    """A dict with other values, and without those that are to be None."""
    gone = {name for name, x in changes.items() if x is None}
    return {k: x for k, x in (table | changes).items() if k not in gone}


def header(*numbers):
    """The first kilobyte of a file of llm.c's."""
    return np.array([*numbers] + [0] * (256 - len(numbers)), "<i4").tobytes()


def put_number(path, at, value, size=4):
    """Overwrite bytes of a file by a whole number."""
    raw = bytearray(path.read_bytes())
    raw[at : at + size] = int(value).to_bytes(size, "little", signed=value < 0)
    path.write_bytes(raw)


def describe(folder, **changes):
    """Change what a model's config.json says; None: it says nothing."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(altered(config, changes)))


def flip(path, at):
    """Flip the lowest bit of a byte."""
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def cut_in_two(folder, tensors):
    """Write tensors as two files and their index, in the place of one."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    names, table = sorted(tensors), {}
    for part, chosen in enumerate((names[::2], names[1::2])):
        there = f"model-{part}.safetensors"
        write_tensors(folder / there, {n: tensors[n] for n in chosen})
        table |= dict.fromkeys(chosen, there)
    (folder / INDEX).write_text(json.dumps({"weight_map": table}))
    return folder / INDEX


def tensors_of(folder, **changes):
    """The arrays of a model's folder, by name; some of them altered."""
    file = TensorFile(folder / "model.safetensors")
    return altered({name: file[name] for name in file.names}, changes)
