"""Files that appear whole or not at all."""

import errno
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from llmnb import files
from llmnb.files import make_folder, replacing


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path, before = tmp_path / "a", b"the old text"
    path.write_bytes(before)
    with (
        pytest.raises(OSError, match="No space left") as caught,
        replacing(path) as file,
    ):
        file.write(b"half")
        raise OSError(28, "No space left on device")
    assert caught.value.filename == str(path), "a full disk names no file"
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["a"]


def test_what_may_not_be_written_is_named(tmp_path, monkeypatch):
    """On a read-only file system even removing nothing is an error."""

    def unlink(self, missing_ok=False):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr("pathlib.Path.unlink", unlink)
    path = tmp_path / "none" / "a"
    with pytest.raises(FileNotFoundError) as caught, replacing(path):
        pass
    assert caught.value.filename == str(path)


def test_threads_may_write_to_one_path_at_once(tmp_path):
    path, together = tmp_path / "a", threading.Barrier(3, timeout=20)

    def write(letter):
        with replacing(path) as file:
            file.write(letter * 1000)
            together.wait()
            file.write(letter * 1000)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write, [b"x", b"y", b"z"]))
    assert path.read_bytes() in [c * 2000 for c in (b"x", b"y", b"z")]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_link_beside_the_path_is_not_followed(tmp_path, monkeypatch):
    """Not where its name was guessed, and not by a name that is used once."""
    kept = tmp_path / "kept"
    kept.write_bytes(b"mine")
    (tmp_path / f"a.{os.getpid()}.new").symlink_to(kept)
    with replacing(tmp_path / "a") as file:
        file.write(b"new")
    assert kept.read_bytes() == b"mine"
    monkeypatch.setattr("llmnb.files.os.urandom", bytes)
    (tmp_path / f"a.{'0' * 16}.new").symlink_to(kept)
    with pytest.raises(FileExistsError), replacing(tmp_path / "a") as file:
        file.write(b"newer")
    assert kept.read_bytes() == b"mine"
    assert (tmp_path / "a").read_bytes() == b"new"


@pytest.mark.skipif(os.name == "nt", reason="no umask")
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_a_file_has_the_mode_that_open_would_give(tmp_path, umask):
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "a") as file:
            file.write(b"x")
        (tmp_path / "b").write_bytes(b"x")
    finally:
        os.umask(before)
    modes = {p.stat().st_mode for p in tmp_path.iterdir()}
    assert len(modes) == 1 and modes.pop() & 0o777 == 0o666 & ~umask


@pytest.mark.skipif(os.name == "nt", reason="folders cannot be synced")
def test_the_folder_is_synced_after_the_renaming(tmp_path, calls):
    with replacing(tmp_path / "a") as file:
        file.write(b"x")
    calls = [x for x in calls if x[0] != "unlink"]
    assert calls == [("sync", "file"), ("replace", "a"), ("sync", "folder")]


@pytest.mark.skipif(os.name == "nt", reason="folders cannot be synced")
def test_new_folders_are_synced_too(tmp_path, calls):
    make_folder(tmp_path / "a" / "b" / "c")
    assert calls == [("sync", "folder")] * 3
    make_folder(tmp_path / "a" / "b" / "c")
    assert len(calls) == 3
    (tmp_path / "file").write_bytes(b"")
    for path in ("file", "file/a"):
        with pytest.raises(FileExistsError):
            make_folder(tmp_path / path)


@pytest.mark.skipif(os.name == "nt", reason="folders cannot be synced")
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_folders(tmp_path, monkeypatch, number):
    def fail(place):
        if stat.S_ISDIR(os.fstat(place).st_mode):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr("llmnb.files.os.fsync", fail)
    with replacing(tmp_path / "a") as file:
        file.write(b"x")
    number = errno.EIO
    with pytest.raises(OSError), replacing(tmp_path / "b") as file:
        file.write(b"x")


@pytest.mark.skipif(os.name == "nt", reason="no such pipes")
def test_a_pipe_or_a_folder_is_not_replaced(tmp_path):
    """A device neither, such as /dev/null, which root may replace."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(FileExistsError, match=f"{name}: must be a reg"):
            files.write_whole(tmp_path / name, b"x")
    assert (tmp_path / "pipe").is_fifo()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_drive_that_is_not_there(tmp_path, monkeypatch):
    """The folder above it is itself."""
    monkeypatch.setattr("pathlib.Path.is_dir", lambda self: False)
    with pytest.raises(OSError):
        make_folder(tmp_path.anchor)


def test_an_error_names_the_file_and_not_the_one_beside_it(tmp_path):
    wanted = tmp_path / "none" / "a.txt"
    with pytest.raises(FileNotFoundError) as error:
        files.write_whole(wanted, b"x")
    assert error.value.filename == str(wanted)


def test_a_folder_is_one_programs(tmp_path):
    folder = tmp_path / "a" / "b"
    assert files.own_folder(folder) == folder and folder.is_dir()
    assert files.own_folder(folder) == folder, "an empty folder may be used"
    (folder / f"log.{'0' * 16}.new").write_text("what a kill left")
    assert files.own_folder(folder) == folder
    for name in ("thesis.new", "x"):
        (folder / name).write_text("x")
        with pytest.raises(FileExistsError, match="exists and is not empty"):
            files.own_folder(folder)
        if name != "x":
            (folder / name).unlink()
    assert files.own_folder(folder, force=True) == folder
    assert (folder / "x").exists()
    with pytest.raises(FileExistsError, match="is a file"):
        files.own_folder(folder / "x", force=True)


@pytest.mark.parametrize("there", [False, True])
def test_no_empty_folder_is_left_that_was_made(tmp_path, there):
    old, new = tmp_path / "old", tmp_path / "old" / "a" / "b"
    old.mkdir()
    if there:
        new.mkdir(parents=True)
    with pytest.raises(ValueError, match="refused"), files.unmade(new):
        files.own_folder(new)
        raise ValueError("refused")
    assert old.is_dir() and new.parent.exists() == there
    with pytest.raises(ValueError, match="late"), files.unmade(new):
        files.own_folder(new)
        (new / "x").write_text("kept")
        raise ValueError("late")
    assert (new / "x").read_text() == "kept"
    with files.unmade(tmp_path / "c"):
        files.own_folder(tmp_path / "c")
    assert (tmp_path / "c").is_dir()
