# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       cli.cli: "The command line."
#       train.watch: "A run watched from another terminal."
#       train.terminal: "What a terminal is told, and how a program is stopped."
# ---

# %% [markdown]
# # Put the chapters on the command line
#
# > Every command is a short function over what the chapters have built, its
# > options are the fields of a dataclass, and a mistake gets one line.

# %% [markdown]
# ## Where we are

# %% where we are
from llmnb.book.diagram import gpt2_diagram

gpt2_diagram(lit="all")

# %% [markdown]
# *Figure 4.18.1. The model, its training and its writing are built. What is
# left is a way to reach them from a terminal.*
#
# At the end of this chapter you can
#
# - watch a run, and lay several over one another;
# - find the function behind each command of `llmnb`;
# - add an option, in one place;
# - say what a command does with a mistake of its user, and why.
#
# You need [chapter 1.16](../1_by_hand/16_training.ipynb) for the run and
# [chapter 1.17](../1_by_hand/17_writing.ipynb) for the text it writes.

# %% [markdown]
# ## Setup

# %% setup
from tempfile import TemporaryDirectory

from llmnb.book.verify import verdict

# %% [markdown]
# ## Watch a run
#
# A run writes a row of numbers a step into `log.csv`, and hands each row to
# the system before the next step begins. So a run can be watched while it goes
# on, and read after its process has died. The last row may be half a row, when
# the process was killed while it wrote: a row without its line's end is left
# out.

# %% imports of the watcher tags=["export"] module="train.watch"
import time
from pathlib import Path

import numpy as np

from llmnb.train.run import read_rows


# %% read a log tags=["export"] module="train.watch"
def read_log(path):
    """The columns of a run's log, by name.

    path: a log.csv, or the folder of a run. Returns a dict from a column's
    name to an array (2, N) of float64: steps, and the values that the
    column has at them; N is 0 for an empty column. A last row without a
    line's end is left out. Raises OSError, or ValueError with the file's
    name and the line that is no row of numbers.
    """
    path = Path(path)
    path = path / "log.csv" if path.is_dir() else path
    names, rows = read_rows(path)
    points = {name: [] for name in names[1:]}
    for line, row, wrong in rows:
        if wrong:
            raise ValueError(f"{path}, line {line}: {wrong}")
        for name in points:
            if row[name] is not None:
                points[name].append((row["step"], row[name]))
    return {k: np.array(v, float).reshape(-1, 2).T for k, v in points.items()}


# %% [markdown]
# To compare runs, their curves belong into one picture. The losses of single
# batches scatter, and a running mean is drawn over them; its window is the
# number of steps that you choose.


# %% a running mean tags=["export"] module="train.watch"
def smooth(points, window):
    """Running means of a column over `window` rows.

    points: an array (2, N) as in `read_log`. Returns such an array, of
    N - window + 1 columns; its steps are the windows' means too. A column
    shorter than the window comes back as it is.
    """
    if window < 1:
        raise ValueError(f"the window must be at least 1, got {window}")
    if points.shape[1] < window:
        return points
    sums = np.cumsum(np.pad(points, ((0, 0), (1, 0))), axis=1)
    return (sums[:, window:] - sums[:, :-window]) / window


# %% runs in one picture tags=["export"] module="train.watch"
PANELS = {
    "loss": "loss (nats a token)",
    "learning_rate": "learning rate",
    "grad_norm": "norm of the gradient",
    "tokens_per_second": "tokens a second",
}


def compare_runs(logs, window=20):
    """A matplotlib Figure of several runs: loss, rate, norm, speed.

    logs: a dict from a run's name to what `read_log` returns. window: rows
    in the running mean. Dots are validation losses.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), dpi=100, layout="constrained")
    axes = figure.subplots(2, 2).flat
    for ax, (name, label) in zip(axes, PANELS.items(), strict=True):
        for number, (run, log) in enumerate(logs.items()):
            _draw(ax, log, name, run, f"C{number % 10}", window)
        ax.set(xlabel="step", ylabel=label)
        if name != "loss":
            ax.set_ylim(0, 1.1 * ax.get_ylim()[1])
    _name_runs(figure.axes[0], logs)
    return figure


# %% [markdown]
# A run is called what its user has called it, and matplotlib reads between
# the lines: a dollar begins mathematics, and a label that begins with an
# underscore is not shown. So the legend is made with numbers, and the names
# are put in as plain text.


# %% names as they are tags=["exporti"] module="train.watch"
def _name_runs(ax, names):
    """A legend of runs, by names that mean nothing to matplotlib."""
    lines = ax.lines[::2]  # each run's batches, then its validations
    legend = ax.legend(lines, [*map(str, range(len(lines)))], frameon=False)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(text=_short(name), parse_math=False, usetex=False)


def _short(name, most=60):
    """A name in one line, of whole characters; the end tells runs apart."""
    whole = name.encode("utf-8", "replace").decode("utf-8")
    line = " ".join(whole.split())
    return line if len(line) <= most else "..." + line[3 - most :]


# %% one curve tags=["exporti"] module="train.watch"
def _draw(ax, log, name, run, colour, window):
    empty = np.empty((2, 0))
    raw = log.get(name, empty)
    if name == "learning_rate":
        window = 1  # chosen, not measured: nothing scatters
    ax.plot(*smooth(raw, window), color=colour, label=run)
    if name == "loss":
        ax.plot(*log.get("val_loss", empty), "o", color=colour, ms=4)


# %% runs in one table tags=["export"] module="train.watch"
def run_table(logs):
    """Lines of text: a row a run, with steps, losses and speed.

    logs: as for `compare_runs`. The best loss is the lowest of the
    validations, the last one the latest.
    """
    names = [" ".join(run.split()) for run in logs]  # each in one line
    wide = max(map(len, ["run", *names]))
    lines = [
        f"{'run':<{wide}}  {'steps':>7} {'last val':>9} {'best val':>9} "
        f"{'tokens/s':>9}"
    ]
    for run, log in zip(names, logs.values(), strict=True):
        steps, losses = log.get("loss", np.empty((2, 0)))
        val = log.get("val_loss", np.empty((2, 0)))[1]
        speed = log.get("tokens_per_second", np.empty((2, 0)))[1]
        last, best = (val[-1], val.min()) if len(val) else (np.nan, np.nan)
        middle = np.median(speed) if len(speed) else np.nan
        lines.append(
            f"{run:<{wide}}  {len(losses):7,} {last:9.4f} {best:9.4f} "
            f"{middle:9,.0f}"
        )
    return lines


# %% [markdown]
# We make up two runs to try it: the second learns twice as fast, and the row
# it was writing when it stopped is cut off.

# %% two runs, made up
from llmnb.train.watch import compare_runs, read_log, run_table, smooth


def pretend(path, speed, steps=300):
    noise = np.random.RandomState(20).normal(0, 0.15, steps)
    lines = ["step,loss,val_loss,learning_rate,grad_norm,tokens_per_second"]
    for step in range(steps):
        loss = 4 + 3 / (1 + speed * step / 50)
        val = f"{loss:.4f}" if step % 50 == 0 else ""
        rate, norm = 1e-3 * (1 - step / steps), 1 + 3 / (1 + step)
        numbers = f"{rate:.9g},{norm:.9g},{9000 + 100 * noise[step]:.9g}"
        lines.append(f"{step},{loss + noise[step]:.9g},{val},{numbers}")
    path.write_text("\n".join(lines))


place = TemporaryDirectory()
for name, speed in {"slow": 1, "fast": 2}.items():
    pretend(Path(place.name, f"{name}.csv"), speed)
logs = {x: read_log(Path(place.name, f"{x}.csv")) for x in ("slow", "fast")}
print(*run_table(logs), sep="\n")
verdict("rows", logs["fast"]["loss"].shape == (2, 299), "the half row is out")

# %% see them
compare_runs(logs)

# %% [markdown]
# *Figure 4.18.2. Two runs in one picture. Lines are running means over 20
# steps, dots the validations. The second run reaches at step 150 what the
# first reaches at step 300; the rate, the norm and the speed are the same.*
#
# TensorBoard shows such curves in a browser and keeps them up to date. It
# reads a file of events, which its own package can write; you need it only
# if you ask for it.


# %% events for TensorBoard tags=["export"] module="train.watch"
class Board:
    """Writes numbers into a folder that TensorBoard watches.

    folder: where the file of events goes. Raises ImportError, in one
    sentence, when the package tensorboard is not installed.
    """

    def __init__(self, folder):
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer import event_file_writer
        except ImportError:
            raise ImportError(
                "TensorBoard's package is missing: "
                "pip install 'llmnb[tensorboard]'"
            ) from None
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._file = event_file_writer.EventFileWriter(str(folder))

    def write(self, step, numbers):
        """Write a step's numbers, a dict from name to float or None."""
        values = [
            self._summary.Value(tag=name, simple_value=value)
            for name, value in numbers.items()
            if value is not None
        ]
        summary = self._summary(value=values)
        event = self._event(wall_time=time.time(), step=step, summary=summary)
        self._file.add_event(event)
        self._file.flush()

    def close(self):
        """Finish the file."""
        self._file.close()


