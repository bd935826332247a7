# Written by `make export` from notebooks/00_gpt2.py: edit that file.

"""See GPT-2 on one page.

The model as one diagram, its shapes, and where its parameters, its operations
and its bytes are.
"""

__all__ = [
    "BESIDE",
    "UNABLE",
    "make_folder",
    "replacing",
    "sync_folder",
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

    Derived in chapter 0.
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

    Derived in chapter 0.
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

    Derived in chapter 0.
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
