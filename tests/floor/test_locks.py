"""One folder, one owner: locks that end with their owner, however it ends."""

import errno
import os
import sys
import time
from types import SimpleNamespace

import pytest
from processes import held, python

from llmnb import files
from llmnb.files import LOCK, Lock, in_use


def test_a_folder_of_another_process_is_refused(tmp_path):
    with held(tmp_path) as process:
        who = rf"is in use by process {process.pid} on \S+ since 20\d\d-"
        with pytest.raises(BlockingIOError, match=who) as error:
            Lock(tmp_path)
        assert "\n" not in str(error.value) and in_use(tmp_path)
    assert in_use(tmp_path) == "" and not (tmp_path / LOCK).exists()


def test_a_dead_process_locks_nobody_out(tmp_path):
    with held(tmp_path) as process:
        process.kill()
    assert (tmp_path / LOCK).exists() and in_use(tmp_path) == ""
    with Lock(tmp_path):
        text = (tmp_path / LOCK).read_text()
        assert f"process {os.getpid()} on" in text
    assert not (tmp_path / LOCK).exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_holds_no_lock(tmp_path):
    child = "import os, time\nif os.fork() == 0: time.sleep(9)"
    with held(tmp_path, child) as process:
        time.sleep(0.3)
        assert in_use(tmp_path)
        process.kill()
        process.wait()
        Lock(tmp_path).release()
        process.stdout.close()
        process.stdout = None  # the child has the other end
    assert not (tmp_path / LOCK).exists()


def test_the_newer_lock_of_a_process_has_the_folder(tmp_path):
    older, newer = Lock(tmp_path), Lock(tmp_path)
    with pytest.raises(BlockingIOError, match="taken up anew, by this pr"):
        older.check()
    newer.check()
    del newer
    assert not (tmp_path / LOCK).exists(), "it ends with its owner"


def test_a_lock_whose_file_was_removed(tmp_path):
    """It is taken again, unless another process was faster."""
    lock = Lock(tmp_path)
    (tmp_path / LOCK).unlink()
    lock.check(hold=True)
    assert f"process {os.getpid()} on" in (tmp_path / LOCK).read_text()
    (tmp_path / LOCK).unlink()
    with held(tmp_path) as process:
        with pytest.raises(BlockingIOError, match=f"process {process.pid} on"):
            lock.check(hold=True)
        assert [x.name for x in tmp_path.iterdir()] == [LOCK]


def test_a_lock_that_is_just_being_taken_away(tmp_path, monkeypatch):
    """Between opening and locking, the last owner removes the file."""
    calls = []

    def late(place, then=files._flock):
        if not calls:
            os.unlink(tmp_path / LOCK)
        calls.append(place)
        then(place)

    monkeypatch.setattr(files, "_flock", late)
    kept = Lock(tmp_path)
    monkeypatch.undo()
    assert len(calls) == 2 and kept.release.alive
    code = "import sys; from llmnb.files import Lock; Lock(sys.argv[1])"
    assert (
        f"is in use by process {os.getpid()}" in python(code, tmp_path).stderr
    )


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks(tmp_path, monkeypatch, number):
    def fail(place):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("llmnb.files._flock", fail)
    with pytest.warns(UserWarning, match="no locks on this file system"):
        lock = Lock(tmp_path)
    lock.check(hold=True)
    lock.release()
    assert not (tmp_path / LOCK).exists()


class Windows:
    """The module os as it is there, but for what it does."""

    name = "nt"

    def __getattr__(self, name):
        return getattr(os, name)

    def open(self, path, *how):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return os.open(path, *how)

    def unlink(self, path):
        assert not locked, "a file in use cannot be removed"
        os.unlink(path)

    def close(self, place):
        locked.discard(place)
        os.close(place)


locked = set()


def locking(place, mode, count):
    """msvcrt's: of so many bytes, from the place that was gone to."""
    import fcntl

    assert (mode, count) == ("at once", 1)
    assert os.lseek(place, 0, os.SEEK_CUR) > 1 << 20, "the text is locked"
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PermissionError(errno.EACCES, "Permission denied") from None
    locked.add(place)


@pytest.mark.skipif(os.name == "nt", reason="has the real one")
def test_the_calls_of_windows(tmp_path, monkeypatch):
    """On a stand-in: what is called, in which order, for which answers."""
    msvcrt = SimpleNamespace(LK_NBLCK="at once", locking=locking)
    monkeypatch.setitem(sys.modules, "msvcrt", msvcrt)
    monkeypatch.setattr(files, "os", Windows())
    with held(tmp_path) as process:
        who = rf"is in use by process {process.pid} on \S+ since 20\d\d-"
        with pytest.raises(BlockingIOError, match=who):
            Lock(tmp_path)
    with Lock(tmp_path):
        text = (tmp_path / LOCK).read_text()
        assert text.startswith(f"process {os.getpid()} on") and locked
    assert not locked and not (tmp_path / LOCK).exists()
    files.make_folder(tmp_path / "new")
    files.write_whole(tmp_path / "new" / "a", b"1")
    assert (tmp_path / "new" / "a").read_bytes() == b"1"


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="links are followed")
def test_a_link_in_place_of_the_lock(tmp_path):
    kept = tmp_path / "kept"
    kept.write_bytes(b"mine")
    (tmp_path / LOCK).symlink_to(kept)
    with pytest.raises(OSError):
        Lock(tmp_path)
    assert kept.read_bytes() == b"mine"