# %% written and read, where TensorBoard is tags=["nbval-ignore-output"]
from llmnb.train.watch import Board

try:
    board = Board(place.name)
    board.write(3, {"loss": 1.5, "val_loss": None})
    board.close()
    print(*[x.name[:20] for x in Path(place.name).glob("events*")])
except ImportError as error:
    print(error)

# %% [markdown]
# ## What a terminal is told
#
# Every command writes to two streams, and a stream can be many things: a
# terminal, a file, a pipe whose reader has gone away, a disk that is full.
# Four things can go wrong on the way, whichever command writes:
#
# - Nobody reads any more. `llmnb generate | head` has seen enough, and the
#   command should end without a word; training should go on, for its result
#   is a folder and not what it prints. So with a closed terminal, or an SSH
#   session that broke.
# - The text cannot be written. That is an error in one line, as for any other
#   file; again training goes on.
# - The stream has no such character, on a terminal of Windows for example.
#   Then Python's escape stands for it, `\u4e2d`.
# - The text commands the terminal. Escape sequences move the cursor, rewrite
#   what was said, change the title of the window. A model can write them, and
#   the name of a file or of a tensor can hold them. A terminal gets their
#   escapes, `\x1b`; a file or a pipe gets the text as it is.
#
# So `main` puts a small object before each of the two streams, and no command
# needs to know.

# %% imports of the terminal tags=["export"] module="train.terminal"
import os
import sys
from contextlib import contextmanager, suppress

# %% what a terminal is not sent tags=["exporti"] module="train.terminal"
CONTROLS = {*range(32), *range(127, 160)} - {*map(ord, "\n\t")}
HALVES = range(0xD800, 0xE000)  # what stands for a byte that is not UTF-8
ESCAPES = {x: f"\\x{x:02x}" for x in CONTROLS} | {
    x: f"\\u{x:04x}" for x in HALVES
}


# %% a stream and its reader tags=["export"] module="train.terminal"
class Screen:
    """A text stream that is safe to write to, for what people read.

    stream: what is written to. result: whether it takes a command's result,
    as standard output does. Losing such a stream ends the command: with
    exit code 141 (128 + SIGPIPE) and no word when its reader went away,
    else with 1 and one line on standard error. A command that goes on all
    the same sets ends to False. Everything else is the stream's.

    On a terminal, control characters but newline and tab appear as escapes
    such as \\x1b; so do, anywhere, characters that the stream cannot encode.
    A progress bar, which begins with a carriage return, keeps that.
    """

    def __init__(self, stream, result=False):
        self.ends = self._result = result
        self._stream, self._lost = stream, False
        self._terminal = stream.isatty()

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        """Write a str; returns its length, as files do."""
        if self._terminal:
            bar = not self._result and text[:1] == "\r"
            text = "\r" * bar + text[bar:].translate(ESCAPES)
        try:
            self._try(self._stream.write, text)
        except UnicodeEncodeError:
            raw = text.encode(self.encoding, "backslashreplace")
            self._try(self._stream.write, raw.decode(self.encoding))
        return len(text)

    def flush(self):
        """Hand on what is written."""
        self._try(self._stream.flush)

    def _try(self, function, *args):
        if self._lost:
            return
        try:
            function(*args)
        except OSError as error:
            self._lose(error)

    def _lose(self, error):
        self._lost = True
        with suppress(OSError):  # Python, ending, writes out what is left
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        gone = isinstance(error, ConnectionError)  # a broken pipe is one
        if self._result and not gone:
            kind = "error" if self.ends else "warning"
            why = error.strerror or error
            print(f"llmnb: {kind}: standard output: {why}", file=sys.stderr)
        if self.ends:
            sys.exit(141 if gone else 1)


# %% [markdown]
# A stream that was closed before the command began (`>&-` in a shell) is a
# case by itself: the system gives its number, 1 or 2, to the next file that
# is opened, and what is meant for people would go into a checkpoint. So the
# three numbers are taken first.


