# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       train.folder: "The folder of a run: its files, written and read back."
#       train.drawing: "The losses of a run, drawn and saved as a figure."
#       train.start: "The model that a run starts with, new or from a checkpoint."
# ---

# %% [markdown]
# # Folders: keep a run
#
# > What it takes to use a model again, and to say where it came from: a folder of
# > files, each written whole.
#
# *Reading time: 26 minutes. You need: [chapter 4.13](13_loop.ipynb) and the files of
# [chapter 4.1](01_files.ipynb).*

# %% [markdown]
# ## Where we are
#
# A model that is trained and not kept is a number on a screen. At the end of this
# chapter you can
#
# - say what each file of a run's folder is for;
# - say which of them may fail, and which may not;
# - find the newest weights of a run without asking a clock.

# %% [markdown]
# ## Setup

# %% setup
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import numpy as np

from llmnb.book.verify import verdict
from llmnb.files import own_folder
from llmnb.train.feed import landmarks, loaders, prepare
from llmnb.train.loop import train
from llmnb.train.options import TrainConfig

config = TrainConfig(
    corpus=("../../tests/data/library.jsonl.gz",), limit=300_000,
    num_layers=2, channels=64, steps=60, eval_every=30, eval_batches=5,
)  # fmt: skip
data = prepare(config)
V, marks = data.encoding.n_vocab, landmarks(config, data)

# %% [markdown]
# ## A picture
#
# The training loss of a single step is noisy: each batch is another handful of
# text, and some text is easier. The plot shows each step as a dot and draws a
# running mean through them. A mean over a window belongs to the window's middle,
# so its steps are averaged like its values.

# %% imports of drawing tags=["export"] module="train.drawing"
import os

import numpy as np

from llmnb.files import replacing

_SMOOTH = 20  # steps in the running mean of the training loss


# %% a running mean tags=["export"] module="train.drawing"
def smooth(points, window):
    """Running means of a column over `window` rows.

    points: an array (2, N) of steps and values. Returns such an array, of
    N - window + 1 columns; its steps are the windows' means too. A column
    shorter than the window comes back as it is.
    """
    if window < 1:
        raise ValueError(f"the window must be at least 1, got {window}")
    if points.shape[1] < window:
        return points
    sums = np.cumsum(np.pad(points, ((0, 0), (1, 0))), axis=1)
    return (sums[:, window:] - sums[:, :-window]) / window


# %% points of a curve tags=["exporti"] module="train.drawing"
def points_of(rows, name):
    """Steps and values of a column, an array (2, N): where it has a value."""
    points = [(x["step"], x[name]) for x in rows if x[name] is not None]
    return np.array(points, float).reshape(-1, 2).T


# %% draw the losses tags=["export"] module="train.drawing"
def draw_losses(ax, steps, landmarks):
    """Draw losses over steps into a matplotlib axes, with the landmarks.

    steps: list of `Step`. landmarks: dict from name to a loss, each drawn
    as a dashed line with its name.
    """
    from llmnb.book.diagram import PALETTE

    rows = [step._asdict() for step in steps]
    points = points_of(rows, "loss")
    ax.plot(*points, ".", color=PALETTE["grey"], ms=3, label="one batch")
    if points.shape[1] >= 2 * _SMOOTH:
        label = f"mean of {_SMOOTH} batches"
        mean = smooth(points, _SMOOTH)
        ax.plot(*mean, color=PALETTE["blue"], label=label)
    points = points_of(rows, "val_loss")
    ax.plot(*points, "o-", color=PALETTE["orange"], ms=4, label="validation")
    for name, loss in landmarks.items():
        ax.axhline(loss, color=PALETTE["ink"], lw=1, ls="--")
        place = {"transform": ax.get_yaxis_transform(), "ha": "right"}
        ax.text(0.99, loss, name, va="bottom", parse_math=False, **place)
    ax.set(xlabel="step", ylabel="loss (nats a token)")
    ax.legend(frameon=False)


# %% [markdown]
# A run that ends on a machine without a display still has its figure, and it looks
# the same whatever the user's own settings of matplotlib are.


