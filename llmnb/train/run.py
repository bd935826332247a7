# Written by `make export` from notebooks/1_by_hand/16_training.py: edit that file.

"""Runs that survive: their folders, their states, their resumption."""

__all__ = [
    "CHANGEABLE",
    "GROUPS",
    "ROW",
    "Run",
    "SETTINGS",
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
    "surroundings",
    "sync_log",
    "telling",
]


# imports of the run
import errno
import json
import math
import os
import platform
import re
import shlex
import warnings
import zlib
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields, replace
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llmnb.arena import put
from llmnb.formats.checkpoint import STATE, first_not_finite, state_record
from llmnb.config import GPT2Config
from llmnb.model.tensors import parameter_shapes
from llmnb.formats.llmc import HEADER_BYTES
from llmnb.formats.shard import shard_length
from llmnb.text.data import DataLoader
from llmnb.files import BESIDE, replacing
from llmnb.files import Lock
from llmnb.formats.safetensors import TensorFile, write_tensors
from llmnb.train.train import (
    SHAPE,
    Data,
    Progress,
    Step,
    TrainConfig,
    check_memory,
    config_from,
    landmarks,
    loaders,
    log_row,
    new_model,
    note_model,
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
    Progress. text: a fingerprint of the text, see `fingerprint`. begun: the
    `surroundings` at its beginning. kept: the steps of the states to go on
    from, the oldest first. lock: the folder's, see `Lock`.

    Derived in chapter 1.16.
    """

    folder: Path
    config: TrainConfig
    data: Data
    model: object
    batches: DataLoader
    validation: DataLoader
    at: Progress
    text: list
    begun: dict
    kept: list
    lock: Lock


# what text it is
def fingerprint(*batches):
    """What tells one text from another, for JSON.

    For each DataLoader: the number of its batches, and a sha256 of all
    tokens of all its shards. One shard is open at a time.

    Derived in chapter 1.16.
    """
    return [[x.batches_per_epoch, _digest(x.shards)] for x in batches]


def _digest(shards):
    """A sha256 of tokens, each as two bytes, and of where shards end."""
    digest = sha256()
    for shard in shards:
        path = isinstance(shard, (str, os.PathLike))
        length = shard_length(shard) if path else len(shard)
        digest.update(length.to_bytes(8, "little"))
        for part in _parts_of_file(shard) if path else _parts(shard):
            digest.update(part)
    return digest.hexdigest()


def _parts(tokens, size=1 << 20):
    for at in range(0, len(tokens), size):
        yield np.ascontiguousarray(tokens[at : at + size], "<u2")


def _parts_of_file(path, size=1 << 21):
    """Its tokens as bytes; read, for to map a file is to die if it is cut."""
    with open(path, "rb") as file:
        file.seek(HEADER_BYTES)
        while part := file.read(size):
            yield part


def _first_batches(batches):
    """What stood for `fingerprint` once: it saw the first batch alone."""
    found = []
    for loader in batches:
        loader.reset()
        first = zlib.crc32(b"".join(x.tobytes() for x in loader.next_batch()))
        loader.reset()
        found.append([loader.batches_per_epoch, first])
    return found


# what else decides the bits
SETTINGS = (
    "LLMNB_BF16", "LLMNB_CUDA", "LLMNB_MATMUL", "LLMNB_TILE",
    "NUMBA_BOUNDSCHECK", "NUMBA_CPU_FEATURES", "NUMBA_CPU_NAME",
    "NUMBA_DISABLE_JIT", "NUMBA_LOOP_VECTORIZE", "NUMBA_OPT",
    "NUMBA_SLP_VECTORIZE",
)  # fmt: skip


def surroundings(backend="cpu"):
    """What the bits of a run depend on besides its options and its text.

    A dict of str to str: versions, the processor and its features, the GPU
    if that is the backend, and the variables in `SETTINGS` that are set.

    Derived in chapter 1.16.
    """
    from llmnb.cpu.tile import cpu_features

    names = "llmnb", "numpy", "numba", "llvmlite"
    found = {name: version(name) for name in names}
    found["Python"] = ".".join(platform.python_version_tuple()[:2])
    found["processor"] = f"{platform.system()} {platform.machine()}"
    found["features"] = " ".join(sorted(cpu_features()))
    if backend == "cuda":
        from llmnb.cuda.model import gpu

        found["numba-cuda"], found["GPU"] = _version("numba-cuda"), gpu()
    chosen = {x: os.environ[x] for x in SETTINGS if x in os.environ}
    return found | chosen


def _version(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def _differences(begun, now):
    """A list of one sentence on what has changed, or an empty one."""
    found = []
    for name in sorted(begun | now):
        pair = [str(x.get(name, "none")) for x in (begun, now)]
        words = [set(x.split()) for x in pair]
        if name == "features":  # a hundred words: those that differ
            pair = [" ".join(sorted(words[i] - words[1 - i])) for i in (0, 1)]
        if words[0] != words[1]:
            found.append(
                f"{name} {pair[0] or 'none'}, now {pair[1] or 'none'}"
            )
    if not found:
        return []
    return [
        "the weights may differ in their last bits from those of a run that "
        f"was not interrupted: it began with {'; '.join(found)}"
    ]


# save the state
GROUPS = "params", "m", "v"


def save_state(run):
    """Write the state of a run into its folder; return the path.

    The file appears whole or not at all. Then all up to this step are
    removed but the newest `config.keep` that the run itself has written or
    gone on from. Those from beyond the step, which may be damaged, stay
    until the run has come there. Raises FloatingPointError, and keeps what
    there is, when an array is not finite.

    Derived in chapter 1.16.
    """
    memory, path = run.model.memory, state_path(run.folder, run.at.step)
    tensors = {
        f"{group}.{name}": np.asarray(memory[group][name])  # from a GPU too
        for group in GROUPS
        for name in parameter_shapes(run.model.cfg)
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
        "begun": run.begun,
        "sums": {name: zlib.crc32(x) for name, x in tensors.items()},
    }
    record = json.dumps(record)
    check = str(zlib.crc32(record.encode()))
    note = {"format": STATE, "record": record, "sum": check}
    run.lock.check()
    write_tensors(path, tensors, note)
    _forget_old(run)
    return path


def _forget_old(run):
    step, kept = run.at.step, run.kept
    kept[:] = [*(x for x in kept if x < step), step][-run.config.keep :]
    for old in states(run.folder):
        if _step_of(old) <= step and _step_of(old) not in kept:
            old.unlink()


# the files of the states
def state_path(folder, step):
    """Where the state after so many steps is kept.

    Derived in chapter 1.16.
    """
    return Path(folder) / f"state_{step:08d}.safetensors"


def states(folder):
    """The paths of the states in a run's folder, the oldest first.

    Only what `state_path` names: no file of another name is a state.

    Derived in chapter 1.16.
    """
    found = Path(folder).glob("state_*.safetensors")
    return sorted(filter(_is_state, found), key=_step_of)


def _is_state(path):
    digits = path.stem.removeprefix("state_")
    return bool(re.fullmatch("[0-9]{8}|[1-9][0-9]{8,17}", digits))


def _step_of(path):
    """The step of a state, from its name."""
    return int(path.stem.removeprefix("state_"))


# a state read back
class State(NamedTuple):
    """What a file of `save_state` holds, but for the arrays.

    cfg: the model's GPT2Config. place: of the DataLoader. text: as
    `fingerprint` gives it. begun: as `surroundings` gives it, or empty.

    Derived in chapter 1.16.
    """

    path: Path
    config: TrainConfig
    cfg: GPT2Config
    at: Progress
    place: dict
    text: list
    begun: dict


# read and check
def read_state(path):
    """Read and check a state; returns a `State`, whose arrays are not kept.

    Raises OSError when it cannot be read, and ValueError, naming the file
    and the defect, when it is not whole: names, shapes, types and checksums
    of all arrays are checked.

    Derived in chapter 1.16.
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
            dict(record.get("begun", {})),
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

    Derived in chapter 1.16.
    """
    from llmnb.model.gpt2 import GPT2

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

    Derived in chapter 1.16.
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

    Derived in chapter 1.16.
    """
    old = read_steps(path) if step and Path(path).exists() else []
    rows = [row for row in old if row.step < step]
    if rows:
        write_log(path, rows)
    else:
        Path(path).write_bytes((",".join(Step._fields) + "\n").encode())


def add_to_log(path, *steps):
    """Add the row of each `Step` to a log.

    Derived in chapter 1.16.
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

    Derived in chapter 1.16.
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

    Derived in chapter 1.16.
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

    Derived in chapter 1.16.
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

    Locks the folder until `finish`, or until the Run is gone. Writes
    config.json and the tokenizer, and removes the states of an older run
    there. Raises ValueError, OSError, RuntimeError or MemoryError.

    Derived in chapter 1.16.
    """
    folder = Path(folder)
    with ExitStack() as undo:
        lock = undo.enter_context(Lock(folder))
        data = prepare(config)
        feeds = loaders(config, data)
        model = new_model(config, data.encoding.n_vocab)
        begun = surroundings(config.backend)
        record = fingerprint(*feeds), begun, [], lock
        _sweep(folder, states(folder))
        write_record(folder, config, data)
        undo.pop_all()  # the lock stays
    return Run(folder, config, data, model, *feeds, Progress(), *record)


# what a kill leaves
HALF = re.compile(
    r"(config\.json|log\.csv|loss\.png|model\.bin|sample\.txt"
    r"|state_[0-9]+\.safetensors|tokenizer\.tiktoken)" + BESIDE
)


def _sweep(folder, old=()):
    """Remove old states, and what was left half written."""
    half = [x for x in folder.iterdir() if HALF.fullmatch(x.name)]
    for path in [*old, *half]:
        path.unlink()


# what may change
CHANGEABLE = (
    "steps", "eval_every", "eval_batches", "save_every", "keep",
    "sample_every", "corpus", "shards",
)  # fmt: skip


# go on with a run
def resume(folder, **changes):
    """Take up the run in a folder; returns a `Run` and a list of warnings.

    changes: fields of the TrainConfig, of which only those in `CHANGEABLE`
    may differ from the run's; `corpus` and `shards` say where the text is
    now. The folder is locked as by `begin`. The warnings say which newer
    states are damaged, and what else has changed since the beginning that
    may change bits. Nothing is written before all is checked. Raises
    OSError or ValueError when the folder holds no run, no state of it is
    whole, or the text is not the one it began with.

    Derived in chapter 1.16.
    """
    folder = Path(folder)
    read_run(folder)  # only a run is locked
    with ExitStack() as undo:
        lock = undo.enter_context(Lock(folder))
        config = _changed(folder, changes)
        state, warnings = newest_state(folder)
        data = _same_data(folder, config, state)
        feeds = loaders(config, data)
        text, begun = fingerprint(*feeds), surroundings(config.backend)
        if state:
            warnings += _check_text(state, text, feeds)
            warnings += _differences(state.begun or begun, begun)
            feeds[0].state, begun = state.place, state.begun or begun
            model, at = restore(state._replace(config=config)), state.at
        else:
            model, at = new_model(config, data.encoding.n_vocab), Progress()
        kept = [x for x in map(_step_of, states(folder)) if x <= at.step]
        _sweep(folder)
        write_record(folder, config, data)
        undo.pop_all()  # the lock stays
    record = at, text, begun, kept, lock
    return Run(folder, config, data, model, *feeds, *record), warnings


# the text again
def _same_data(folder, config, state):
    """The Data of a run that goes on, if the state goes with it."""
    if state:
        _check_run(state, config)
    own = str(folder / "tokenizer.tiktoken")
    try:
        return prepare(replace(config, tokenizer=own))
    except FileNotFoundError as error:
        if error.filename == own:
            raise
        raise FileNotFoundError(
            f"{error}; if the text has moved, name its new place with "
            "--corpus or --shards"
        ) from None


def _check_text(state, text, feeds):
    """Raise if the text is another; warn if that cannot be said for sure."""
    if state.text == text:
        return []
    if state.text == _first_batches(feeds):
        return [
            f"{state.path} was written by an older llmnb: only the first "
            "batch of the text was compared"
        ]
    folder = state.path.parent
    raise ValueError(f"{folder}: the text is not the one it began with")


# change it
def _changed(folder, changes):
    """The run's configuration with changes, if they are possible."""
    config = read_run(folder)
    if "corpus" in changes:  # shards come first where both are given
        changes = {"shards": "", **changes}
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

    Derived in chapter 1.16.
    """
    config, at, log = run.config, run.at, run.folder / "log.csv"
    steps, rows = train(config, run.model, run.batches, run.validation, at), []
    with telling(run):
        run.lock.check(hold=True)
        start_log(log, at.step)
        for step in steps:
            run.lock.check(hold=True)
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
    does. Then the folder is no longer locked.

    Derived in chapter 1.16.
    """
    log, figure, steps = run.folder / "log.csv", run.folder / "loss.png", []
    with telling(run):
        run.lock.check(hold=True)
        run.model.save_checkpoint(run.folder / "model.bin")
        note_model(run.folder, run.at.step)
    with sparing(log):
        steps = read_steps(log)
        write_log(log, steps)
    with sparing(figure):
        save_figure(figure, steps, landmarks(run.config, run.data))
    run.lock.release()
    return steps


# what is left when it fails
@contextmanager
def telling(run):
    """Make an error within say what is left, and what to do.

    An OSError names the last good checkpoint; a FloatingPointError a command
    that starts from it, at half the learning rate.

    Derived in chapter 1.16.
    """
    try:
        yield
    except BlockingIOError:  # the folder is another's
        raise
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
    """The states it has written or gone on from, the oldest first."""
    return [state_path(run.folder, step) for step in run.kept]


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