# %% both streams tags=["export"] module="train.terminal"
@contextmanager
def screens():
    """Within, sys.stdout and sys.stderr are `Screen`s; a closed one is mute.

    Losing standard output ends the command, losing standard error does not.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(number)
    old = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:
        sys.stdout = Screen(old[0] or nowhere, result=True)
        sys.stderr = Screen(old[1] or nowhere)
        try:
            yield
        finally:
            try:
                sys.stdout.flush()
            finally:
                sys.stdout, sys.stderr = old


# %% [markdown]
# A progress bar draws itself over and over in one line, which a file cannot
# do: the log of a night's training would hold ten thousand bars. Where
# standard error is no terminal, a plain line a minute says as much, and one
# at each validation.

# %% a bar, or lines tags=["export"] module="train.terminal"
QUIET = 60  # seconds between two lines
LINE = (
    "{percentage:3.0f}% {n_fmt}/{total_fmt} "
    "[{elapsed}<{remaining}, {rate_fmt}{postfix}]"
)


class _Lines:
    """Takes what tqdm draws, and writes it as lines to standard error."""

    encoding = "utf-8"

    def write(self, text):
        if text.strip():
            print(text.strip(), file=sys.stderr)

    def flush(self):
        pass


def progress(work=None, **how):
    """A tqdm over work, on standard error: a bar, or lines in a file.

    how: more of tqdm's arguments. Where standard error is no terminal, a
    line comes each minute, and whenever the bar is asked to refresh.
    """
    from tqdm import tqdm

    if sys.stderr.isatty():
        return tqdm(work, dynamic_ncols=True, **how)
    how |= {"leave": False, "delay": QUIET, "bar_format": LINE}
    times = {"mininterval": QUIET, "maxinterval": QUIET}
    return tqdm(work, file=_Lines(), **times, **how)


# %% [markdown]
# ## The commands
#
# Each command is a short function over what the chapters have built:
#
# | command | what it does |
# |---|---|
# | `llmnb train` | trains on a corpus, writes a run folder, resumes |
# | `llmnb generate RUN` | continues a prompt with a run's model |
# | `llmnb data FOLDER` | turns text of any size into token shards |
# | `llmnb eval MODEL` | perplexity of a text, accuracy on HellaSwag |
# | `llmnb plot RUN...` | draws and compares runs |
# | `llmnb fetch NAME` | downloads a published model |
# | `llmnb verify FOLDER` | runs llm.c's acceptance test |
# | `llmnb bench` | measures a training step, alone or against others |
# | `llmnb info` | versions, threads, and the size of a configuration |
#
# Three rules make it pleasant to use. `--help` answers at once: numba and
# matplotlib are imported by the commands that need them, when they run. An
# option has one home: the fields of `TrainConfig` with their help become
# the options of `llmnb train`. And a mistake of the user gets one line and
# an exit code that is not zero, without a traceback.
#
# A run of `--backend cuda` where there is no GPU counts as a mistake: on the
# simulator it would take days, and nobody means that. Who wants it for a tiny
# model asks for it, with `LLMNB_CUDA=simulator` in the environment.

# %% imports of the command line tags=["export"] module="cli.cli"
import argparse
import json
import os
import re
import signal
import sys
import time
import warnings
from contextlib import contextmanager, suppress
from dataclasses import fields
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path


from llmnb.files import make_folder, replacing
from llmnb.train.terminal import progress, screens
from llmnb.train.train import (
    SHAPE,
    DataOptions,
    KeepOptions,
    LearningOptions,
    ModelOptions,
    TrainConfig,
    UpdateOptions,
    sparing,
)


# %% errors in one line tags=["exporti"] module="cli.cli"
class _Parser(argparse.ArgumentParser):
    """A parser whose errors take one line instead of the whole usage."""

    def __init__(self, *args, **how):
        super().__init__(*args, **how)
        self.color = False  # the escapes that Python 3.14 would send

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (try --help)\n")


def _one_line(error):
    text = str(error)
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    return " ".join(text.split()) or type(error).__name__


def _warn(message, *where):
    """Show a warning in one line, as an error is shown; above any bar."""
    from tqdm import tqdm

    tqdm.write(f"llmnb: warning: {_one_line(message)}", file=sys.stderr)


# %% options from fields tags=["exporti"] module="cli.cli"
PARTS = {
    "what to read": DataOptions,
    "what the model looks like": ModelOptions,
    "how it learns": LearningOptions,
    "what an update is": UpdateOptions,
    "what it keeps": KeepOptions,
}


def _add_fields(parser, part, names=None, asked=False):
    """One option for each field of a dataclass, or for those in names.

    asked: leave out of the result what the user has not asked for.
    """
    for field in fields(part):
        if names and field.name not in names:
            continue
        many = isinstance(field.default, tuple)
        shown = " ".join(field.default) if many else field.default
        note = f" (default: {shown})" if shown != "" else ""
        if field.type is bool:
            how = {"action": "store_true"}
        elif many:
            how = {"nargs": "+", "metavar": field.name.upper()}
        else:
            how = {"type": field.type, "metavar": field.type.__name__}
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            default=argparse.SUPPRESS if asked else field.default,
            help=field.metadata["help"] + note,
            **how,
        )


# %% fields from options tags=["exporti"] module="cli.cli"
def _from_fields(args, part):
    """The fields that are among the options."""
    names = [x.name for x in fields(part) if hasattr(args, x.name)]
    values = {name: getattr(args, name) for name in names}
    return {k: tuple(v) if type(v) is list else v for k, v in values.items()}


# %% the number of threads tags=["exporti"] module="cli.cli"
def _add_threads(parser):
    parser.add_argument(
        "--threads", type=int, metavar="int",
        help="threads of the kernels (default: one for each core)",
    )  # fmt: skip


def _set_threads(args):
    import numba

    if args.threads is not None:
        numba.set_num_threads(args.threads)


# %% [markdown]
# The first run on a machine compiles its kernels, and somebody who waits for
# the first step should know for what. It is said on stderr, and only where
# the folder of [chapter 1.5](../1_by_hand/05_encoder.ipynb) is still empty.


# %% say what the wait is for tags=["exporti"] module="cli.cli"
def _tell_compiling(backend):
    """Announce that kernels will be compiled, if none have been yet."""
    if backend != "cpu":
        return
    from llmnb.cpu.compiled import cache_folder

    folder, often = cache_folder(), "once"
    if folder is None:
        often = "each time, for want of a folder to keep them: set LLMNB_CACHE"
    elif any(folder.iterdir()):
        return
    text = f"llmnb: compiling kernels takes up to half a minute, {often}"
    print(text, file=sys.stderr, flush=True)


# %% is the GPU there tags=["exporti"] module="cli.cli"
def _check_backend(name):
    """Refuse a GPU that is not there, unless the simulator is asked for."""
    if name != "cuda":
        return
    from llmnb.cuda.model import no_gpu

    if no_gpu():
        raise ValueError(
            f"no backend cuda here: {no_gpu()}; LLMNB_CUDA=simulator runs "
            "small models without a GPU"
        )


# %% llmnb train tags=["exporti"] module="cli.cli"
def _add_train(commands):
    parser = commands.add_parser(
        "train",
        help="train a GPT-2 and write a run folder",
        description="Train a GPT-2 from scratch, or from a checkpoint. The "
        "defaults take about two minutes on two cores. Ctrl-C finishes the "
        "step and saves; a second one stops at once.",
    )
    add = parser.add_argument
    add(
        "--out", metavar="FOLDER",
        help="where to write (default: a new folder in runs/)",
    )  # fmt: skip
    add("--force", action="store_true", help="write into a folder in use")
    add(
        "--resume", nargs="?", const="", metavar="FOLDER",
        help="go on with a run from its newest checkpoint (default: the "
        "newest run in runs/); --corpus or --shards say where its text is now",
    )  # fmt: skip
    add(
        "--tensorboard", action="store_true",
        help="write events for TensorBoard into the folder as well",
    )  # fmt: skip
    _add_threads(parser)
    for title, part in PARTS.items():
        _add_fields(parser.add_argument_group(title), part, asked=True)
    parser.set_defaults(run=_train)


# %% a name for a run tags=["exporti"] module="cli.cli"
RUNS = Path("runs")


def _new_folder(config):
    """Make runs/NAME, or the first of runs/NAME-2, -3, ... that is free."""
    first = Path(config.shards or config.corpus[0]).resolve().stem or "run"
    folder, number = RUNS / first, 1
    make_folder(RUNS)
    while True:
        with suppress(FileExistsError):  # or made by another this instant
            folder.mkdir()
            return folder
        number += 1
        folder = RUNS / f"{first}-{number}"


# %% [markdown]
# Which run is the newest? The clock knows, unless it was set, or a folder was
# copied or a file touched. So the runs themselves say: whenever one begins or
# saves, its name goes to the end of a list, `runs/.order`. Only where the list
# cannot tell, for runs that were made elsewhere or renamed, the clock decides,
# and the command says so.


# %% the order of the runs tags=["exporti"] module="cli.cli"
ORDER = RUNS / ".order"


def _ordered():
    """Names of the runs in runs/, the last one worked on at the end."""
    with suppress(OSError):
        return ORDER.read_text("utf-8", "surrogateescape").splitlines()
    return []


def _note(run):
    """Put a run in runs/ at the end of the list."""
    folder = run.folder.resolve()
    if folder.parent == RUNS.resolve() and _ordered()[-1:] != [folder.name]:
        line = f"{folder.name}\n".encode("utf-8", "surrogateescape")
        with suppress(OSError), open(ORDER, "ab") as file:
            file.write(line)


MODELS = "model.bin", "state_*.safetensors"


def _newest_run(*files):
    """The run in runs/ that was worked on last."""
    ordered, found = _ordered(), {}
    for path in chain(*(RUNS.glob(f"*/{name}") for name in files or MODELS)):
        name, when = path.parent.name, path.stat().st_mtime
        found[name] = max(when, found.get(name, when))
    if not found:
        raise FileNotFoundError(
            f"there is no run in {RUNS}/ here: name a folder, or train one "
            "with `llmnb train`"
        )
    for name in reversed(ordered):
        if name in found:
            return RUNS / name
        if not (RUNS / name).exists() and found.keys() - {*ordered}:
            break  # it may have another name now
    return _newest_by_clock(found)


def _newest_by_clock(found):
    newest = max(found, key=found.get)
    if len(found) > 1:
        _warn(
            f"which of the {len(found)} runs in {RUNS}/ is the newest is not "
            f"certain; taken is {RUNS / newest}: name one to be sure"
        )
    return RUNS / newest


# %% begin or go on tags=["exporti"] module="cli.cli"
def _begun(args):
    """A new run, from scratch or from a checkpoint."""
    from llmnb.train.run import begin
    from llmnb.train.train import run_folder, starting_from

    given = _from_fields(args, TrainConfig)
    if given.get("depth") and not given.keys().isdisjoint(SHAPE):
        names = ", ".join(name.replace("_", "-") for name in SHAPE)
        raise ValueError(f"--depth sets {names}: leave those out")
    _check_backend(given.get("backend"))
    make = starting_from if given.get("init") else TrainConfig
    config = make(**given)
    _check_apart(args.out, config.corpus)
    folder = run_folder(args.out or _new_folder(config), args.force)
    return begin(folder, config)


def _check_apart(out, corpus):
    """Refuse to write into the folder that is read."""
    for name in corpus:
        same = out and Path(name).is_dir() and Path(out).is_dir()
        if same and Path(out).samefile(name):
            raise ValueError(
                f"{name} is the corpus: what is written there would be read "
                "as text; choose another folder, such as one within it"
            )


def _resumed(args):
    """The run that --resume names, at its newest checkpoint."""
    from llmnb.train.run import resume
    from llmnb.train.train import read_run

    if args.out or args.force:
        raise ValueError("--resume needs neither --out nor --force")
    folder = args.resume or _newest_run("config.json")
    _check_backend(read_run(folder).backend)
    run, found = resume(folder, **_from_fields(args, TrainConfig))
    for warning in found:
        _warn(warning)
    where = f"at step {run.at.step:,} of {run.config.steps:,}"
    known = {"loss": run.at.last_loss, "best validation": run.at.best_loss}
    known = [f", {k} {x:.3f}" for k, x in known.items() if x is not None]
    _say("resumes", where + "".join(known))
    return run


# %% train, with a bar tags=["exporti"] module="cli.cli"
def _train(args):
    from llmnb.train.run import finish

    sys.stdout.ends = False  # who trains does not need to be read
    _set_threads(args)
    start = time.perf_counter()
    run = _begun(args) if args.resume is None else _resumed(args)
    _note(run)
    data = run.data
    _say("corpus", data.source)
    tokens = len(data.train_tokens), len(data.val_tokens)
    _say("tokens", "{:,} to train on, {:,} to validate on".format(*tokens))
    _say("model", _size_of(run.model))
    _say("folder", run.folder)
    _tell_compiling(run.config.backend)
    with _Stop() as stop:
        _follow(run, args, stop)
        steps = finish(run)
    _say("took", f"{time.perf_counter() - start:.0f} s")
    if stop.signal:
        _say("stopped", f"at step {run.at.step:,}, and saved")
        _say("go on", f"llmnb train --resume {run.folder}")
        sys.exit(128 + stop.signal)
    _report(run, steps)


# %% lines of a report tags=["exporti"] module="cli.cli"
def _say(label, text):
    print(f"{label:<10} {text}", flush=True)


def _size_of(model):
    cfg = model.cfg
    count = sum(x.size for x in model.params.values())
    return (
        f"{cfg.num_layers} layers, {cfg.num_heads} heads, {cfg.channels} "
        f"channels, {cfg.vocab_size} tokens: {count:,} parameters, "
        f"{model.memory.nbytes / 1e6:.0f} MB in all"
    )


# %% [markdown]
# Ctrl-C sends a process the signal `SIGINT`, a system that shuts down, or a
# scheduler that wants the machine back, sends `SIGTERM`, and a terminal that
# is closed sends `SIGHUP`. Left alone, they would end training in the middle
# of a step. So while `train` runs they only set a note; the loop finishes its
# step, finds the note, saves the state and leaves. The handlers go with the
# first signal: a second one does what it always did, and stops at once. The
# exit code is 128 plus the signal's number, 130, 143 or 129, so that a script
# can tell a run that was stopped from one that is done.
#
# `SIGHUP` has two customs of its own. `nohup llmnb train` starts us with the
# signal ignored, and ignored it stays. And a shell that loses its terminal
# passes the signal on while the system sends it too: it comes twice though
# nobody asked twice, so a second one is ignored.


# %% stop when asked to tags=["exporti"] module="cli.cli"
class _Stop:
    """Notes the first Ctrl-C, SIGTERM or SIGHUP; the next stops at once."""

    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    signal = 0

    def __enter__(self):
        known = {signal.SIGINT, signal.SIGTERM}
        if self.hangup and signal.getsignal(self.hangup) != signal.SIG_IGN:
            known.add(self.hangup)
        self.old = {x: signal.signal(x, self._note) for x in known}
        return self

    def _note(self, number, frame):
        self.signal = number
        for other in self.old:
            again = signal.SIG_IGN if other == self.hangup else self.old[other]
            signal.signal(other, again)
        # not print, which may be at work when the signal comes
        with suppress(OSError):
            os.write(2, b"\nfinishing the step; once more to stop at once\n")

    def __exit__(self, *error):
        for number, handler in self.old.items():
            signal.signal(number, handler)


# %% follow a run tags=["exporti"] module="cli.cli"
def _follow(run, args, stop):
    """Train to the end, or until a signal is noted; then save the state."""
    from llmnb.train.run import follow, save_state, telling

    done, total, shown = run.at.step, run.config.steps, {}
    bar = progress(total=total, initial=done, unit="step")
    with bar, _board(run, args) as board:
        for step in follow(run):
            board(step)
            _show(bar, run, step, shown)
            if run.kept[-1:] == [run.at.step]:
                _note(run)
            if stop.signal and step.loss is not None:
                with telling(run):
                    save_state(run)
                return


# %% show a step tags=["exporti"] module="cli.cli"
def _show(bar, run, step, shown):
    """Bring the bar up to date, and print a sample when it is time."""
    if step.val_loss is not None:
        shown["val"] = f"{step.val_loss:.3f}"
    if step.loss is not None:
        shown["loss"] = f"{step.loss:.3f}"
        shown["tok/s"] = f"{step.tokens_per_second:,.0f}"
        if step.skipped:
            bar.write(f"step {step.step}: an outlier, skipped")
        every = run.config.sample_every
        if every and run.at.step % every == 0:
            text = "none"
            with sparing("a sample"):
                text = _sample(run.model, run.data.encoding)
            bar.write(f"after {run.at.step} steps:\n{text}\n")
        bar.update()
    bar.set_postfix(shown, refresh=step.val_loss is not None)


# %% events for TensorBoard tags=["exporti"] module="cli.cli"
@contextmanager
def _board(run, args):
    """A function that writes a step for TensorBoard, if that is wanted."""
    if not args.tensorboard:
        yield lambda step: None
        return
    from llmnb.train.watch import Board

    board, lost = Board(run.folder), []

    def write(step):
        if not lost:
            lost.append(step)  # unless it can be written
            with sparing("TensorBoard's events"):
                board.write(step.step, step._asdict())
                lost.clear()

    yield write
    if not lost:
        with sparing("TensorBoard's events"):
            board.close()


# %% the end of a run tags=["exporti"] module="cli.cli"
SAMPLE = {"count": 200, "temperature": 0.8, "top_p": 0.95}


def _sample(model, encoding):
    from llmnb.model.decode import Decoder
    from llmnb.model.generate import decoded, generate

    # a GPU would compute the whole window for every token
    model = Decoder.of(model) if model.backend == "cuda" else model
    eot = encoding.eot_token
    tokens = generate(model, [eot], stop=eot, **SAMPLE)
    return "".join(decoded(encoding, tokens))


def _report(run, steps):
    from llmnb.train.train import landmarks

    losses = [x.val_loss for x in steps if x.val_loss is not None]
    folder, text = run.folder, "no sample"
    loss = f"{losses[-1]:.3f}" if losses else "unknown"
    with sparing("the landmarks"):
        marks = landmarks(run.config, run.data)
        known = ", ".join(f"{name} {x:.3f}" for name, x in marks.items())
        loss += f" on validation text ({known})"
    _say("loss", loss)
    with sparing(folder / "sample.txt"):
        text = _keep_sample(run)
    print(f"\n{text}\n")
    names = " ".join(sorted(x.name for x in folder.iterdir()))
    _say("wrote", f"{folder}: {names}")
    _say("go on", f'llmnb generate {folder} --prompt "def "')


def _keep_sample(run):
    """Write sample.txt with the model that is kept; returns the text."""
    from llmnb.train.train import load_run

    folder, on_gpu = run.folder, run.config.backend == "cuda"
    model, encoding, _ = load_run(folder, backend="cpu" if on_gpu else None)
    text = _sample(model, encoding)
    with replacing(folder / "sample.txt") as file:
        file.write(text.encode("utf-8"))
    return text


# %% llmnb generate tags=["exporti"] module="cli.cli"
DRAWS = {
    "prompt": (str, "", "the beginning of the text; - reads standard input"),
    "tokens": (int, 200, "tokens to write at most"),
    "samples": (int, 1, "texts to write, each with the next seed"),
    "temperature": (
        float,
        0.8,
        "0: the likeliest token; 1: as the model says",
    ),
    "top_k": (int, None, "draw among the k likeliest tokens only"),
    "top_p": (float, None, "draw among the likeliest that make up p only"),
    "seed": (int, 42, "another seed, another text"),
    "tokenizer": (
        str,
        None,
        "gpt2, byte, a rank file, vocab.json or tokenizer.json, instead of "
        "what lies beside the model",
    ),
    "backend": (
        str,
        "cpu",
        "cpu keeps keys and values; cuda and reference compute the whole "
        "window for every token",
    ),
}


# %% the options of generate tags=["exporti"] module="cli.cli"
def _add_generate(commands):
    parser = commands.add_parser(
        "generate",
        help="continue a prompt",
        description="Continue a prompt with the model of a run folder, of a "
        ".bin or .safetensors file, or of a Hugging Face model folder.",
    )
    parser.add_argument(
        "model", nargs="?", metavar="RUN",
        help="a run folder, a model file or a model folder (default: the "
        "newest in runs/)",
    )  # fmt: skip
    for name, (kind, default, text) in DRAWS.items():
        shown = "none" if default in (None, "") else default
        parser.add_argument(
            "--" + name.replace("_", "-"),
            type=kind,
            default=default,
            metavar=kind.__name__,
            help=f"{text} (default: {shown})",
        )
    _add_fields(parser, DataOptions, ["endoftext"])
    parser.add_argument(
        "--stats", action="store_true", help="print tokens a second at the end"
    )
    _add_threads(parser)
    parser.set_defaults(run=_generate)


# %% write to the terminal tags=["exporti"] module="cli.cli"
def _generate(args):
    from llmnb.model.generate import check_sampling, decoded, generate_samples

    settings = args.temperature, args.top_k, args.top_p
    check_sampling(*settings)
    _check_backend(args.backend)
    if args.samples < 1:
        raise ValueError(f"samples must be at least 1, got {args.samples}")
    _set_threads(args)
    prompt = _prompt(args.prompt)
    decoder, encoding, ids = _load_model(args, prompt)
    steps = generate_samples(
        decoder, ids, args.tokens, args.samples, *settings,
        seed=args.seed, stop=encoding.eot_token,
    )  # fmt: skip
    texts, times = [[] for _ in range(args.samples)], [time.perf_counter()]
    _heading(args, 0)
    print(prompt, end="", flush=True)
    for piece in decoded(encoding, _first_text(steps, texts, times)):
        print(piece, end="", flush=True)
    print()
    for i in range(1, args.samples):
        _heading(args, i)
        print(prompt + "".join(decoded(encoding, texts[i])))
    if args.stats:
        _stats(len(ids), texts, times)


# %% the prompt tags=["exporti"] module="cli.cli"
def _prompt(text):
    """The prompt, from standard input for -; what is no text becomes U+FFFD.

    Python reads a byte that is not UTF-8 as half of a character.
    """
    if text == "-":
        if sys.stdin is None:
            raise ValueError(
                "--prompt - reads standard input, which is closed"
            )
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")
        text = sys.stdin.read()
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


# %% several texts, one terminal tags=["exporti"] module="cli.cli"
def _first_text(steps, texts, times):
    """The first text's tokens as they come; the others are gathered."""
    for step in steps:
        times.append(time.perf_counter())
        for text, token in zip(texts, step, strict=True):
            if token is not None:
                text.append(token)
        if step[0] is not None:
            yield step[0]


