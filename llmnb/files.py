# Written by `make export` from notebooks/00_gpt2.py: edit that file.

"""See GPT-2 on one page.

The model as one diagram, its shapes, and where its parameters, its operations
and its bytes are.
"""

__all__ = [
    "replacing",
]


# imports for files
import contextlib
import os
from pathlib import Path


# write beside
@contextlib.contextmanager
def replacing(path):
    """Open a file beside `path` for writing bytes, then rename it to `path`.

    A reader sees the old file or the new one, never half of one. When
    anything goes wrong, such as a full disk, the new file is removed, the
    old one is as it was, and the error goes on.

    Derived in chapter 0.
    """
    path = Path(path)
    beside = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
