# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       train.watch: "Runs watched and compared: their logs, in pictures and tables."
#       train.terminal: "What a terminal is told, whatever it is."
# ---

# %% [markdown]
# # Watching: see a run from outside
#
# > A log that can be read at any moment, runs in one picture, and streams
# > that may break without breaking the training.
#
# *Reading time: 18 minutes. You need: the log of a run from
# [chapter 4.16](16_resume.ipynb).*

# %% [markdown]
# ## Where we are
#
# A run writes its numbers to a file and its words to a terminal. Both may be
# read while it goes on, and both may fail: a row may be half written, a
# terminal may be closed. At the end of this chapter you can
#
# - watch a run, and lay several over one another;
# - say which row of a log to believe;
# - list what can go wrong between a program and its terminal, and what
#   training does about each.

# %% [markdown]
# ## Setup

# %% setup
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt

from llmnb.book.verify import verdict

plt.switch_backend(plt.get_backend())  # shows figures made without pyplot

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

from llmnb.files import package
from llmnb.train.drawing import points_of, smooth
from llmnb.train.log import read_rows


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
    names, rows, wrong = read_rows(path)
    for line, why in wrong[:1]:
        raise ValueError(f"{path}, line {line}: {why}")
    return {name: points_of(rows, name) for name in names[1:]}


# %% [markdown]
# To compare runs, their curves belong into one picture. The losses of single
# batches scatter, and the running mean of [chapter 4.14](14_folders.ipynb) is
# drawn over them; its window is the number of steps that you choose.


# %% runs in one picture tags=["export"] module="train.watch"
_NONE = np.empty((2, 0))  # a column without a value
_PANELS = {
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
    for ax, (name, label) in zip(axes, _PANELS.items(), strict=True):
        for number, (run, log) in enumerate(logs.items()):
            points, colour = log.get(name, _NONE), f"C{number % 10}"
            # a rate is chosen, not measured: nothing scatters
            mean = smooth(points, 1 if name == "learning_rate" else window)
            ax.plot(*mean, color=colour, label=run)
            if name == "loss":
                ax.plot(*log.get("val_loss", _NONE), "o", color=colour, ms=4)
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


# %% runs in one table tags=["export"] module="train.watch"
def run_table(logs):
    """Lines of text: a row a run, with steps, losses and speed.

    logs: as for `compare_runs`. The best loss is the lowest of the
    validations, the last one the latest.
    """
    runs = [" ".join(run.split()) for run in logs]  # each in one line
    wide = max(map(len, ["run", *runs]))
    lines = [
        f"{'run':<{wide}}  {'steps':>7} {'last val':>9} {'best val':>9} "
        f"{'tokens/s':>9}"
    ]
    for run, log in zip(runs, logs.values(), strict=True):
        names = "loss", "val_loss", "tokens_per_second"
        losses, val, speed = (log.get(name, _NONE)[1] for name in names)
        last, best = (val[-1], val.min()) if len(val) else (np.nan, np.nan)
        middle = np.median(speed) if len(speed) else np.nan
        lines.append(
            f"{run:<{wide}}  {len(losses):7,} {last:9.4f} {best:9.4f} "
            f"{middle:9,.0f}"
        )
    return lines


# %% [markdown]
# We make up two runs to try it: the second learns twice as fast, and in both
# logs the line of the last row has no end, so that row does not count.


# %% two runs, made up
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
# *Figure 4.17.1. Two runs in one picture. Lines are running means over 20
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
        event, summary, writer = (
            package(name, "tensorboard", "TensorBoard")
            for name in (
                "tensorboard.compat.proto.event_pb2",
                "tensorboard.compat.proto.summary_pb2",
                "tensorboard.summary.writer.event_file_writer",
            )
        )
        self._event, self._summary = event.Event, summary.Summary
        self._file = writer.EventFileWriter(str(folder))

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
# So `main`, which begins every command ([chapter 4.23](23_commands.ipynb)), puts a
# small object before each of the two streams, and no command needs to know.

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
# A terminal that knows ASCII only is sent a command to clear its screen, and two
# letters that it lacks. Then a result goes to a reader who has left: the command ends,
# unless it trains.

# %% what a terminal gets, and who goes on
import io
from contextlib import redirect_stderr


class Terminal(io.TextIOWrapper):
    def isatty(self):
        return True


class Closed(io.StringIO):
    def write(self, text):
        raise BrokenPipeError


def loses(stream, ends):
    """The exit code and the words of a command that loses its output."""
    screen, said, code = Screen(stream, result=True), io.StringIO(), None
    screen.ends = ends
    with redirect_stderr(said):
        try:
            screen.write("a result\n")
        except SystemExit as error:
            code = error.code
    return code, said.getvalue()


raw = io.BytesIO()
ascii_only = Terminal(raw, "ascii", newline="\n", write_through=True)
Screen(ascii_only).write("naïve 中 \x1b[2J\n")
print(raw.getvalue().decode(), end="")
clean = raw.getvalue() == rb"na\xefve \u4e2d \x1b[2J" + b"\n"
verdict("a terminal", clean, "gets escapes")
pipe = loses(Closed(), True), loses(Closed(), False)
verdict("a closed pipe", pipe == ((141, ""), (None, "")), "no word of it")

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
_QUIET = 60  # seconds between two lines
_LINE = (
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


def progress_bar(work=None, **how):
    """A tqdm over work, on standard error: a bar, or lines in a file.

    how: more of tqdm's arguments. Where standard error is no terminal, a
    line comes each minute, and whenever the bar is asked to refresh.
    """
    from tqdm import tqdm

    if sys.stderr.isatty():
        return tqdm(work, dynamic_ncols=True, **how)
    how |= {"leave": False, "delay": _QUIET, "bar_format": _LINE}
    times = {"mininterval": _QUIET, "maxinterval": _QUIET}
    return tqdm(work, file=_Lines(), **times, **how)


# %% [markdown]
# ## Take away
#
# - The last row of a log counts only when its line has ended.
# - A picture of several runs says more than any of them: the same axes, the
#   same running mean.
# - A stream that fails must not stop a command whose result is elsewhere.
#
# ## Exercises
#
# **1** (★). Losses of 4, 2 and 6 at the steps 0, 1 and 2, and a running mean
# over two steps: where are its points, and how high?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# At the steps 0.5 and 1.5, at 3 and 4: the steps are averaged like the losses,
# so that a point stands in the middle of what it is the mean of.
# :::

# %% exercise 1, checked tags=["hide-cell"]
means = smooth(np.array([[0.0, 1.0, 2.0], [4.0, 2.0, 6.0]]), 2)
print(means.tolist())
verdict(
    "running mean", means.tolist() == [[0.5, 1.5], [3, 4]], "in the middle"
)

# %% [markdown]
# **2** (★★). The disk is full. What do `llmnb generate > sample.txt` and
# `llmnb train > words.txt` say on standard error, and with which exit code do they
# end?
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# The first says in one line that there is an error, and ends with 1: its text is
# lost. The second says in one line that there is a warning, and trains on.
# :::


# %% exercise 2, a full disk tags=["hide-cell"]
class Full(io.StringIO):
    def write(self, text):
        raise OSError(28, "No space left on device")


# %% exercise 2, checked
writes, trains = loses(Full(), True), loses(Full(), False)
print(writes[1] + trains[1], end="")
verdict("generate", writes[0] == 1 and "error" in writes[1], "ends")
verdict("train", trains[0] is None and "warning" in trains[1], "goes on")

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("4.17")