def _heading(args, i):
    if args.samples > 1:
        print(f"--- {i + 1} of {args.samples}, seed {args.seed + i}")


def _stats(length, texts, times):
    """How fast it was, on standard error: the first token apart."""
    seconds = [b - a for a, b in zip(times, times[1:], strict=False)]
    lines = [f"prompt: {length:,} tokens, the first token after {s:.3f} s"
             for s in seconds[:1]]  # fmt: skip
    rest, count = sum(seconds[1:]), sum(len(text) - 1 for text in texts)
    if rest and count > 0:
        lines.append(
            f"then: {count:,} tokens in {rest:.3f} s, {count / rest:,.1f} "
            f"tokens/s, {rest / len(seconds[1:]) * 1e3:.1f} ms a step"
        )
    print(*lines, sep="\n", file=sys.stderr)


# %% which model tags=["exporti"] module="cli.cli"
def _load_model(args, prompt):
    """A model with room for the prompt and the text; the tokenizer; ids."""
    from llmnb.model.decode import Decoder
    from llmnb.model.generate import window_start
    from llmnb.model.gpt2 import GPT2
    from llmnb.text.tokenizer import EOT, encode_text

    named, path = _model_of(args)
    if not args.model or path not in (named, named / "model.bin"):
        print(f"model: {path}", file=sys.stderr)
    cfg, encoding = _with_tokenizer(path, args)
    ids = encode_text(encoding, prompt, args.endoftext)
    ids = [encoding.eot_token, *ids.tolist()]
    length = min(len(ids) + max(args.tokens, 0), cfg.max_seq_len)
    if EOT in prompt and not args.endoftext:
        print(
            f"{EOT} in the prompt is ordinary text (--endoftext takes it as "
            "the token)",
            file=sys.stderr,
        )
    if len(ids) > length:
        seen = len(ids) - window_start(len(ids), length)
        print(
            f"the prompt has {len(ids):,} tokens; the model sees the last "
            f"{seen:,} of them",
            file=sys.stderr,
        )
    how, tokens = (path, args.samples, length), cfg.vocab_size
    _tell_compiling(args.backend)
    if args.backend == "cpu":
        model = Decoder.from_checkpoint(*how, tokens)
    else:
        model = GPT2.from_checkpoint(*how, args.backend, tokens=tokens)
    return model, encoding, ids


