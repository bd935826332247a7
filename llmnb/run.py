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
    "SETTINGS",
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
    "surroundings",
    "sync_log",
    "telling",
]


# imports of the run
import json
import os
import platform
import re
import zlib
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llmnb.arena import put
from llmnb.config import GPT2Config, parameter_shapes
from llmnb.data import HEADER_BYTES, DataLoader, shard_length
from llmnb.files import BESIDE, replacing
from llmnb.lock import Lock
from llmnb.tensors import TensorFile, write_tensors
from llmnb.train import (
    Data,
    Progress,
    Step,
    TrainConfig,
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
    Progress. text: a fingerprint of the text, see `fingerprint`. begun: the
    `surroundings` at its beginning. kept: the steps of the states to go on
    from, the oldest first. lock: the folder's, see `Lock`.

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
    begun: dict
    kept: list
    lock: Lock


# what text it is
def fingerprint(*batches):
    """What tells one text from another, for JSON.

    For each DataLoader: the number of its batches, and a sha256 of all
    tokens of all its shards. One shard is open at a time.

    Derived in chapter 14.
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

    Derived in chapter 14.
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
FORMAT = "llmnb training state 1"


def save_state(run):
    """Write the state of a run into its folder; return the path.

    The file appears whole or not at all. Then all up to this step are
    removed but the newest `config.keep` that the run itself has written or
    gone on from. Those from beyond the step, which may be damaged, stay
    until the run has come there.

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
        "begun": run.begun,
        "sums": {name: zlib.crc32(x) for name, x in tensors.items()},
    }
    record = json.dumps(record)
    check = str(zlib.crc32(record.encode()))
    note = {"format": FORMAT, "record": record, "sum": check}
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

    Derived in chapter 14.
    """
    return Path(folder) / f"state_{step:08d}.safetensors"


def states(folder):
    """The paths of the states in a run's folder, the oldest first.

    Only what `state_path` names: no file of another name is a state.

    Derived in chapter 14.
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

    Derived in chapter 14.
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
            dict(record.get("begun", {})),
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

    Locks the folder until `finish`, or until the Run is gone. Writes
    config.json and the tokenizer, and removes the states of an older run
    there. Raises ValueError, OSError, RuntimeError or MemoryError.

    Derived in chapter 14.
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

    Derived in chapter 14.
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

    Derived in chapter 14.
    """
    config, at, log = run.config, run.at, run.folder / "log.csv"
    steps = train(config, run.model, run.batches, run.validation, at)
    with telling(run):
        run.lock.check(hold=True)
        start_log(log, at.step)
        for step in steps:
            run.lock.check(hold=True)
            add_to_log(log, step)
            due = config.save_every and at.step % config.save_every == 0
            if step.loss is not None and (due or at.step == config.steps):
                sync_log(log)
                save_state(run)
            yield step


# the end of a run
def finish(run):
    """Write the files of `save_run`, at any step; returns the log's steps.

    Then the folder is no longer locked. Raises as `follow` does.

    Derived in chapter 14.
    """
    with telling(run):
        run.lock.check(hold=True)
        steps = read_steps(run.folder / "log.csv")
        save_run(run.folder, run.config, run.model, run.data, steps)
    run.lock.release()
    return steps


# what is left when it fails
@contextmanager
def telling(run):
    """Make an OSError within say which checkpoint is the last good one.

    Derived in chapter 14.
    """
    try:
        yield
    except BlockingIOError:  # the folder is another's
        raise
    except OSError as error:
        what = error.strerror or str(error)
        kept = [state_path(run.folder, step).name for step in run.kept]
        left = (
            f"the last checkpoint is {kept[-1]}"
            if kept
            else ("there is no checkpoint yet")
        )
        raise OSError(f"{error.filename or run.folder}: {what}; {left}") from (
            error
        )
