# Written by `make export` from notebooks/4_practice/16_resume.py: edit that file.

"""The log of a run: a row a step, safe on the disk, read back."""

__all__ = [
    "ROW",
    "add_to_log",
    "read_rows",
    "read_steps",
    "start_log",
    "sync_log",
]


# imports of log
import errno
import math
import os
import warnings
from itertools import chain
from pathlib import Path

from llmnb.train.folder import log_row, write_log
from llmnb.train.loop import Step


# the log of a run
def start_log(path, step=0):
    """Begin a log.csv, or keep of an old one the rows before a step.

    Derived in chapter 4.16.
    """
    old = read_steps(path) if step and Path(path).exists() else []
    rows = [row for row in old if row.step < step]
    if rows:
        write_log(path, rows)
    else:
        Path(path).write_bytes((",".join(Step._fields) + "\n").encode())


def add_to_log(path, *steps):
    """Add the row of each `Step` to a log.

    Derived in chapter 4.16.
    """
    rows = "".join(f"{log_row(step)}\n" for step in steps)
    with open(path, "ab") as file:
        file.write(rows.encode())


# rows that wait
def log_steps(path, rows):
    """Add rows to a log; returns those that must wait for it."""
    try:
        add_to_log(path, *rows)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise  # the next state would have no room either
        if len(rows) == 1:
            why = error.strerror or error
            warnings.warn(
                f"{path}: {why}; rows wait until it can be written",
                stacklevel=3,
            )
        return rows
    return []


# rows safe on the disk
def sync_log(path):
    """Have the system bring all rows of a log to the disk.

    Derived in chapter 4.16.
    """
    with open(path, "ab") as file:
        os.fsync(file.fileno())


# a log read back
ROW = 1000  # characters that a row has at most


def read_rows(path, columns=None):
    """The columns of a log.csv, and an iterator over its lines.

    columns: their names in a log that does not begin with them; None: it
    must. The iterator yields a line's number, its row, a dict from name to
    number or None, and None; or, for a line that is no row, None and what is
    wrong with it. A last line without an end is left out. Raises OSError, or
    ValueError naming the file.

    Derived in chapter 4.16.
    """
    lines, start = _lines(path), 2
    head = next(lines, "")
    names = head.split(",")
    if names[0] == "step" and len({*names}) == len(names):
        columns = names
    elif columns is None:
        raise ValueError(
            f"{path}: the first line must name the columns, step first"
        )
    elif head:
        lines, start = chain([head], lines), 1
    return columns, _rows(columns, enumerate(lines, start))


# line by line
def _lines(path):
    """The lines of a text that have an end, without it."""
    how = {"encoding": "utf-8-sig", "errors": "replace", "newline": "\n"}
    with open(path, **how) as file:
        for line in file:
            if line.endswith("\n"):
                yield line.rstrip("\r\n")


def _rows(names, lines):
    for number, line in lines:
        try:
            yield number, _row(names, line), None
        except ValueError as error:
            yield number, None, str(error)


# one row
def _row(names, line):
    """A line as a dict from name to number, or ValueError."""
    if len(line) > ROW:
        raise ValueError(
            f"must have at most {ROW:,} characters, has {len(line):,}"
        )
    words = line.split(",")
    if len(words) != len(names):
        raise ValueError(f"must have {len(names)} values, has {len(words)}")
    if not words[0]:
        raise ValueError("has no step")
    try:
        row = [float(x) if x else None for x in words]
    except ValueError:
        row = [math.nan]
    if not all(x is None or math.isfinite(x) for x in row):
        raise ValueError(f"must hold numbers, not {line[:80]!r}")
    if not row[0].is_integer():
        raise ValueError(f"must begin with a whole number, not {words[0]}")
    return dict(zip(names, row, strict=True))


# the steps of a log
def read_steps(path):
    """The rows of a log.csv as a list of `Step`.

    A line that is none is left out, and a warning says which. Raises
    OSError.

    Derived in chapter 4.16.
    """
    steps, left_out = [], []
    _, *names = Step._fields
    for line, row, wrong in read_rows(path, Step._fields)[1]:
        if wrong:
            left_out.append(f"line {line} ({wrong})")
        else:
            steps.append(Step(int(row["step"]), *map(row.get, names)))
    if left_out:
        said, more = ", ".join(left_out[:3]), len(left_out) - 3
        said += f", and {more} more" if more > 0 else ""
        warnings.warn(f"{path}: left out {said}", stacklevel=2)
    return steps