def _model_of(args):
    """The model that was named, or the newest run's; and its weights."""
    from llmnb.train.train import weights_path

    named = Path(args.model) if args.model else _newest_run()
    if not named.exists():
        raise FileNotFoundError(f"there is no run {named}")
    return named, weights_path(named)


# %% which tokenizer tags=["exporti"] module="cli.cli"
def _with_tokenizer(path, args):
    """A model's configuration, for the tokenizer asked for or its own."""
    from llmnb.formats.checkpoint import read_config, without_padding
    from llmnb.formats.hub import open_encoding, tokenizer_of

    cfg = read_config(path)
    name = args.tokenizer or tokenizer_of(path, cfg.vocab_size)
    encoding = open_encoding(name)
    few = without_padding(path, cfg, encoding.n_vocab, name)
    if few != cfg:
        print(
            f"{path} has {cfg.vocab_size} tokens, the tokenizer {name} knows "
            f"{encoding.n_vocab}: the others are left out",
            file=sys.stderr,
        )
    return few, encoding


# %% llmnb data tags=["exporti"] module="cli.cli"
def _add_data(commands):
    parser = commands.add_parser(
        "data",
        help="turn text into token shards",
        description="Write train and val shards and tokenizer.tiktoken, for "
        "`llmnb train --shards FOLDER`. The corpus is stdlib, "
        "tinyshakespeare, or files and folders of text and of JSON lines "
        "(.jsonl), plain or packed (.gz, .zst). The same command goes on "
        "where it was stopped.",
    )
    parser.add_argument("out", metavar="FOLDER", help="where to write")
    parser.add_argument(
        "--force", action="store_true", help="start anew in a folder in use"
    )
    names = {x.name for x in fields(DataOptions)} - {"shards"}
    _add_fields(parser, DataOptions, names)
    _add_shards(parser)
    parser.set_defaults(run=_data)