# %% the figure tags=["export"] module="train.drawing"
def loss_figure(steps, landmarks):
    """A matplotlib Figure of a run's losses; see `draw_losses`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=100, layout="tight")
    draw_losses(figure.subplots(), steps, landmarks)
    return figure


def save_figure(path, draw, *data):
    """Write the Figure that `draw(*data)` makes, needing no display.

    path: its ending names the kind, such as .png, .pdf or .svg; without one
    it is a PNG. The user's own settings of matplotlib, such as fonts, are
    left aside. Raises ValueError for a kind that matplotlib does not write.
    """
    from matplotlib import style

    kind = os.path.splitext(path)[1][1:] or "png"
    with style.context("default"), replacing(path) as file:
        draw(*data).savefig(file, format=kind)


# %% [markdown]
# ## The model of a run
#
# A run begins with new weights, or with those of a checkpoint. What trains decides
# the class of the model: `GPT2` in one process, and its relatives where weights
# learn on the way back (Part 5) or where a group of processes shares the work
# (Part 6). Before its memory is taken, it is asked whether there is room: a system
# that has promised more than it has ends the process later, without a word.


# %% imports of start tags=["export"] module="train.start"
import platform

import numpy as np

from llmnb.arena import footprint
from llmnb.checks import check_room
from llmnb.formats.checkpoint import read_config
from llmnb.model.gpt2 import GPT2
from llmnb.model.layout import gpt2_layout
from llmnb.train.folder import weights_path
from llmnb.train.group import ALONE, waiting


# %% the model and its batches tags=["export"] module="train.start"
def new_model(config, vocab_size, group=ALONE):
    """The GPT2 that a run starts with, for a vocabulary of this size.

    Freshly initialised, or with the weights of `config.init`. Raises
    ValueError when these are for another vocabulary, and as `checked_size`
    and GPT2.from_checkpoint do. group: the Group that trains it, of which
    each process calls this.
    """
    if not config.init:
        cfg = config.model(vocab_size)
        return empty_model(config, cfg, config.seed, group)
    path = weights_path(config.init)
    how = checked_size(config, read_config(path, vocab_size), group)
    made = _model_class(config, group)
    return made.from_checkpoint(path, **how, tokens=vocab_size)


def empty_model(config, cfg, seed=None, group=ALONE):
    """A GPT2 of a run, with first weights; without a seed, with none."""
    how = checked_size(config, cfg, group)
    return _model_class(config, group)(cfg, **how, seed=seed)


def _model_class(config, group):
    if config.in_backward:
        from llmnb.model.inbackward import InBackward  # Part 5

        return InBackward
    if group.on_gpus:
        from llmnb.train.gpus import OnGPUs  # Part 6

        return OnGPUs.of(group)
    if group.size == 1:
        return GPT2
    from llmnb.train.sharded import Sharded  # Part 6

    return Sharded.of(group)


def checked_size(config, cfg, group=ALONE):
    """A run's batches, backend and precision, if its model fits in memory.

    cfg: the GPT2Config. All of the model counts here, as training writes to
    all of it, with the gradients that wait for others and without what
    other processes of the group hold; the processes on one machine count
    together. A GPU's memory answers for itself. Raises MemoryError.
    """
    here, size = platform.node(), 0
    if config.backend != "cuda":
        dtype = np.float64 if config.precision == "fp64" else np.float32
        layout = gpt2_layout(cfg, config.batch_size, config.seq_len, dtype)
        if config.in_backward:
            from llmnb.model.inbackward import in_backward_layout  # Part 5

            layout = in_backward_layout(cfg, layout)
        sizes = footprint(layout)
        wait = waiting(group.share(config.micro_batches)) * sizes["grads"]
        others = (sizes["m"] + sizes["v"]) * (1 - 1 / group.size)
        size = int(sum(sizes.values()) + wait - others)
    everyone = group.gather([here, size])
    check_room(sum(n for machine, n in everyone if machine == here))
    return config.some("batch_size", "seq_len", "backend", "precision")


# %% a short run
model = new_model(config, V)
batches, validation = loaders(config, data)
steps = list(train(config, model, batches, validation))
fig, ax = plt.subplots(figsize=(7, 3.5), dpi=100)
draw_losses(ax, steps, marks)
fig.tight_layout()
plt.show()
final = steps[-1].val_loss
verdict("sixty steps", final < steps[0].val_loss - 0.5, "have been worth it")

# %% [markdown]
# *Figure 4.14.1. Sixty steps of a small run, as its folder shows them: batches
# scatter, and the validation loss has fallen by more than half a nat.*

# %% [markdown]
# ## Keep the run
#
# A run folder holds what it takes to use the model again, and to say where
# it came from:
#
# | file | what it holds |
# |---|---|
# | `chat_template.jinja` | how one talks with the model, where that from which the run starts has it ([chapter 5.9](../5_modern/09_chat.ipynb)) |
# | `config.json` | the `TrainConfig`, the corpus, the landmarks, versions |
# | `log.csv` | one line for every `Step` |
# | `loss.png` | a picture like figure 4.14.1 |
# | `model.bin` | the weights, in the format of [chapter 4.2](02_checkpoints.ipynb); `model.safetensors` where the model is no GPT-2 |
# | `sample.txt` | a text that the model wrote, from `llmnb train` ([chapter 4.24](24_train.ipynb)) |
# | `state_*.safetensors` | what it takes to go on; see [chapter 4.15](15_states.ipynb) |
# | `tokenizer.tiktoken` | the tokenizer's ranks |
#
# Each file is written beside its place and renamed into it, by `replacing`
# from [chapter 4.1](01_files.ipynb). A run that is stopped in the middle of
# writing leaves the old file or the new one, and never half of one.
#
# The files are not equally dear. A log or a figure shows a run, the model
# *is* the run, and there are many ways for a picture to fail that have
# nothing to do with it: a font, a setting, a package that is missing. So the
# model is written first, and what only shows it may fail with a warning.
#
# Half files are one danger, two writers another: so a run locks its folder, and
# begins in one that is its own: `Lock` and `own_folder` of
# [chapter 4.1](01_files.ipynb).

# %% imports of folder tags=["export"]
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


# %% the log tags=["export"]
def write_log(path, steps):
    """Write a list of `Step` as CSV; what a step does not give stays empty."""
    lines = [",".join(Step._fields), *map(log_row, steps)]
    write_whole(path, "".join(f"{line}\n" for line in lines).encode())


def log_row(step):
    """The row of a `Step` in a log: numbers with nine digits, and commas."""
    given = ("" if x is None else f"{x:.9g}" for x in step[1:])
    return ",".join([str(step.step), *given])


# %% what may fail tags=["export"]
@contextmanager
def sparing(what):
    """Turn an error within into a warning that says what there is not."""
    try:
        yield
    except Exception as error:  # a picture can fail with any
        why = " ".join(f"{type(error).__name__}: {error}".split())
        warnings.warn(f"goes on without {what}: {why}", stacklevel=3)


# %% the folder's files tags=["export"]
def model_file(cfg):
    """The name of the file that holds a run's model.

    llm.c's format holds GPT-2; other architectures go into safetensors.
    """
    return "model.bin" if cfg.family == "gpt2" else "model.safetensors"


def save_model(folder, model):
    """Write a run's model; one of an older run in another format goes."""
    name = model_file(model.cfg)
    model.save_checkpoint(folder / name)
    for other in {"model.bin", "model.safetensors"} - {name}:
        (folder / other).unlink(missing_ok=True)


