# Written by `make export` from notebooks/4_practice/16_resume.py: edit that file.

"""The log of a run: a row a step, safe on the disk, read back."""

__all__ = ["read_rows", "read_steps", "start_log", "sync_log"]


# imports of log
import errno
import math
import os
import warnings
from pathlib import Path

from llmnb.train.folder import log_row, write_log
from llmnb.train.loop import Step


# the log of a run
def start_log(path, step=0):
    """Begin a log.csv, or keep of an old one the rows before a step.

    Derived in chapter 4.16.
    """
    old = read_steps(path) if step and Path(path).exists() else []
    write_log(path, [row for row in old if row.step < step])


# rows that wait
def log_steps(path, steps):
    """Add the row of each `Step` to a log; returns those that must wait."""
    try:
        with open(path, "ab") as file:
            file.writelines(f"{log_row(x)}\n".encode() for x in steps)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise  # the next state would have no room either
        if len(steps) == 1:
            why = error.strerror or error
            warnings.warn(
                f"{path}: {why}; rows wait until it can be written",
                stacklevel=3,
            )
        return steps
    return []


# rows safe on the disk
def sync_log(path):
    """Have the system bring all rows of a log to the disk.

    Derived in chapter 4.16.
    """
    with open(path, "ab") as file:
        os.fsync(file.fileno())


# a log read back
_LONGEST = 1000  # characters that a row has at most


def read_rows(path, columns=None):
    """A log.csv: its columns, its rows, and the lines that are none.

    columns: their names in a log that does not begin with them; None: it
    must. A row is a dict from name to number or None; of a line that is none
    there are its number and what is wrong with it. A last line without an
    end is left out. Raises OSError, or ValueError naming the file.

    Derived in chapter 4.16.
    """
    how = {"encoding": "utf-8-sig", "errors": "replace", "newline": "\n"}
    with open(path, **how) as file:
        lines = [x.rstrip("\r\n") for x in file if x[-1:] == "\n"]
    head = lines[0].split(",") if lines else []
    named = head[:1] == ["step"] and len({*head}) == len(head)
    if not (named or columns):
        raise ValueError(
            f"{path}: the first line must name the columns, step first"
        )
    columns, rows, wrong = head if named else columns, [], []
    for number, line in enumerate(lines[named:], 1 + named):
        try:
            rows.append(_row(columns, line))
        except ValueError as error:
            wrong.append((number, str(error)))
    return columns, rows, wrong


# one row
def _row(names, line):
    """A line as a dict from name to number, or ValueError."""
    if len(line) > _LONGEST:
        most = f"{_LONGEST:,} characters"
        raise ValueError(f"must have at most {most}, has {len(line):,}")
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
    _, rows, wrong = read_rows(path, Step._fields)
    if wrong:
        said = ", ".join(f"line {line} ({why})" for line, why in wrong[:3])
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        warnings.warn(f"{path}: left out {said}{more}", stacklevel=2)
    return [Step(int(x["step"]), *map(x.get, Step._fields[1:])) for x in rows]
