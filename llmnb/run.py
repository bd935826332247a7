# Written by `make export` from notebooks/14_training.py: edit that file.

"""Train a GPT-2 and watch it learn.

Text becomes batches, batches become gradients, gradients become a model that
predicts better than counting can, along the curve PyTorch draws.
"""

__all__ = [
    "CHANGEABLE",
    "GROUPS",
    "ROW",
    "Run",
    "State",
    "add_to_log",
    "begin",
    "fingerprint",
    "finish",
    "follow",
    "newest_state",
    "read_rows",
    "read_state",
    "read_steps",
    "restore",
    "resume",
    "save_state",
    "start_log",
    "state_path",
    "states",
    "sync_log",
    "telling",
]


# imports of the run
import errno
import json
import math
import os
import shlex
import warnings
import zlib
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llmnb.arena import put
from llmnb.checkpoint import STATE, first_not_finite, state_record
from llmnb.config import GPT2Config, parameter_shapes
from llmnb.data import DataLoader
from llmnb.tensors import TensorFile, write_tensors
from llmnb.train import (
    SHAPE,
    Data,
    Progress,
    Step,
    TrainConfig,
    config_from,
    landmarks,
    loaders,
    log_row,
    new_model,
    prepare,
    read_run,
    save_figure,
    sparing,
    train,
    write_log,
    write_record,
)


# a run
class Run(NamedTuple):
    """A run in progress: all that `follow` works with.

    folder: a Path. model: a GPT2. batches, validation: DataLoaders. at: the
    Progress. text: a fingerprint of the text, see `fingerprint`.

    Derived in chapter 14.
    """

    folder: Path
    config: TrainConfig
    data: Data
    model: object
    batches: DataLoader
    validation: DataLoader
    at: Progress
    text: list


# what text it is
def fingerprint(*batches):
    """What tells one text from another, for JSON.

    For each DataLoader, which is set back to its start: the number of its
    batches and a checksum of the first. Cheap for any number of shards; a
    change that leaves both as they are goes unseen.

    Derived in chapter 14.
    """
    found = []
    for loader in batches:
        loader.reset()
        first = zlib.crc32(b"".join(x.tobytes() for x in loader.next_batch()))
        loader.reset()
        found.append([loader.batches_per_epoch, first])
    return found


# save the state
GROUPS = "params", "m", "v"


def save_state(run):
    """Write the state of a run into its folder; return the path.

    The file appears whole or not at all. Then all but the newest
    `config.keep` are removed, and those from beyond the run's step. Raises
    FloatingPointError, and keeps what there is, when an array is not finite.

    Derived in chapter 14.
    """
    memory, path = run.model.memory, state_path(run.folder, run.at.step)
    tensors = {
        f"{group}.{name}": np.asarray(x)  # a GPU's array comes to the host
        for group in GROUPS
        for name, x in memory[group].items()
    }
    wrong = first_not_finite(tensors)
    if wrong:
        raise FloatingPointError(
            f"after the update at step {run.at.step - 1}, {wrong}: try a "
            "lower learning rate or a longer warm-up"
        )
    record = {
        "config": asdict(run.config),
        "model": asdict(run.model.cfg),
        "progress": asdict(run.at),
        "place": run.batches.state,
        "text": run.text,
        "sums": {name: zlib.crc32(x) for name, x in tensors.items()},
    }
    record = json.dumps(record)
    check = str(zlib.crc32(record.encode()))
    note = {"format": STATE, "record": record, "sum": check}
    write_tensors(path, tensors, note)
    found = states(run.folder)
    last = found.index(path) + 1
    for old in found[: max(0, last - run.config.keep)] + found[last:]:
        old.unlink()
    return path


# the files of the states
def state_path(folder, step):
    """Where the state after so many steps is kept.

    Derived in chapter 14.
    """
    return Path(folder) / f"state_{step:08d}.safetensors"


def states(folder):
    """The paths of the states in a run's folder, the oldest first.

    Derived in chapter 14.
    """
    return sorted(Path(folder).glob("state_*.safetensors"))


# a state read back
class State(NamedTuple):
    """What a file of `save_state` holds, but for the arrays.

    cfg: the model's GPT2Config. place: of the DataLoader. text: as
    `fingerprint` gives it.

    Derived in chapter 14.
    """

    path: Path
    config: TrainConfig
    cfg: GPT2Config
    at: Progress
    place: dict
    text: list