def save_run(folder, config, model, data, steps):
    """Write the model, config.json, the tokenizer, log.csv and loss.png.

    folder: the Path that `own_folder` made. steps: list of `Step`. A log or
    a figure that cannot be written is a warning.
    """
    save_model(folder, model)
    marks = write_record(folder, config, data)
    with sparing(folder / "log.csv"):
        write_log(folder / "log.csv", steps)
    with sparing(folder / "loss.png"):
        save_figure(folder / "loss.png", loss_figure, steps, marks)


# %% what a run was tags=["export"]
def write_record(folder, config, data):
    """Write the tokenizer and config.json; returns the landmarks."""
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
    """Note in config.json at which step model.bin was written."""
    path = Path(folder, "config.json")
    _write_json(path, read_json(path) | {"model_step": step})


# %% [markdown]
# Reading it back builds the model at whatever batch size the reader needs:
# one row is enough to write a text.


# %% a run read back tags=["export"]
def load_run(folder, batch_size=1, seq_len=None, backend=None):
    """Read the model, the tokenizer and the TrainConfig of a run folder.

    seq_len and backend default to the run's own; of a run on a GPU, in
    whatever precision, the model computes in float32 on another backend.
    Raises OSError or ValueError, in one sentence, when a file is missing or
    damaged.
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


# %% the numbers of a run, read back tags=["export"]
def read_run(folder):
    """The TrainConfig in a run folder's config.json.

    Raises OSError or ValueError, in one sentence, when it is missing or
    holds something else.
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
    """
    return TrainConfig(**{**found, "corpus": tuple(found["corpus"])})


# %% write and read back
with TemporaryDirectory() as folder:
    save_run(own_folder(folder), config, model, data, steps)
    print(*sorted(x.name for x in Path(folder).iterdir()))
    writer, encoding, same = load_run(folder)
verdict("read back", same == config, "the same numbers")
same = all(
    np.array_equal(writer.params[n], model.params[n]) for n in model.params
)
verdict("read back", same, "the same weights")

# %% [markdown]
# ## Where the weights are
#
# A run that is not over has no `model.bin` yet, or an old one; its newest state
# has the weights too. A state is called by its step.


# %% the files of the states tags=["export"]
def state_path(folder, step):
    """Where the state after so many steps is kept."""
    return Path(folder) / f"state_{step:08d}.safetensors"


def states(folder):
    """The paths of the states in a run's folder, the oldest first.

    Only what `state_path` names: no file of another name is a state.
    """
    name = re.compile(r"state_([0-9]{8}|[1-9][0-9]{8,17})\.safetensors")
    found = Path(folder).glob("state_*")
    return sorted((x for x in found if name.fullmatch(x.name)), key=step_of)


def step_of(path):
    """The step of a state, from its name."""
    return int(path.stem.removeprefix("state_"))


# %% where the weights are tags=["export"]
def weights_path(path):
    """The newest weights in a run's folder; any other path as it is.

    They are in the newest state, unless the model was written at its step or
    later: config.json says at which. No clock is asked.
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


