# Written by `make export` from notebooks/1_by_hand/04_gpt2.py: edit that file.

"""Files that appear whole or not at all."""

__all__ = [
    "BESIDE",
    "UNABLE",
    "make_folder",
    "read_small",
    "replacing",
    "sync_folder",
    "what_is",
]


# imports for files
import contextlib
import errno
import os
from pathlib import Path


# names on the disk
UNABLE = errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP


def sync_folder(folder):
    """Have the system bring the names in a folder to the disk.

    Does nothing on Windows, in a folder that may not be read, and on a file
    system that cannot do it. Raises OSError when the disk fails.

    Derived in chapter 1.4.
    """
    if os.name == "nt":
        return
    try:
        place = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(place)
        finally:
            os.close(place)
    except OSError as error:
        if error.errno not in UNABLE:
            raise


def make_folder(path):
    """Make a folder and those above it, each with its name on the disk.

    Derived in chapter 1.4.
    """
    path = Path(path)
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


# write beside
BESIDE = r"\.([0-9a-f]{16}|[0-9]+)\.new"  # what a kill leaves; once the pid


@contextlib.contextmanager
def replacing(path):
    """Open a file beside `path` for writing bytes, then rename it to `path`.

    A reader sees the old file or the new one, never half of one. When
    anything goes wrong, such as a full disk, the new file is removed, the
    old one is as it was, and the error goes on. After a kill the new file
    may stay; its name is that of `path` and what `BESIDE` matches.

    Derived in chapter 1.4.
    """
    path = Path(path)
    beside = path.with_name(f"{path.name}.{os.urandom(8).hex()}.new")
    try:
        with open(beside, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(path.parent)


# what a file is instead
_PICKLE = (
    "a pickle, as PyTorch saves it: a program that could do anything, so it "
    "is not opened; in transformers, save_pretrained writes safetensors"
)
_PACKED = "a packed file: unpack it first"
_PAGE = "a web page, not the file that it is about: download that"
# how files begin that are taken for others
_BEGINNINGS = {
    b"version https://git-lfs": "a Git LFS pointer, which stands for a file "
    "and is not that file: `git lfs pull` fetches it",
    b"PK\x03\x04": "a zip archive, as PyTorch's torch.save and NumPy's savez "
    "write it: save the model as safetensors instead",
    b"\x80\x02\x8a\n": _PICKLE,
    b"\x80\x03": _PICKLE,
    b"\x80\x04\x95": _PICKLE,
    b"\x80\x05\x95": _PICKLE,
    b"GGUF": "a GGUF file of llama.cpp: take the safetensors of the model",
    b"\x89HDF": "an HDF5 file of Keras: take the safetensors of the model",
    b"\x93NUMPY": "an array of NumPy's",
    b"\x1f\x8b\x08": _PACKED,
    b"\x28\xb5\x2f\xfd": _PACKED,
    b"BZh": _PACKED,
    b"\xfd7zXZ": _PACKED,
    b"<!doctype": _PAGE,
    b"<!DOCTYPE": _PAGE,
    b"<html": _PAGE,
    b"Entry not found": "an answer of the hub, that it has no such file",
}
# llm.c's files, by the number that they begin with
_NUMBERS = {
    20240326: "a model in llm.c's format",
    20240327: "a debug state of llm.c",
    20240328: "a tokenizer in llm.c's format",
    20240520: "a shard of tokens",
    20240522: "a multiple choice test in llm.c's format",
}


def what_is(path, mine=None):
    """What a file is that its reader has refused, or "" if that is unknown.

    mine: the number that the reader's own files begin with, if they do.
    Returns a clause, "this is ...", that says what to do about it.

    Derived in chapter 1.4.
    """
    with open(path, "rb") as file:
        start = file.read(64)
    if not start:
        return "this is an empty file, of 0 bytes: copy or fetch it again"
    for beginning, what in _BEGINNINGS.items():
        if start.lstrip().startswith(beginning):
            return f"this is {what}"
    number = int.from_bytes(start[:4], "little")
    other = number != mine and _NUMBERS.get(number)
    return f"this is {other}" if other else ""


# read what is small
def read_small(path, most):
    """The bytes of a file that has no reason to be large.

    Raises ValueError, naming the file, when it has more than `most`, before
    any is read, and when it is no file but a pipe, say, which has no size.

    Derived in chapter 1.4.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path}: must be a regular file")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ValueError(
                f"{path}: must have at most {most:,} bytes, has {size:,}"
            )
        return file.read(size)