# read and check
def read_state(path):
    """Read and check a state; returns a `State`, whose arrays are not kept.

    Raises OSError when it cannot be read, and ValueError, naming the file
    and the defect, when it is not whole: names, shapes, types and checksums
    of all arrays are checked.

    Derived in chapter 14.
    """
    file = TensorFile(path)
    try:
        record = state_record(file)
        state = State(
            Path(path),
            config_from(record["config"]),
            GPT2Config(**record["model"]),
            Progress(**record["progress"]),
            record["place"],
            record["text"],
        )
        _check_progress(state.at)
        _check_arrays(file, state, record["sums"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a whole state: {error}") from None
    return state


# its parts
def _check_progress(at):
    whole = all(isinstance(x, int) for x in (at.step, at.updates))
    known = [x for x in (at.last_loss, at.best_loss) if x is not None]
    numbers = at.losses + at.norms + known
    floats = all(isinstance(x, float) and math.isfinite(x) for x in numbers)
    if not (whole and floats and 0 <= at.updates <= at.step):
        raise ValueError(f"its progress makes no sense: {at}")


def _check_arrays(file, state, sums):
    kind = "F64" if state.config.precision == "fp64" else "F32"
    shapes = parameter_shapes(state.cfg)
    want = {f"{g}.{n}": (kind, s) for g in GROUPS for n, s in shapes.items()}
    got = {name: (file.dtype(name), file.shape(name)) for name in file.names}
    for name in want | got:
        if got.get(name) != want.get(name):
            raise ValueError(
                f"{name} must be {want.get(name)}, got {got.get(name)}"
            )
        if zlib.crc32(file[name]) != sums[name]:
            raise ValueError(f"{name} is damaged")


# the model of a state
def restore(state):
    """The GPT2 of a `State`: its weights and AdamW's averages.

    Derived in chapter 14.
    """
    from llmnb.gpt2 import GPT2

    names = "batch_size", "seq_len", "backend", "precision"
    how = {name: getattr(state.config, name) for name in names}
    model, file = GPT2(state.cfg, **how, seed=None), TensorFile(state.path)
    for group in GROUPS:
        for name, x in model.memory[group].items():
            put(x, file[f"{group}.{name}"])
    return model


# the newest state that is whole
def newest_state(folder):
    """The newest whole state in a folder, and what is wrong with newer ones.

    Returns (a `State` or None when there is none, a list of sentences).
    Raises ValueError when there are states and none of them is whole.

    Derived in chapter 14.
    """
    wrong = []
    for path in reversed(states(folder)):
        try:
            return read_state(path), wrong
        except (OSError, ValueError) as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError(f"{folder} has no state to go on from: {wrong[0]}")
    return None, wrong


# the log of a run
def start_log(path, step=0):
    """Begin a log.csv, or keep of an old one the rows before a step.

    Derived in chapter 14.
    """
    old = read_steps(path) if step and Path(path).exists() else []
    rows = [row for row in old if row.step < step]
    if rows:
        write_log(path, rows)
    else:
        Path(path).write_bytes((",".join(Step._fields) + "\n").encode())


def add_to_log(path, *steps):
    """Add the row of each `Step` to a log.

    Derived in chapter 14.
    """
    rows = "".join(f"{log_row(step)}\n" for step in steps)
    with open(path, "ab") as file:
        file.write(rows.encode())


# rows that wait
def _log(path, rows):
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

    Derived in chapter 14.
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

    Derived in chapter 14.
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

    Derived in chapter 14.
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


# begin a run
def begin(folder, config):
    """Make ready a new run in an existing folder; returns a `Run`.

    Writes config.json and the tokenizer, and removes the states of an older
    run there. Raises ValueError, OSError, RuntimeError or MemoryError.

    Derived in chapter 14.
    """
    data = prepare(config)
    feeds = loaders(config, data)
    model = new_model(config, data.encoding.n_vocab)
    for old in states(folder):
        old.unlink()
    write_record(folder, config, data)
    text = fingerprint(*feeds)
    return Run(Path(folder), config, data, model, *feeds, Progress(), text)


# what may change
CHANGEABLE = (
    "steps", "eval_every", "eval_batches", "save_every", "keep",
    "sample_every",
)  # fmt: skip


# go on with a run
def resume(folder, **changes):
    """Take up the run in a folder; returns a `Run` and a list of warnings.

    changes: fields of the TrainConfig, of which only those in `CHANGEABLE`
    may differ from the run's. The warnings say which newer states are
    damaged. Nothing is written before all is checked. Raises OSError or
    ValueError when the folder holds no run, no state of it is whole, or the
    text is not the one it began with.

    Derived in chapter 14.
    """
    folder = Path(folder)
    config = _changed(folder, changes)
    state, warnings = newest_state(folder)
    if state:
        _check_run(state, config)
        state = state._replace(config=config)
    own = str(folder / "tokenizer.tiktoken")
    data = prepare(replace(config, tokenizer=own))
    feeds = loaders(config, data)
    text = fingerprint(*feeds)
    if not state:
        model, at = new_model(config, data.encoding.n_vocab), Progress()
    elif state.text != text:
        raise ValueError(f"{folder}: the text is not the one it began with")
    else:
        feeds[0].state = state.place
        model, at = restore(state), state.at
    for part in folder.glob("*.[0-9]*.new"):
        part.unlink()
    write_record(folder, config, data)
    return Run(folder, config, data, model, *feeds, at, text), warnings


# change it
def _changed(folder, changes):
    """The run's configuration with changes, if they are possible."""
    config = read_run(folder)
    for name, value in changes.items():
        was = getattr(config, name)
        if value != was and name not in CHANGEABLE:
            raise ValueError(
                f"{name} of a run in progress cannot change: {folder} has "
                f"{was}, got {value}"
            )
    return replace(config, **changes)


def _check_run(state, config):
    """Raise unless the state is this run's, and not beyond its end."""
    names = {name: getattr(config, name) for name in CHANGEABLE}
    if replace(state.config, **names) != config:
        raise ValueError(f"{state.path} is of a run with other options")
    if state.at.step > config.steps:
        raise ValueError(
            f"steps must be at least {state.at.step}, which are done, "
            f"got {config.steps}"
        )


# train and keep
def follow(run):
    """Train a `Run` to its end; yield each `Step`, its row in the log.

    Writes the state every `config.save_every` steps and after the last.
    Raises OSError, in one sentence that says which checkpoint is the last
    good one, when something cannot be written; and as `train` does.

    Derived in chapter 14.
    """
    config, at, log = run.config, run.at, run.folder / "log.csv"
    steps, rows = train(config, run.model, run.batches, run.validation, at), []
    with telling(run):
        start_log(log, at.step)
        for step in steps:
            rows = _log(log, [*rows, step])
            due = config.save_every and at.step % config.save_every == 0
            if step.loss is not None and (due or at.step == config.steps):
                if not rows:
                    sync_log(log)
                save_state(run)
            yield step


# the end of a run
def finish(run):
    """Write model.bin, then loss.png, at any step; returns the log's steps.

    A log without the lines that do not count takes the old one's place. When
    a log or a figure fails, that is a warning; a model raises as `follow`
    does.

    Derived in chapter 14.
    """
    log, figure, steps = run.folder / "log.csv", run.folder / "loss.png", []
    with telling(run):
        run.model.save_checkpoint(run.folder / "model.bin")
    with sparing(log):
        steps = read_steps(log)
        write_log(log, steps)
    with sparing(figure):
        save_figure(figure, steps, landmarks(run.config, run.data))
    return steps


# what is left when it fails
@contextmanager
def telling(run):
    """Make an error within say what is left, and what to do.

    An OSError names the last good checkpoint; a FloatingPointError a command
    that starts from it, at half the learning rate.

    Derived in chapter 14.
    """
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(f"{error}: {_gentler(run)}") from error
    except OSError as error:
        what, kept = error.strerror or str(error), _kept(run)
        left = (
            f"the last checkpoint is {kept[-1].name}"
            if kept
            else ("there is no checkpoint yet")
        )
        raise OSError(f"{error.filename or run.folder}: {what}; {left}") from (
            error
        )


def _kept(run):
    """The states of a run up to where it stands."""
    now = state_path(run.folder, run.at.step)
    return [x for x in states(run.folder) if x <= now]


# the same at half the rate
def _gentler(run):
    """The command of a run, from its last state on, at half the rate."""
    config, now = run.config, state_path(run.folder, run.at.step)
    # a state of this very step has the weights that gave no number
    kept = [x for x in _kept(run) if x != now]
    asked = {"learning_rate": float(f"{config.learning_rate / 2:.3g}")}
    for each in fields(config):
        value = getattr(config, each.name)
        if value != each.default:
            asked.setdefault(each.name, value)
    for name in SHAPE if config.depth or kept else ():
        asked.pop(name, None)  # the depth or the state says them
    if kept:
        for name in ("init", "depth", "tokenizer", "vocab_size"):
            asked.pop(name, None)
        asked = {"init": kept[-1]} | asked
    words = ["llmnb", "train"]
    for name, value in asked.items():
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words += map(str, value if type(value) is tuple else [value])
    return shlex.join(words)
