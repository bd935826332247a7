# Written by `make export` from notebooks/4_practice/14_folders.py: edit that file.

"""The folder of a run: its files, written and read back."""

__all__ = [
    "config_from",
    "load_run",
    "log_row",
    "model_step",
    "note_model",
    "read_run",
    "run_folder",
    "save_run",
    "sparing",
    "state_path",
    "states",
    "step_of",
    "weights_path",
    "write_log",
    "write_record",
]


# imports of folder
import json
import re
import warnings
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path

from llmnb.files import (
    LOCK,
    in_use,
    make_folder,
    read_small,
    replacing,
    what_is,
)
from llmnb.timing import machine
from llmnb.train.drawing import save_figure
from llmnb.train.feed import landmarks
from llmnb.train.loop import Step
from llmnb.train.options import TrainConfig


# a folder for a run
def run_folder(path, force=False):
    """Make the folder of a run; returns it as a Path.

    Raises FileExistsError when it holds anything, unless `force`.

    Derived in chapter 4.14.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file, not a folder")
    make_folder(path)
    if any(x.name != LOCK for x in path.iterdir()) and not force:
        state = in_use(path) or "exists and is not empty"
        raise FileExistsError(f"{path} {state}")
    return path


# the log
def write_log(path, steps):
    """Write a list of `Step` as CSV; what a step does not give stays empty.

    Derived in chapter 4.14.
    """
    lines = [",".join(Step._fields), *map(log_row, steps)]
    _write_text(path, "\n".join(lines) + "\n")


def log_row(step):
    """The row of a `Step` in a log: numbers with nine digits, and commas.

    Derived in chapter 4.14.
    """
    given = ("" if x is None else f"{x:.9g}" for x in step[1:])
    return ",".join([str(step.step), *given])


def _write_text(path, text):
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


# what may fail
@contextmanager
def sparing(what):
    """Turn an error within into a warning that says what there is not.

    Derived in chapter 4.14.
    """
    try:
        yield
    except Exception as error:  # a picture can fail with any
        why = " ".join(f"{type(error).__name__}: {error}".split())
        warnings.warn(f"goes on without {what}: {why}", stacklevel=3)


# the folder's files
def save_run(folder, config, model, data, steps):
    """Write model.bin, config.json, the tokenizer, log.csv and loss.png.

    folder: the Path that `run_folder` made. steps: list of `Step`. A log or
    a figure that cannot be written is a warning.

    Derived in chapter 4.14.
    """
    model.save_checkpoint(folder / "model.bin")
    marks = write_record(folder, config, data)
    with sparing(folder / "log.csv"):
        write_log(folder / "log.csv", steps)
    with sparing(folder / "loss.png"):
        save_figure(folder / "loss.png", steps, marks)


# what a run was
def write_record(folder, config, data):
    """Write tokenizer.tiktoken and config.json; returns the landmarks.

    Derived in chapter 4.14.
    """
    from llmnb.text import tokenizer

    folder, marks = Path(folder), landmarks(config, data)
    tokenizer.save(data.encoding, folder / "tokenizer.tiktoken")
    record = json.dumps(_facts(config, data, marks), indent=1)
    _write_text(folder / "config.json", record + "\n")
    return marks


def note_model(folder, step):
    """Note in config.json at which step model.bin was written.

    Derived in chapter 4.14.
    """
    path = Path(folder) / "config.json"
    record = json.loads(path.read_text("utf-8")) | {"model_step": step}
    _write_text(path, json.dumps(record, indent=1) + "\n")


# what is written down
def _facts(config, data, marks):
    names = "llmnb", "numpy", "numba", "tiktoken"
    return {
        "config": asdict(config),
        "data": data.source,
        "train_tokens": len(data.train_tokens),
        "val_tokens": len(data.val_tokens),
        "landmarks": marks,
        "versions": {name: version(name) for name in names},
        "machine": machine(),
    }


# a run read back
def load_run(folder, batch_size=1, seq_len=None, backend=None):
    """Read the model, the tokenizer and the TrainConfig of a run folder.

    seq_len and backend default to the run's own; of a run in TF32 the model
    computes in float32 on another backend. Raises OSError or ValueError, in
    one sentence, when a file is missing or damaged.

    Derived in chapter 4.14.
    """
    from llmnb.text import tokenizer
    from llmnb.model.gpt2 import GPT2

    folder = Path(folder)
    config = read_run(folder)
    backend, precision = backend or config.backend, config.precision
    if precision == "tf32" and backend != "cuda":
        precision = "fp32"
    encoding = tokenizer.load(folder / "tokenizer.tiktoken")
    model = GPT2.from_checkpoint(
        weights_path(folder),
        batch_size=batch_size,
        seq_len=seq_len or config.seq_len,
        backend=backend,
        precision=precision,
    )
    return model, encoding, config


# the numbers of a run, read back
def read_run(folder):
    """The TrainConfig in a run folder's config.json.

    Raises OSError or ValueError, in one sentence, when it is missing or
    holds something else.

    Derived in chapter 4.14.
    """
    path = Path(folder) / "config.json"
    raw = read_small(path, 1 << 20)
    try:
        return config_from(json.loads(raw)["config"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        what = what_is(path) or error
        raise ValueError(f"{path} is not a run's: {what!s:.200}") from None


def config_from(found):
    """The TrainConfig of its fields, a dict as JSON holds them.

    Raises KeyError, TypeError or ValueError when it holds anything else.

    Derived in chapter 4.14.
    """
    config = TrainConfig(**{**found, "corpus": tuple(found["corpus"])})
    for each in fields(config):
        value = getattr(config, each.name)
        if type(value) not in (each.type, int if each.type is float else None):
            kind = each.type.__name__
            raise TypeError(f"{each.name} must be {kind}, got {value!r}")
    return config


# the files of the states
def state_path(folder, step):
    """Where the state after so many steps is kept.

    Derived in chapter 4.14.
    """
    return Path(folder) / f"state_{step:08d}.safetensors"


def states(folder):
    """The paths of the states in a run's folder, the oldest first.

    Only what `state_path` names: no file of another name is a state.

    Derived in chapter 4.14.
    """
    found = Path(folder).glob("state_*.safetensors")
    return sorted(filter(_is_state, found), key=step_of)


def _is_state(path):
    digits = path.stem.removeprefix("state_")
    return bool(re.fullmatch("[0-9]{8}|[1-9][0-9]{8,17}", digits))


def step_of(path):
    """The step of a state, from its name.

    Derived in chapter 4.14.
    """
    return int(path.stem.removeprefix("state_"))


# where the weights are
def weights_path(path):
    """The newest weights in a run's folder; any other path as it is.

    They are in the newest state, unless model.bin was written at its step or
    later: config.json says at which. No clock is asked.

    Derived in chapter 4.14.
    """
    folder, model = Path(path), Path(path, "model.bin")
    last = states(folder)[-1:] if folder.is_dir() else []
    whole = model.is_file()
    if last and not (whole and model_step(folder) >= step_of(last[0])):
        return last[0]
    return model if whole else folder


def model_step(folder):
    """The step at which a run's model.bin was written, or -1: not known.

    Derived in chapter 4.14.
    """
    with suppress(OSError, ValueError, KeyError, TypeError):
        text = read_small(Path(folder, "config.json"), 1 << 20)
        return int(json.loads(text)["model_step"])
    return -1
