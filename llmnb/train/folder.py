# Written by `make export` from notebooks/4_practice/14_folders.py: edit that file.

"""The folder of a run: its files, written and read back."""

__all__ = [
    "config_from", "load_run", "log_row", "model_file", "note_model",
    "read_run", "save_model", "save_run", "sparing", "state_path", "states",
    "step_of", "weights_path", "write_log", "write_record",
]


# imports of folder
import json
import re
import warnings
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from llmnb.files import read_json, write_whole
from llmnb.formats.vocabulary import keep_encoding, open_encoding
from llmnb.model.gpt2 import GPT2
from llmnb.timing import machine
from llmnb.train.drawing import loss_figure, save_figure
from llmnb.train.feed import landmarks
from llmnb.train.loop import Step
from llmnb.train.options import TrainConfig


# the log
def write_log(path, steps):
    """Write a list of `Step` as CSV; what a step does not give stays empty.

    Derived in chapter 4.14.
    """
    lines = [",".join(Step._fields), *map(log_row, steps)]
    write_whole(path, "".join(f"{line}\n" for line in lines).encode())


def log_row(step):
    """The row of a `Step` in a log: numbers with nine digits, and commas.

    Derived in chapter 4.14.
    """
    given = ("" if x is None else f"{x:.9g}" for x in step[1:])
    return ",".join([str(step.step), *given])


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
def model_file(cfg):
    """The name of the file that holds a run's model.

    llm.c's format holds GPT-2; other architectures go into safetensors.

    Derived in chapter 4.14.
    """
    return "model.bin" if cfg.family == "gpt2" else "model.safetensors"


def save_model(folder, model):
    """Write a run's model; one of an older run in another format goes.

    Derived in chapter 4.14.
    """
    name = model_file(model.cfg)
    model.save_checkpoint(folder / name)
    for other in {"model.bin", "model.safetensors"} - {name}:
        (folder / other).unlink(missing_ok=True)


def save_run(folder, config, model, data, steps):
    """Write the model, config.json, the tokenizer, log.csv and loss.png.

    folder: the Path that `own_folder` made. steps: list of `Step`. A log or
    a figure that cannot be written is a warning.

    Derived in chapter 4.14.
    """
    save_model(folder, model)
    marks = write_record(folder, config, data)
    with sparing(folder / "log.csv"):
        write_log(folder / "log.csv", steps)
    with sparing(folder / "loss.png"):
        save_figure(folder / "loss.png", loss_figure, steps, marks)


# what a run was
def write_record(folder, config, data):
    """Write the tokenizer and config.json; returns the landmarks.

    Derived in chapter 4.14.
    """
    folder, marks = Path(folder), landmarks(config, data)
    keep_encoding(data.encoding, folder)
    names = "llmnb", "numpy", "numba", "tiktoken"
    record = {
        "config": asdict(config),
        "data": data.source,
        "train_tokens": len(data.train_tokens),
        "val_tokens": len(data.val_tokens),
        "landmarks": marks,
        "versions": {name: version(name) for name in names},
        "machine": machine(),
    }
    _write_json(folder / "config.json", record)
    return marks


def _write_json(path, found):
    write_whole(path, json.dumps(found, indent=1).encode() + b"\n")


def note_model(folder, step):
    """Note in config.json at which step model.bin was written.

    Derived in chapter 4.14.
    """
    path = Path(folder, "config.json")
    _write_json(path, read_json(path) | {"model_step": step})


# a run read back
def load_run(folder, batch_size=1, seq_len=None, backend=None):
    """Read the model, the tokenizer and the TrainConfig of a run folder.

    seq_len and backend default to the run's own; of a run on a GPU, in
    whatever precision, the model computes in float32 on another backend.
    Raises OSError or ValueError, in one sentence, when a file is missing or
    damaged.

    Derived in chapter 4.14.
    """
    folder = Path(folder)
    config = read_run(folder)
    backend, precision = backend or config.backend, config.precision
    if config.backend == "cuda" != backend:
        precision = "fp32"
    encoding = open_encoding(folder)
    shape = batch_size, seq_len or config.seq_len
    path = weights_path(folder)
    model = GPT2.from_checkpoint(path, *shape, backend, precision)
    return model, encoding, config


# the numbers of a run, read back
def read_run(folder):
    """The TrainConfig in a run folder's config.json.

    Raises OSError or ValueError, in one sentence, when it is missing or
    holds something else.

    Derived in chapter 4.14.
    """
    path = Path(folder) / "config.json"
    try:
        found = read_json(path)
    except FileNotFoundError as error:
        what = f"{error.strerror}; the folder of a run has one"
        raise FileNotFoundError(error.errno, what, str(path)) from None
    try:
        return config_from(found["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a run's: {error!s:.200}") from None


def config_from(found):
    """The TrainConfig of its fields, a dict as JSON holds them.

    Raises KeyError, TypeError or ValueError when it holds anything else.

    Derived in chapter 4.14.
    """
    return TrainConfig(**{**found, "corpus": tuple(found["corpus"])})


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
    name = re.compile(r"state_([0-9]{8}|[1-9][0-9]{8,17})\.safetensors")
    found = Path(folder).glob("state_*")
    return sorted((x for x in found if name.fullmatch(x.name)), key=step_of)


def step_of(path):
    """The step of a state, from its name.

    Derived in chapter 4.14.
    """
    return int(path.stem.removeprefix("state_"))


# where the weights are
def weights_path(path):
    """The newest weights in a run's folder; any other path as it is.

    They are in the newest state, unless the model was written at its step or
    later: config.json says at which. No clock is asked.

    Derived in chapter 4.14.
    """
    folder = Path(path)
    names = "model.bin", "model.safetensors"
    models = [folder / x for x in names if (folder / x).is_file()]
    for last in states(folder)[-1:]:
        if not models or _model_step(folder) < step_of(last):
            return last
    return models[0] if models else folder


def _model_step(folder):
    """The step at which a run's model.bin was written, or -1: not known."""
    with suppress(OSError, ValueError, KeyError, TypeError, OverflowError):
        return int(read_json(Path(folder, "config.json"))["model_step"])
    return -1