# %% the sizes of the shards tags=["exporti"] module="cli.cli"
def _add_shards(parser):
    add = parser.add_argument
    add(
        "--shard-tokens", type=int, default=100_000_000, metavar="int",
        help="tokens in a shard (default: 100000000)",
    )  # fmt: skip
    add(
        "--val-tokens", type=int, default=0, metavar="int",
        help="tokens to set aside for validation (default: a tenth, at most "
        "32768)",
    )  # fmt: skip
    add(
        "--threads", type=int, default=0, metavar="int",
        help="threads that encode (default: one for each core)",
    )  # fmt: skip


# %% write the shards tags=["exporti"] module="cli.cli"
SHARD_OPTIONS = (
    "corpus", "limit", "tokenizer", "vocab_size", "field", "skip_bad",
    "endoftext", "shard_tokens", "val_tokens",
)  # fmt: skip


def _data(args):
    from llmnb.text import shards
    from llmnb.text.documents import sources
    from llmnb.text.reader import Tally
    from llmnb.train.train import make_encoding

    names = [field.name for field in fields(DataOptions)]
    options = {name: getattr(args, name) for name in SHARD_OPTIONS}
    options["corpus"] = list(args.corpus)
    config = TrainConfig(**{k: v for k, v in options.items() if k in names})
    _check_apart(args.out, args.corpus)
    folder, tally = shards.shards_folder(args.out, args.force), Tally()
    corpus = sources(args.corpus, args.field, args.skip_bad, tally)
    pieces = shards.pieces_from(corpus, limit=args.limit)
    encoding = make_encoding(config, (text for _, _, text, _ in pieces))
    work = shards.write_shards(
        folder, corpus, encoding, options, args.force, args.threads
    )
    done = _follow_data(work, sum(source.size for source in corpus))
    words = tally.words(args.endoftext)
    _say("corpus", _described(args.corpus, done) + words)
    for name, count in done.shards:
        _say(name, f"{count:,} tokens in {folder / name}")
    _say("go on", f"llmnb train --shards {folder}")


# %% follow the work tags=["exporti"] module="cli.cli"
def _follow_data(work, size):
    """Draw a bar over the bytes read; returns the last `Progress`."""
    first = next(work)  # what is wrong from the beginning gets no bar
    bar = progress(total=size, unit="B", unit_scale=True)
    with bar:
        for done in chain([first], work):
            bar.update(done.read - bar.n)
            bar.set_postfix(tokens=f"{done.tokens:,}", refresh=False)
    return done


def _described(names, done):
    where = " ".join(names)
    if where == "stdlib":
        where += f" (Python {'.'.join(map(str, sys.version_info[:3]))})"
    return (
        f"{where}: {done.documents:,} documents, {done.characters:,} "
        "characters"
    )


# %% llmnb eval tags=["exporti"] module="cli.cli"
def _add_eval(commands):
    parser = commands.add_parser(
        "eval",
        help="measure a model on a text or on HellaSwag",
        description="Perplexity and bits a byte of a text; accuracy on "
        "HellaSwag, from llm.c's .bin or from JSON lines.",
    )
    add = parser.add_argument
    add(
        "model", nargs="?", metavar="MODEL",
        help="a run folder, a .bin or .safetensors file, or a Hugging Face "
        "model folder (default: the newest in runs/)",
    )  # fmt: skip
    add("--text", nargs="+", default=[], metavar="FILE", help="text to score")
    add("--hellaswag", metavar="FILE", help="a .bin file, or JSON lines")
    names = "field", "skip_bad", "endoftext"
    _add_fields(parser, DataOptions, names)
    _add_eval_options(parser)
    _add_threads(parser)
    parser.set_defaults(run=_eval)


# %% its options tags=["exporti"] module="cli.cli"
EVAL = {
    "limit": (int, 0, "characters or examples at most; 0 means all"),
    "seq_len": (int, 0, "context in tokens; 0: all the model has"),
    "stride": (int, 0, "tokens scored a window; 0: half the context"),
    "tokenizer": (str, None, "as for generate"),
}  # fmt: skip


def _add_eval_options(parser):
    for name, (kind, default, text) in EVAL.items():
        parser.add_argument(
            "--" + name.replace("_", "-"), type=kind, default=default,
            metavar=kind.__name__,
            help=f"{text} (default: {'none' if default is None else default})",
        )  # fmt: skip


# %% measure a model tags=["exporti"] module="cli.cli"
def _eval(args):
    if not (args.text or args.hellaswag):
        raise ValueError("name a file: --text FILE or --hellaswag FILE")
    for name in ("limit", "seq_len", "stride"):
        if getattr(args, name) < 0:
            raise ValueError(f"{name} must be at least 0")
    named, path = _model_of(args)
    _set_threads(args)
    cfg, encoding = _with_tokenizer(path, args)
    context = min(args.seq_len or cfg.max_seq_len, cfg.max_seq_len)
    _say("model", path)
    _tell_compiling("cpu")
    if args.text:
        _eval_text(args, path, encoding, context)
    if args.hellaswag:
        _eval_hellaswag(args, path, encoding, context)


