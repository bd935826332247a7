# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       files: "Files that appear whole or not at all, and folders with one writer."
# ---

# %% [markdown]
# # Files: whole or not at all
#
# > What a kill, a full disk, a second writer or a wrong download can do to a
# > file, and the few functions after which they cannot.
#
# *Reading time: 24 minutes. You need: Python's files, and no other chapter.*

# %% [markdown]
# ## Where we are
#
# The model of Part 1 lived in memory. From here on it is kept: weights, logs,
# texts, tokens. Each of the programs in this part may be stopped at any
# moment, by you, by the system, by a power cut. Each reads files that somebody
# else has written, or damaged, or renamed. All the other chapters of this part
# stand on this one. At its end you can
#
# - say which states a file can be in after a kill, for two ways to write it;
# - say why a rename needs two more calls before it can be relied on;
# - keep a second process out of a folder without locking anybody out for ever;
# - refuse a file in one sentence that says what it is instead.

# %% [markdown]
# ## Setup

# %% setup
import json
import subprocess
import sys
import tempfile

from llmnb.book.verify import verdict

# %% imports for files tags=["export"]
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

# %% [markdown]
# ## By hand: two ways to write
#
# A file holds `the old text`, and a program replaces it by `the new text`.
# Here are the moments between which it may be killed:
#
# | written in place | what is there | written beside, then renamed | what is there |
# |---|---|---|---|
# | before | the old text | before | the old text |
# | `open(path, "w")` | nothing | `open(beside, "x")` | the old text |
# | half is written | `the n` | half is written | the old text |
# | all is written | the new text | all is written | the old text |
# | closed | the new text | renamed | the new text |
#
# On the left there are moments in which both texts are gone. On the right
# there is none: a rename is one step for the operating system, so that a
# reader finds the old file or the new one.

# %% killed in the middle
folder = Path(tempfile.mkdtemp())
IN_PLACE = """
import os, sys
file = open(sys.argv[1], "wb", buffering=0)
file.write(b"the n")
os._exit(9)
"""
BESIDE_IT = """
import os, sys
from llmnb.files import replacing
with replacing(sys.argv[1]) as file:
    file.write(b"the n")
    file.flush()
    os._exit(9)
"""
path = folder / "text"
for name, program in (("in place", IN_PLACE), ("beside", BESIDE_IT)):
    path.write_bytes(b"the old text")
    subprocess.run([sys.executable, "-c", program, path])
    print(f"{name:<9} {path.read_bytes()}")

# %% [markdown]
# `os._exit` ends a process at once, as a kill does: nothing is flushed and
# nothing is tidied up. `replacing` comes from the finished package; here is
# how it is written.
#
# ## Write beside, and rename
#
# The name beside is drawn anew each time, and the file must not exist (mode
# `x`): so two writers never share one, and a link that somebody has put there
# is not followed.
#
# A system keeps what is written in memory for a while. `fsync` waits until the
# disk has it: first the file, so that the name never leads to nothing, and
# after the rename the folder, which is itself a table from names to files. (On
# macOS `fsync` only waits until the disk has taken it, perhaps into a memory of
# its own: a kill loses nothing there, a power cut may.) What can be made again,
# such as a compiled kernel, need not wait: with `durable=False` a power cut
# may leave a new name with nothing behind it.

# %% names on the disk tags=["export"]
_UNABLE = errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP


