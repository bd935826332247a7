# Written by `make export` from notebooks/14_training.py: edit that file.

"""Train a GPT-2 and watch it learn.

Text becomes batches, batches become gradients, gradients become a model that
predicts better than counting can, along the curve PyTorch draws.
"""

__all__ = [
    "CHANGEABLE",
    "FORMAT",
    "GROUPS",
    "Run",
    "State",
    "add_to_log",
    "begin",
    "fingerprint",
    "finish",
    "follow",
    "newest_state",
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
import json
import os
import zlib
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llmnb.arena import put
from llmnb.config import GPT2Config, parameter_shapes
from llmnb.data import DataLoader
from llmnb.files import replacing
from llmnb.tensors import TensorFile, write_tensors
from llmnb.train import (
    Data,
    Progress,
    Step,
    TrainConfig,
    check_memory,
    config_from,
    loaders,
    log_row,
    new_model,
    prepare,
    read_run,
    save_run,
    train,
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
FORMAT = "llmnb training state 1"


def save_state(run):
    """Write the state of a run into its folder; return the path.

    The file appears whole or not at all. Then all but the newest
    `config.keep` are removed, and those from beyond the run's step.

    Derived in chapter 14.
    """
    memory, path = run.model.memory, state_path(run.folder, run.at.step)
    tensors = {
        f"{group}.{name}": np.asarray(x)  # a GPU's array comes to the host
        for group in GROUPS
        for name, x in memory[group].items()
    }
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
    note = {"format": FORMAT, "record": record, "sum": check}
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
        record = _record(file.metadata)
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


# checked in full
def _record(note):
    if note.get("format") != FORMAT:
        raise ValueError(f"its format must be {FORMAT!r}")
    if str(zlib.crc32(note["record"].encode())) != note["sum"]:
        raise ValueError("its record is damaged")
    return json.loads(note["record"])


# its parts
def _check_progress(at):
    whole = all(isinstance(x, int) for x in (at.step, at.updates))
    known = [x for x in (at.last_loss, at.best_loss) if x is not None]
    floats = all(isinstance(x, float) for x in at.losses + at.norms + known)
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
    check_memory(state.config, state.cfg)
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
    rows = _rows_before(path, step) if step else []
    if rows:
        with replacing(path) as file:
            file.write(b"".join([_HEAD, *rows]))
    else:
        Path(path).write_bytes(_HEAD)


def add_to_log(path, step):
    """Add the row of a `Step` to a log.

    Derived in chapter 14.
    """
    with open(path, "ab") as file:
        file.write(f"{log_row(step)}\n".encode())


# rows safe on the disk
def sync_log(path):
    """Have the system bring all rows of a log to the disk.

    Derived in chapter 14.
    """
    with open(path, "ab") as file:
        os.fsync(file.fileno())


# rows that stay
_HEAD = (",".join(Step._fields) + "\n").encode()


def _rows_before(path, step):
    """The whole rows of a log for steps before this one, as bytes."""
    if not Path(path).exists():
        return []
    rows = Path(path).read_bytes().splitlines(keepends=True)[1:]
    first = [row.partition(b",")[0] for row in rows]
    pairs = zip(first, rows, strict=True)
    return [row for x, row in pairs if x.isdigit() and int(x) < step]


# a log read back
def read_steps(path):
    """The rows of a log.csv as a list of `Step`.

    Raises OSError, or ValueError naming the file and the line.

    Derived in chapter 14.
    """
    text, steps = Path(path).read_bytes().decode("utf-8", "replace"), []
    for line, row in enumerate(text.splitlines()[1:], 2):
        first, *rest = row.split(",")
        try:
            values = (float(x) if x else None for x in rest)
            steps.append(Step(int(first), *values))
        except (ValueError, TypeError):
            raise ValueError(
                f"{path}, line {line}: not a row of a log"
            ) from None
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
    steps = train(config, run.model, run.batches, run.validation, at)
    with telling(run):
        start_log(log, at.step)
        for step in steps:
            add_to_log(log, step)
            due = config.save_every and at.step % config.save_every == 0
            if step.loss is not None and (due or at.step == config.steps):
                sync_log(log)
                save_state(run)
            yield step


# the end of a run
def finish(run):
    """Write the files of `save_run`, at any step; returns the log's steps.

    Raises as `follow` does.

    Derived in chapter 14.
    """
    with telling(run):
        steps = read_steps(run.folder / "log.csv")
        save_run(run.folder, run.config, run.model, run.data, steps)
    return steps


# what is left when it fails
@contextmanager
def telling(run):
    """Make an OSError within say which checkpoint is the last good one.

    Derived in chapter 14.
    """
    try:
        yield
    except OSError as error:
        what = error.strerror or str(error)
        now = state_path(run.folder, run.at.step)
        kept = [x for x in states(run.folder) if x <= now]
        left = (
            f"the last checkpoint is {kept[-1].name}"
            if kept
            else ("there is no checkpoint yet")
        )
        raise OSError(f"{error.filename or run.folder}: {what}; {left}") from (
            error
        )