# %% [markdown]
# ## Take away
#
# - The model is the run, and is written first; what only shows it may fail with a
#   warning.
# - `config.json` says at which step the model was written: no clock has to.
#
# ## Exercises
#
# **1** (★★). A folder holds `model.bin` and a state of step 10. Which weights are
# taken if `config.json` says that the model was written at step 10, which if it
# says 9, and which if it is from a program that wrote no `model_step`? Why is that
# the safe side?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# The model's, the state's, and again the state's. An unknown step counts as -1,
# which is before every state. A state is written whole with its step in its name,
# so its age is certain; taking an old model for the newest would lose the steps
# since.
# :::

# %% exercise 1, checked tags=["hide-cell"]
with TemporaryDirectory() as folder:
    for name in ("model.bin", state_path(folder, 10).name):
        Path(folder, name).touch()
    found = []
    for said in ('{"model_step": 10}', '{"model_step": 9}', "{}"):
        Path(folder, "config.json").write_text(said)
        found.append(weights_path(folder).suffix)
want = [".bin", ".safetensors", ".safetensors"]
verdict("model_step", found == want, "the state counts, unless it is older")

# %% [markdown]
# **2** (★). What do you have after a run whose picture cannot be drawn? Make a
# folder called `loss.png` where the file should be, and save the run there.
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# All but the picture, and a warning that says why: the model was written before,
# and `sparing` lets nothing else suffer.
# :::

# %% exercise 2, checked tags=["hide-cell"]
with (
    TemporaryDirectory() as folder,
    warnings.catch_warnings(record=True) as said,
):
    warnings.simplefilter("always")
    Path(folder, "loss.png").mkdir()
    save_run(Path(folder), config, model, data, steps)
    files = [x.name for x in Path(folder).iterdir() if x.is_file()]
print(*sorted(files))
told = [str(x.message) for x in said]
verdict("no picture", len(files) == 4 and len(told) == 1, "costs no model")
verdict("the warning", "goes on without" in told[0], "says what is missing")

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("4.14")