def sync_folder(folder):
    """Have the system bring the names in a folder to the disk.

    Does nothing on Windows, in a folder that may not be read, and on a file
    system that cannot do it. Raises OSError when the disk fails.
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
    """Make a folder and those above it, each with its name on the disk."""
    path = Path(path)
    if not path.is_dir():
        if path != path.parent:  # as of a drive that is not there
            make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


# %% write beside tags=["export"]
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
    """Write bytes as a file that appears whole or not at all."""
    with replacing(path) as file:
        file.write(data)


# %% [markdown]
# The kill left its half behind, under a name that no reader looks for. A write
# that fails leaves nothing:

# %% a write that fails
(half,) = folder.glob("text.*.new")
verdict("after the kill", half.read_bytes() == b"the n", "half is beside")
(folder / "kept.txt").write_bytes(b"the old text")
try:
    with replacing(folder / "kept.txt") as file:
        file.write(b"half of the n")
        raise OSError("no space left")
except OSError as error:
    print("error:", error)
print([p.name for p in folder.glob("kept*")])
print((folder / "kept.txt").read_bytes())

# %% [markdown]
# ## Say what it is instead
#
# Files that are read may be anything. A reader knows only what it wants; that
# a file is *another* well-known thing, and what to do about it, one function
# knows for all of them. It is asked after the reader has refused, so that
# what it takes for a pickle can never be a model. `package` does the same for a
# library that a file needs and that not everybody installs.

# %% what a file is instead tags=["export"]
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


# %% a package that is not there tags=["export"]
def package(name, extra, user):
    """Import a module that only an extra of llmnb installs; returns it.

    user: what needs it, as the message calls it. Raises ImportError, which
    says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError(
            f"{user} needs the package {name.partition('.')[0]}: "
            f"pip install 'llmnb[{extra}]'"
        ) from None


# %% files that are something else
for name, raw in {
    "model.bin": b"PK\x03\x04 and so on",
    "vocab.json": b"version https://git-lfs.github.com/spec/v1\noid ...",
    "train.bin": (20240326).to_bytes(4, "little"),
}.items():
    (folder / name).write_bytes(raw)
    print(f"{name}: {what_is(folder / name)}")

# %% [markdown]
# ## Read what is small
#
# Text that is parsed whole grows in memory, JSON to some thirty times its
# size: a file that has no reason to be large is not read beyond what it may
# have.


# %% read what is small tags=["export"]
def check_regular(path):
    """Raise ValueError for a pipe, a device or a folder, naming it."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path}: must be a regular file")


def read_small(path, most):
    """The bytes of a file that has no reason to be large.

    Raises ValueError, naming the file, when it has more than `most`, before
    any is read, and when it is no file but a pipe, say, which has no size.
    """
    check_regular(path)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ValueError(
                f"{path}: must have at most {most:,} bytes, has {size:,}"
            )
        return file.read(size)


# %% read JSON tags=["export"]
def read_json(path, most=1 << 20):
    """The object in a JSON file of at most so many bytes, as a dict.

    Raises ValueError, naming the file, for anything else.
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


# %% [markdown]
# ## One writer at a time
#
# Half files are one danger, two writers another. A run that is started twice
# in one folder, by mistake or by two scripts, would put every line into the
# log twice, and one process would remove the files of the other. So a program
# that works in a folder for long **locks** it. The file `.lock` says who has
# it, and the system keeps a mark on the open file (`flock`), which no second
# process gets. That mark is the point: it goes when its process goes, in
# whatever way, so that a program that was killed locks nobody out, whatever
# its file still says.

# %% locked or not tags=["exporti"]
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


# %% [markdown]
# Who has a folder is asked by trying to mark its file. And since nobody's files
# should be lost by a wrong name, a folder that holds any is taken only when
# that is asked for; one that was made for work which is then refused is removed
# again.


# %% who has it tags=["export"]
def in_use(folder):
    """The words "is in use by ..." if another process has a folder, or ""."""
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


# %% [markdown]
# Taking the lock has one gap. Between the opening of the file and the marking
# of it, the last owner may remove it; then the mark is on a file that no name
# leads to. So after the marking we look whether the name still leads to the
# same file, and begin anew if not.


# %% take it and let it go tags=["exporti"]
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


# %% [markdown]
# In a notebook, the same process often takes up a folder again while a
# variable still holds the older lock. There the newer one gets the folder, and
# the older one is told so if it ever tries to go on. `check` is for those who
# are about to write: it raises if the folder is no longer theirs.


