# Written by `make export` from notebooks/4_practice/01_files.py: edit that file.

"""Files that appear whole or not at all, and folders with one writer."""

__all__ = [
    "BESIDE", "Lock", "check_regular", "in_use", "make_folder", "own_folder",
    "package", "read_json", "read_small", "replacing", "sync_folder",
    "unmade", "what_is", "write_whole",
]


# imports for files
import contextlib
import errno
import importlib
import json
import os
import platform
import re
import time
import warnings
import weakref
from functools import cache
from pathlib import Path


# names on the disk
_UNABLE = errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP


def sync_folder(folder):
    """Have the system bring the names in a folder to the disk.

    Does nothing on Windows, in a folder that may not be read, and on a file
    system that cannot do it. Raises OSError when the disk fails.

    Derived in chapter 4.1.
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
        if error.errno not in _UNABLE:
            raise


def make_folder(path):
    """Make a folder and those above it, each with its name on the disk.

    Derived in chapter 4.1.
    """
    path = Path(path)
    if not path.is_dir():
        if path != path.parent:  # as of a drive that is not there
            make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


# write beside
BESIDE = r"\.([0-9a-f]{16}|[0-9]+)\.new"  # what a kill leaves; once the pid


@contextlib.contextmanager
def replacing(path, durable=True):
    """Open a file beside `path` for writing bytes, then rename it to `path`.

    A reader sees the old file or the new one, never half of one. When
    anything goes wrong, such as a full disk, the new file is removed, the
    old one is as it was, and the error goes on. After a kill the new file
    may stay; its name is that of `path` and what `BESIDE` matches. durable:
    wait until the disk has it. A pipe, a device or a folder is not replaced:
    FileExistsError.

    Derived in chapter 4.1.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{path}: must be a regular file")
    beside = path.with_name(f"{path.name}.{os.urandom(8).hex()}.new")
    try:
        with open(beside, "xb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        # which nobody has named; and a full disk names no file
        unnamed = error.errno and not error.filename
        if unnamed or error.filename == str(beside):
            error.filename = str(path)
        raise
    finally:
        # where nothing may be written, nothing may be removed either
        with contextlib.suppress(OSError):
            beside.unlink()
    if durable:
        sync_folder(path.parent)


def write_whole(path, data):
    """Write bytes as a file that appears whole or not at all.

    Derived in chapter 4.1.
    """
    with replacing(path) as file:
        file.write(data)


# what a file is instead
# how files begin that are taken for others
_BEGINNINGS = {
    (b"version https://git-lfs",): "a Git LFS pointer, which stands for a "
    "file and is not that file: `git lfs pull` fetches it",
    (b"PK\x03\x04",): "a zip archive, as PyTorch's torch.save and NumPy's "
    "savez write it: save the model as safetensors instead",
    (b"\x80\x02\x8a\n", b"\x80\x03", b"\x80\x04\x95", b"\x80\x05\x95"): "a "
    "pickle, as PyTorch saves it: a program that could do anything, so it is "
    "not opened; in transformers, save_pretrained writes safetensors",
    (b"GGUF",): "a GGUF file of llama.cpp: take the safetensors of the model",
    (b"\x89HDF",): "an HDF5 file of Keras: take the safetensors of the model",
    (b"\x93NUMPY",): "an array of NumPy's",
    # gzip, zstd, bzip2, xz
    (b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ"): "a packed "
    "file: unpack it first",
    (b"<!doctype", b"<!DOCTYPE", b"<html"): "a web page, not the file that it "
    "is about: download that",
    (b"Entry not found",): "an answer of the hub, that it has no such file",
}
# llm.c's files, by the number that they begin with
_NUMBERS = {
    20240326: "a model in llm.c's format",
    20240327: "a debug state of llm.c",
    20240328: "a tokenizer in llm.c's format",
    20240520: "a shard of tokens",
    20240801: "a shard of tokens, of four bytes each",
    20240522: "a multiple choice test in llm.c's format",
}


def what_is(path, mine=None):
    """What a file is that its reader has refused, or "" if that is unknown.

    mine: the number that the reader's own files begin with, if they do.
    Returns a clause, "this is ...", that says what to do about it.

    Derived in chapter 4.1.
    """
    with open(path, "rb") as file:
        start = file.read(64)
    if not start:
        return "this is an empty file, of 0 bytes: copy or fetch it again"
    for beginnings, what in _BEGINNINGS.items():
        if start.lstrip().startswith(beginnings):
            return f"this is {what}"
    number = int.from_bytes(start[:4], "little")
    other = number != mine and _NUMBERS.get(number)
    return f"this is {other}" if other else ""


# a package that is not there
def package(name, extra, user):
    """Import a module that only an extra of llmnb installs; returns it.

    user: what needs it, as the message calls it. Raises ImportError, which
    says how to install it.

    Derived in chapter 4.1.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError(
            f"{user} needs the package {name.partition('.')[0]}: "
            f"pip install 'llmnb[{extra}]'"
        ) from None


# read what is small
def check_regular(path):
    """Raise ValueError for a pipe, a device or a folder, naming it.

    Derived in chapter 4.1.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path}: must be a regular file")


def read_small(path, most):
    """The bytes of a file that has no reason to be large.

    Raises ValueError, naming the file, when it has more than `most`, before
    any is read, and when it is no file but a pipe, say, which has no size.

    Derived in chapter 4.1.
    """
    check_regular(path)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ValueError(
                f"{path}: must have at most {most:,} bytes, has {size:,}"
            )
        return file.read(size)


# read JSON
def read_json(path, most=1 << 20):
    """The object in a JSON file of at most so many bytes, as a dict.

    Raises ValueError, naming the file, for anything else.

    Derived in chapter 4.1.
    """
    raw = read_small(path, most)
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:
        what = what_is(path) or f"not JSON ({error})"
        raise ValueError(f"{path}: {what}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must hold a JSON object")
    return found


# locked or not
LOCK = ".lock"
LOCKS = weakref.WeakValueDictionary()  # folder: its Lock in this process
HELD = BlockingIOError, PermissionError  # another process has the lock


def _flock(place):
    """Lock an open file, or raise one of `HELD`, or another OSError."""
    if os.name == "nt":
        import msvcrt

        # beyond the end, so that the text can be read
        os.lseek(place, 1 << 30, os.SEEK_SET)
        msvcrt.locking(place, msvcrt.LK_NBLCK, 1)
        os.lseek(place, 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _open(path, create):
    flags = os.O_RDWR | os.O_CREAT * create | getattr(os, "O_NOFOLLOW", 0)
    return os.open(path, flags, 0o666)


def _same(place, path):
    """Whether an open file still is the one that its path names."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(place), os.stat(path))
    return False


# who has it
def in_use(folder):
    """The words "is in use by ..." if another process has a folder, or "".

    Derived in chapter 4.1.
    """
    own = LOCKS.get(os.path.realpath(folder))
    if own and own.release.alive:
        return ""
    with contextlib.suppress(OSError):
        place = _open(Path(folder, LOCK), create=False)
        try:
            _flock(place)
        except HELD:
            return _words(folder)
        finally:
            os.close(place)
    return ""


def own_folder(path, force=False):
    """Make a folder for one program's files; returns it as a Path.

    Raises FileExistsError when it holds anything, unless `force`. A lock, and
    what a kill left half written, are nothing.

    Derived in chapter 4.1.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file, not a folder")
    make_folder(path)
    names = {x.name for x in path.iterdir()} - {LOCK}
    left = {name for name in names if re.search(f"{BESIDE}$", name)}
    if names - left and not force:
        state = in_use(path) or (
            "exists and is not empty: choose another folder, or force it "
            "(--force)"
        )
        raise FileExistsError(f"{path} {state}")
    return path


@contextlib.contextmanager
def unmade(path):
    """After an error within, no empty folder is left that was made for it.

    Of `path` and those above it, what did not exist is removed if it is
    empty. Yields a list of Paths, to which others may be added.

    Derived in chapter 4.1.
    """
    path = Path(os.path.realpath(path))  # without links and ".."
    made = [x for x in (path, *path.parents) if not x.exists()][::-1]
    try:
        yield made
    except BaseException:
        with contextlib.suppress(OSError):
            for folder in reversed(made):
                folder.rmdir()
        raise


def _words(folder):
    text = ""
    with contextlib.suppress(OSError), open(Path(folder, LOCK), "rb") as file:
        text = file.read(200).decode("utf-8", "replace")
    who = "".join(filter(str.isprintable, text)) or "another process"
    return f"is in use by {who}"


# take it and let it go
def _take(folder):
    """Lock a folder; returns the open file."""
    path = Path(folder, LOCK)
    place = _open(path, create=True)
    try:
        _flock(place)
    except HELD:
        os.close(place)
        raise BlockingIOError(f"{folder} {_words(folder)}") from None
    except OSError as error:
        warnings.warn(
            f"{folder}: no locks on this file system ({error.strerror}); "
            "see to it that no other process writes there",
            stacklevel=2,
        )
    if not _same(place, path):  # its last owner was just taking it away
        os.close(place)
        return _take(folder)
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    who = f"process {os.getpid()} on {platform.node()} since {now}"
    # on a full disk the lock holds without the words
    with contextlib.suppress(OSError):
        os.ftruncate(place, 0)
        os.write(place, who.encode())
    return place


def _let_go(place, path, process):
    """Remove the file and its lock; in a forked child, only close it."""
    ours = process == os.getpid() and _same(place, path)
    if os.name == "nt":
        os.close(place)
    if ours:
        with contextlib.suppress(OSError):
            os.unlink(path)
    if os.name != "nt":
        os.close(place)


# the lock of a folder
class Lock:
    """The right to write into a folder, which one process has at a time.

    Taking it raises BlockingIOError, which names the process, while another
    has it. In the process that has it the newer Lock takes it over. It ends
    with release(), with a `with` statement, with the object, and with the
    process, however that ends. Where the file system has no locks, a
    warning is given instead.

    Derived in chapter 4.1.
    """

    def __init__(self, folder):
        _mind_forks()
        self.folder, self._lost = Path(folder), False
        key = os.path.realpath(folder)
        older = LOCKS.get(key)
        if older:
            older._lost = True
            older.release()
        self._hold()
        LOCKS[key] = self

    def _hold(self):
        self._at = _take(self.folder), os.path.realpath(self.folder / LOCK)
        self.release = weakref.finalize(self, _let_go, *self._at, os.getpid())

    def check(self, hold=False):
        """Raise BlockingIOError if a newer Lock of this process has it.

        hold: take it again if it was released, or if its file was removed.
        """
        if self._lost:
            raise BlockingIOError(
                f"{self.folder} has been taken up anew, by this process"
            )
        if hold and not (self.release.alive and _same(*self._at)):
            self.release()
            self._hold()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.release()


# no lock is inherited
@cache
def _mind_forks():
    """Let go of the locks in forked children, which might live longer."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_let_go_of_all)


def _let_go_of_all():
    for lock in list(LOCKS.values()):
        lock.release()
