# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       lock: "A lock on a folder, which ends with its process."
# ---

# %% [markdown]
# # Lock
#
# > For now.
#
# *Reading time: 1 minute.*

# %% imports of the lock tags=["export"] module="lock"
import os
import platform
import time
import warnings
import weakref
from contextlib import suppress
from functools import cache
from pathlib import Path


# %% locked or not tags=["exporti"] module="lock"
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
    with suppress(OSError):
        return os.path.samestat(os.fstat(place), os.stat(path))
    return False


# %% who has it tags=["export"] module="lock"
LOCK = ".lock"


def in_use(folder):
    """The words "is in use by ..." if another process has a folder, or ""."""
    own = LOCKS.get(os.path.realpath(folder))
    if own and own.release.alive:
        return ""
    try:
        place = _open(Path(folder, LOCK), create=False)
    except OSError:
        return ""
    try:
        _flock(place)
    except HELD:
        return _words(folder)
    except OSError:
        return ""
    finally:
        os.close(place)
    return ""


def _words(folder):
    text = ""
    with suppress(OSError), open(Path(folder, LOCK), "rb") as file:
        text = file.read(200).decode("utf-8", "replace")
    who = "".join(filter(str.isprintable, text)) or "another process"
    return f"is in use by {who}"


# %% take it and let it go tags=["exporti"] module="lock"
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
    with suppress(OSError):  # a full disk; the lock holds without the words
        os.ftruncate(place, 0)
        os.write(place, who.encode())
    return place


def _let_go(place, path, process):
    """Remove the file and its lock; in a forked child, only close it."""
    ours = process == os.getpid() and _same(place, path)
    if os.name == "nt":
        os.close(place)
    if ours:
        with suppress(OSError):
            os.unlink(path)
    if os.name != "nt":
        os.close(place)


# %% the lock of a folder tags=["export"] module="lock"
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


# %% no lock is inherited tags=["exporti"] module="lock"
LOCKS = weakref.WeakValueDictionary()  # folder: its Lock in this process


@cache
def _mind_forks():
    """Let go of the locks in forked children, which might live longer."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_let_go_of_all)


def _let_go_of_all():
    for lock in list(LOCKS.values()):
        lock.release()