# %% the lock of a folder tags=["export"]
class Lock:
    """The right to write into a folder, which one process has at a time.

    Taking it raises BlockingIOError, which names the process, while another
    has it. In the process that has it the newer Lock takes it over. It ends
    with release(), with a `with` statement, with the object, and with the
    process, however that ends. Where the file system has no locks, a
    warning is given instead.
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


# %% [markdown]
# A forked child has its parent's open files, and with them the mark. It would
# keep the folder locked after the parent's end, so a child lets go of all
# locks as soon as it exists.


# %% no lock is inherited tags=["exporti"]
@cache
def _mind_forks():
    """Let go of the locks in forked children, which might live longer."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_let_go_of_all)


def _let_go_of_all():
    for lock in list(LOCKS.values()):
        lock.release()


# %% [markdown]
# Another process is refused while we have the folder, and gets it afterwards,
# also when we were killed:

# %% locked out
TRY = """
import sys
from llmnb.files import Lock
try:
    Lock(sys.argv[1])
    print("has it")
except BlockingIOError as error:
    print("refused:", "is in use by process" in str(error))
"""


def try_it():
    command = [sys.executable, "-c", TRY, folder]
    print(
        subprocess.run(command, capture_output=True, text=True).stdout, end=""
    )


lock = Lock(folder)
try_it()
lock.release()
try_it()
KILLED = """
import os, sys
from llmnb.files import Lock
lock = Lock(sys.argv[1])
os._exit(9)
"""
subprocess.run([sys.executable, "-c", KILLED, folder])
verdict(".lock", (folder / LOCK).exists(), "is still there")
try_it()

# %% [markdown]
# ## Take away
#
# - Write beside, bring the file to the disk, rename, bring the folder to the
#   disk.
# - A lock that is a mark on an open file ends with its process. A lock that is
#   only a file does not.
# - A reader that refuses says what the file is instead, and what to do about
#   it.
#
# ## Design note
#
# A database would give all of this and more: many files changed in one step,
# readers that never see the half of it. We keep plain files, because each of
# them is read by other programs: a log by a spreadsheet, weights by
# `transformers`, a figure by a browser. What must change together then goes
# into one file, and where that cannot be, the order of writing says which file
# is to be believed.
#
# ## Exercises
#
# **1** (★★). A program writes `model.bin` and then `model.sum`, the checksum
# of it, both with `replacing`. Which states can a kill leave? What is wrong
# with them, and what is the remedy?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# Old and old, new and new, or a new model with the sum of the old one: the last
# looks like damage. Write the sum into the file itself, as
# [chapter 4.2](02_checkpoints.ipynb) does.
# :::
#
# **2** (★★). A log grows by a line at a time. Write `append_line(path, line)`
# so that no kill costs a line that was whole, and half a line never stays among
# the others. Is `replacing` the way?
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# `replacing` would copy the file for each line. An append may leave half of its
# line and nothing else wrong; so the *next* writer cuts the file behind its last
# line break before it adds. It looks for that in the last 4,096 bytes, which
# bounds the length of a line.
# :::


# %% exercise 2, the function tags=["hide-cell"]
def append_line(path, line):
    with open(path, "a+b") as file:
        file.seek(max(0, file.tell() - 4096))
        tail = file.read()
        half = len(tail) - 1 - tail.rfind(b"\n")
        file.truncate(file.tell() - half)
        file.write(line + b"\n")


# %% exercise 2, checked
log = folder / "log"
log.write_bytes(b"one\ntwo\nthr")
for line in (b"three", b"four"):
    append_line(log, line)
lines = log.read_bytes().splitlines(keepends=True)
right = lines == [b"one\n", b"two\n", b"three\n", b"four\n"]
verdict("exercise 2", right, "whole lines")

# %% [markdown]
# ## Further reading
#
# - Pillai and others, "All File Systems Are Not Created Equal", OSDI 2014:
#   what a renaming promises after a crash, and what it does not.
# - The manual page of `flock(2)`: read what it says of forks and of NFS.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("4.1")