# %% perplexity tags=["exporti"] module="cli.cli"
def _eval_text(args, path, encoding, context):
    from llmnb.text.documents import sources
    from llmnb.train.evaluation import score_pieces
    from llmnb.model.gpt2 import GPT2
    from llmnb.text.reader import Tally
    from llmnb.text.shards import pieces_from

    tally = Tally()
    found = sources(args.text, args.field, args.skip_bad, tally)
    found = pieces_from(found, limit=args.limit)
    pieces = ((first, text) for _, first, text, _ in found)
    model = GPT2.from_checkpoint(path, 1, context, tokens=encoding.n_vocab)
    stride = args.stride or max(1, context // 2)
    bar = partial(progress, unit="window", leave=False)
    how = stride, bar, args.endoftext
    score = score_pieces(model, encoding, pieces, *how)
    size = f"{score.bytes:,} bytes{tally.words(args.endoftext)}"
    _say("text", f"{' '.join(args.text)}: {size}")
    _say("tokens", f"{score.tokens:,}, context {context}, stride {stride}")
    _say("loss", f"{score.loss:.4f} nats a token")
    _say("perplexity", f"{score.perplexity:.2f} a token")
    _say("bits", f"{score.bits_per_byte:.4f} a byte")


# %% multiple choice tags=["exporti"] module="cli.cli"
def _eval_hellaswag(args, path, encoding, context):
    from llmnb.train import evaluation as e
    from llmnb.model.gpt2 import GPT2
    from llmnb.text.reader import Tally

    tally = Tally()
    if args.hellaswag.endswith(".bin"):
        examples = e.read_examples(args.hellaswag)
    else:
        how = encoding, args.skip_bad, tally
        examples = e.read_examples_json(args.hellaswag, *how)
    examples = examples[: args.limit or None]
    lengths = [e.longest_row(x) - 1 for x in examples]
    how = path, 4, max(1, min(context, max(lengths)))
    model = GPT2.from_checkpoint(*how, tokens=encoding.n_vocab)
    cut = sum(length > context for length in lengths)
    bar = progress(total=len(examples), unit="example", leave=False)
    with bar:
        found = []
        for choice in e.choose(model, examples):
            found.append(choice)
            bar.update()
    size = f"{args.hellaswag}: {len(found):,} examples"
    size += f", {cut:,} cut on the left to {context} tokens" if cut else ""
    _say("hellaswag", size + tally.words())
    for name in ("by_mean", "by_sum"):
        right = sum(getattr(c, name) == c.label for c in found) / len(found)
        error = e.standard_error(right, len(found))
        label = {"by_mean": "acc_norm", "by_sum": "acc"}[name]
        _say(label, f"{right:.4f} +- {error:.4f}")


# %% llmnb bench tags=["exporti"] module="cli.cli"
def _add_bench(commands):
    parser = commands.add_parser(
        "bench",
        help="measure a training step, alone or against others",
        description="Time training steps on random tokens: tokens a second, "
        "memory, where the time goes. Every contestant has a process of its "
        "own; they take turns, and all are in memory at once.",
    )
    _add_race(parser)
    _add_outputs(parser)
    _add_threads(parser)
    shape = parser.add_argument_group("the model, without --config")
    _add_fields(shape, DataOptions, ["vocab_size"])
    names = [x.name for x in fields(ModelOptions) if x.name != "precision"]
    _add_fields(shape, ModelOptions, names)
    parser.set_defaults(run=_bench)


# %% who races, on what tags=["exporti"] module="cli.cli"
def _add_race(parser):
    add = parser.add_argument
    add(
        "--config", nargs="+", default=[], metavar="NAME",
        help="small, 124m-64, 124m-256, 124m-1024, 124m-16x1024, or several",
    )  # fmt: skip
    add(
        "--precision", nargs="+", metavar="NAME",
        help="what llmnb computes in (default: fp32 bf16, on a GPU fp32 tf32)",
    )  # fmt: skip
    add(
        "--against", nargs="+", default=[], metavar="NAME",
        help="torch, torch-compile, torch-bf16, torch-tf32, "
        "torch-compile-tf32, or llmc=PATH of llm.c's train_gpt2",
    )  # fmt: skip
    add(
        "--torch-python", default=sys.executable, metavar="PATH",
        help="the Python that has torch (default: this one)",
    )  # fmt: skip
    add(
        "--steps", type=int, default=10, metavar="int",
        help="steps of each to measure (default: 10)",
    )  # fmt: skip
    add(
        "--write", action="store_true",
        help="time tokens of a 124M model instead, against transformers",
    )  # fmt: skip
    add(
        "--kernels", nargs="*", metavar="LAYER",
        help="with --backend cuda: compare every version of these layers, or "
        "of all; without --config this alone",
    )  # fmt: skip
    add(
        "--start", action="store_true",
        help="time the first step of fresh processes; without --config this "
        "alone",
    )  # fmt: skip


# %% what is written tags=["exporti"] module="cli.cli"
def _add_outputs(parser):
    parser.add_argument(
        "--json", metavar="FILE", help="write all numbers; - prints them"
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="draw where the time goes, as a PNG"
    )


# %% measure tags=["exporti"] module="cli.cli"
def _bench(args):
    for path in filter(None, (args.json, args.plot)):
        if not Path(path).parent.is_dir():
            raise FileNotFoundError(f"there is no folder {Path(path).parent}")
    (_bench_writers if args.write else _bench_steps)(args)


def _bench_steps(args):
    from llmnb.bench.bench import bench, report
    from llmnb.bench.race import Settings

    gpu = args.backend == "cuda"
    if args.kernels is not None and not gpu:
        raise ValueError("--kernels needs a GPU: add --backend cuda")
    precisions = args.precision or ["fp32", "tf32" if gpu else "bf16"]
    settings = Settings(
        tuple(precisions), tuple(args.against), args.steps,
        args.threads, args.backend, args.torch_python,
    )  # fmt: skip
    bar = partial(progress, unit="round", leave=False)
    configs = _configs_of(args)
    result = bench(configs, settings, args.start, bar)
    result = {"command": _command(sys.argv[1:]), **result}
    words = [report(result)]
    if args.kernels is not None:
        from llmnb.bench.contest import contest, contest_report

        kernels = contest(args.kernels, bar=partial(bar, unit="layer"))
        words.append(contest_report(kernels))
        result |= kernels
    as_json = json.dumps(result, indent=1)
    print(as_json if args.json == "-" else "\n\n".join(words))
    _write_result(args, result)


# %% measure writing tags=["exporti"] module="cli.cli"
def _bench_writers(args):
    from llmnb.bench.bench import bench_writers, writers_report
    from llmnb.config import GPT2Config

    if args.config or args.against or args.plot:
        raise ValueError(
            "--write has a model and a rival of its own, and no picture: "
            "leave out --config, --against and --plot"
        )
    if args.backend != "cpu" or args.kernels is not None:
        raise ValueError("--write times the backend cpu alone")
    how = {"threads": args.threads, "python": args.torch_python}
    result = bench_writers(GPT2Config(), rounds=args.steps, **how)
    result = {"command": _command(sys.argv[1:]), **result}
    as_json = json.dumps(result, indent=1)
    print(as_json if args.json == "-" else writers_report(result))
    _write_result(args, result)


# %% write the files tags=["exporti"] module="cli.cli"
def _write_result(args, result):
    from llmnb.bench.bench import layers_figure
    from llmnb.bench.contest import ladders_figure

    draw = layers_figure if result.get("configs") else ladders_figure
    if args.json and args.json != "-":
        with replacing(args.json) as file:
            file.write(json.dumps(result, indent=1).encode() + b"\n")
    if args.plot:
        from matplotlib import style

        with style.context("default"), replacing(args.plot) as file:
            draw(result).savefig(file, format="png")


# %% the configurations tags=["exporti"] module="cli.cli"
def _configs_of(args):
    from llmnb.bench.bench import CONFIGS

    for name in args.config:
        if name not in CONFIGS:
            known = ", ".join(CONFIGS)
            raise ValueError(f"no config {name!r}: choose from {known}")
    if args.config or args.start or args.kernels is not None:
        return {name: CONFIGS[name] for name in args.config}
    config = _config_of(args)
    cfg = config.model(config.vocab_size)
    return {"custom": (cfg, config.batch_size, config.seq_len)}


def _command(argv):
    """The command without the folders of this machine."""
    words = [re.sub(r"[^ =]*[/\\]", "", word) for word in argv]
    return " ".join(["llmnb", *words])


# %% the configuration of some options tags=["exporti"] module="cli.cli"
def _config_of(args):
    names = {x.name for x in fields(ModelOptions)} - {"precision"}
    shape = {name: getattr(args, name) for name in names}
    return TrainConfig(**shape, vocab_size=args.vocab_size)


# %% llmnb info tags=["exporti"] module="cli.cli"
def _add_info(commands):
    parser = commands.add_parser(
        "info",
        help="versions, threads, and the size of a model",
        description="Print versions, and what a configuration takes: "
        "parameters, bytes, operations a token.",
    )
    _add_fields(parser, DataOptions, ["vocab_size"])
    _add_fields(parser, ModelOptions)
    parser.set_defaults(run=_info)


# %% report tags=["exporti"] module="cli.cli"
def _info(args):
    import numba

    from llmnb.config import flops_per_token, parameter_count
    from llmnb.cuda.model import gpu
    from llmnb.model.layout import footprint, gpt2_layout
    from llmnb.timing import machine

    config = _config_of(args)
    cfg = config.model(config.vocab_size)
    names = "llmnb", "numpy", "numba", "tiktoken"
    _say("versions", ", ".join(f"{x} {version(x)}" for x in names))
    _say("machine", machine())
    _say("threads", numba.get_num_threads())
    _say("gpu", gpu())
    _say("parameters", f"{parameter_count(cfg):,}")
    sizes = footprint(gpt2_layout(cfg, config.batch_size, config.seq_len))
    shown = ", ".join(f"{k} {v / 1e6:.1f}" for k, v in sizes.items())
    _say("memory", f"{sum(sizes.values()) / 1e6:.1f} MB ({shown})")
    flops = flops_per_token(cfg, config.seq_len)
    _say("work", f"{flops / 1e6:.1f} MFLOP to train on a token")


# %% llmnb plot tags=["exporti"] module="cli.cli"
def _add_plot(commands):
    parser = commands.add_parser(
        "plot",
        help="draw and compare runs",
        description="Draw the losses, learning rates, gradient norms and "
        "speeds of runs in one picture, and print a table. A run may still "
        "be going on.",
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="a run folder or a log.csv")
    add(
        "--out", default="runs.png", metavar="FILE",
        help="the picture, a PNG (default: runs.png)",
    )  # fmt: skip
    add(
        "--window", type=int, default=20, metavar="int",
        help="steps in a running mean (default: 20)",
    )  # fmt: skip
    parser.set_defaults(run=_plot)


def _plot(args):
    from matplotlib import style

    from llmnb.train.watch import compare_runs, read_log, run_table

    logs = {path: read_log(path) for path in args.runs}
    print(*run_table(logs), sep="\n")
    with style.context("default"), replacing(args.out) as file:
        compare_runs(logs, args.window).savefig(file, format="png")
    _say("wrote", args.out)


# %% llmnb fetch and llmnb verify tags=["exporti"] module="cli.cli"
def _add_fetch(commands):
    from llmnb.formats.hub import SOURCES

    parser = commands.add_parser(
        "fetch",
        help="download a published model",
        description="Download a model, or llm.c's starter pack, with "
        "huggingface_hub, and print its folder.",
    )
    names = ", ".join(SOURCES)
    parser.add_argument("name", metavar="NAME", help=f"one of {names}")
    parser.set_defaults(run=_fetch)


def _fetch(args):
    from llmnb.formats.hub import fetch

    print(fetch(args.name))


def _add_verify(commands):
    parser = commands.add_parser(
        "verify",
        help="run llm.c's acceptance test",
        description="Compare logits, loss, gradients and ten losses with "
        "what PyTorch recorded, in a folder with NAME.bin and "
        "NAME_debug_state.bin, such as llm.c's starter pack.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="the starter pack")
    parser.add_argument(
        "--backend", default="cpu", metavar="NAME",
        help="cpu, cuda or reference (default: cpu)",
    )  # fmt: skip
    _add_threads(parser)
    parser.set_defaults(run=_verify)


# %% a table of verdicts tags=["exporti"] module="cli.cli"
def _verify(args):
    from llmnb.formats.starter import accept

    _check_backend(args.backend)
    _set_threads(args)
    _tell_compiling(args.backend)
    row = "{:<10} {:>8} {:>8}  {}".format
    verdicts = {True: "ok", False: "FAIL", None: "no reference"}
    shown, bad = 0, 0
    for check in accept(args.folder, args.backend):
        if not shown:
            print(row("", "error", "allowed", ""))
        error = "-" if check.error is None else f"{check.error:.1e}"
        allowed = f"{check.allowed:.0e}"
        print(row(check.name, error, allowed, verdicts[check.ok]), flush=True)
        shown, bad = shown + 1, bad + (check.ok is False)
    if bad:
        print(f"{bad} of {shown} checks failed", file=sys.stderr)
        sys.exit(1)


# %% the command tags=["export"] module="cli.cli"
COMMANDS = (
    _add_train,
    _add_generate,
    _add_data,
    _add_eval,
    _add_plot,
    _add_fetch,
    _add_verify,
    _add_bench,
    _add_info,
)
USER_ERRORS = (
    ValueError,
    TypeError,
    OSError,
    ArithmeticError,
    MemoryError,
    ImportError,  # of an extra that is not installed
)


def main(argv=None):
    """Run the `llmnb` command; argv defaults to the process's arguments.

    Exits with code 2 for a wrong option and 1 for an error that the user
    can mend, each in one line on stderr; with 130 when interrupted, 143 or
    129 when training was ended by SIGTERM or SIGHUP, and 141 when the
    reader of stdout has gone away, which does not end training. When the
    variable LLMNB_TRACEBACK is set, errors keep their traceback.
    """
    with screens():
        args = _parser().parse_args(argv)
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _warn
                args.run(args)
        except KeyboardInterrupt:
            sys.exit(130)
        except USER_ERRORS as error:
            if "LLMNB_TRACEBACK" in os.environ:
                raise
            print(f"llmnb: error: {_one_line(error)}", file=sys.stderr)
            sys.exit(1)


def _parser():
    parser = _Parser("llmnb", description="Train GPT-2 and write with it.")
    parser.add_argument(
        "--version", action="version", version=f"llmnb {version('llmnb')}"
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(commands)
    return parser


# %% [markdown]
# Now the commands themselves, from a notebook cell as from a terminal. A
# small run, then its model asked to go on:

# %% train from the command line
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

from llmnb.cli.cli import main as llmnb

TINY = (
    "--tokenizer byte --limit 100000 --num-layers 1 --channels 32 "
    "--num-heads 2 --seq-len 32 --batch-size 4 --steps 30"
)


def run(*args):
    """What a command prints, and its exit code."""
    out, err, code = StringIO(), StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            llmnb([str(x) for x in args])
        except SystemExit as stop:
            code = stop.code
    return out.getvalue(), err.getvalue(), code


# %% a run folder, written and used
with TemporaryDirectory() as place:
    folder = Path(place, "run")
    _, _, code = run("train", "--out", folder, *TINY.split())
    print(code, *sorted(x.name for x in folder.iterdir()))
    ask = ["generate", folder, "--prompt", "def ", "--tokens", 20]
    text, _, code = run(*ask)
    verdict("generate", code == 0 and text.startswith("def "), "goes on")
    verdict("generate", run(*ask)[0] == text, "same seed, same text")
    two, _, code = run(*ask, "--samples", 2)
    verdict("generate", text in two, "the first of two is the same")
    text, _, code = run("train", "--resume", folder, "--steps", 40)
    verdict("resume", code == 0 and "step 30 of 40" in text, "goes on")
    _, _, code = run("train", "--out", folder, *TINY.split())
    verdict("train", code == 1, "keeps a folder in use")

# %% mistakes get one line
for args in (
    ["train", "--stepz", 3],
    ["train", "--channels", 130],
    ["train", "--corpus", "no-such-file"],
    ["train", "--depth", 12, "--channels", 64],
    ["train", "--resume", "no-such-run"],
    ["generate", "no-such-run"],
    ["bench", "--num-layers", "many"],
    ["bench", "--against", "nobody"],
):
    _, message, code = run(*args)
    print(code, message, end="")

# %% [markdown]
# ## Take away
#
# - A command is a function over the package; what it does, you can do in a
#   notebook.
# - The fields of a dataclass, with their help, are the options.
# - A user's mistake is one line on standard error and an exit code.

# %% [markdown]
# ## Design note
#
# Libraries such as click or typer build a command line from decorated
# functions, with colours and completion. `argparse` is in the standard
# library, starts in milliseconds and needs no dependency; and since our
# options come from dataclasses, the code that declares them is a loop of
# ten lines either way.

# %% [markdown]
# ## Exercises
#
# **1** (★). Which exit code does a shell see after a wrong option, after a
# missing file, and after Ctrl-C? Find the three places in the code above.
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# 2 from `_Parser.error`, 1 from the last line of `main`, and 130, which is
# 128 plus the number of the signal: from `_train` after it has saved, or
# from the `KeyboardInterrupt` in `main` when nothing was there to finish.
# :::

# %% exercise 1, checked tags=["hide-cell"]
codes = [run("info", "--layers", "x")[2], run("generate", "nothing")[2]]
verdict("exit codes", codes == [2, 1], "a wrong option, a missing file")

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("4.18")
