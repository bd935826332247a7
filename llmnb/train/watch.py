# Written by `make export` from notebooks/4_practice/17_watching.py: edit that file.

"""Runs watched and compared: their logs, in pictures and tables."""

__all__ = ["Board", "compare_runs", "read_log", "run_table"]


# imports of the watcher
import time
from pathlib import Path

import numpy as np

from llmnb.files import package
from llmnb.train.drawing import points_of, smooth
from llmnb.train.log import read_rows


# read a log
def read_log(path):
    """The columns of a run's log, by name.

    path: a log.csv, or the folder of a run. Returns a dict from a column's
    name to an array (2, N) of float64: steps, and the values that the
    column has at them; N is 0 for an empty column. A last row without a
    line's end is left out. Raises OSError, or ValueError with the file's
    name and the line that is no row of numbers.

    Derived in chapter 4.17.
    """
    path = Path(path)
    path = path / "log.csv" if path.is_dir() else path
    names, rows, wrong = read_rows(path)
    for line, why in wrong[:1]:
        raise ValueError(f"{path}, line {line}: {why}")
    return {name: points_of(rows, name) for name in names[1:]}


# runs in one picture
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

    Derived in chapter 4.17.
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


# names as they are
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


# runs in one table
def run_table(logs):
    """Lines of text: a row a run, with steps, losses and speed.

    logs: as for `compare_runs`. The best loss is the lowest of the
    validations, the last one the latest.

    Derived in chapter 4.17.
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


# events for TensorBoard
class Board:
    """Writes numbers into a folder that TensorBoard watches.

    folder: where the file of events goes. Raises ImportError, in one
    sentence, when the package tensorboard is not installed.

    Derived in chapter 4.17.
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
