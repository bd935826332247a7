# Written by `make export` from notebooks/4_practice/14_folders.py: edit that file.

"""The losses of a run, drawn and saved as a figure."""

__all__ = ["draw_losses", "loss_figure", "save_figure", "smooth"]


# imports of drawing
import os

import numpy as np

from llmnb.files import replacing

_SMOOTH = 20  # steps in the running mean of the training loss


# a running mean
def smooth(points, window):
    """Running means of a column over `window` rows.

    points: an array (2, N) of steps and values. Returns such an array, of
    N - window + 1 columns; its steps are the windows' means too. A column
    shorter than the window comes back as it is.

    Derived in chapter 4.14.
    """
    if window < 1:
        raise ValueError(f"the window must be at least 1, got {window}")
    if points.shape[1] < window:
        return points
    sums = np.cumsum(np.pad(points, ((0, 0), (1, 0))), axis=1)
    return (sums[:, window:] - sums[:, :-window]) / window


# points of a curve
def points_of(rows, name):
    """Steps and values of a column, an array (2, N): where it has a value."""
    points = [(x["step"], x[name]) for x in rows if x[name] is not None]
    return np.array(points, float).reshape(-1, 2).T


# draw the losses
def draw_losses(ax, steps, landmarks):
    """Draw losses over steps into a matplotlib axes, with the landmarks.

    steps: list of `Step`. landmarks: dict from name to a loss, each drawn
    as a dashed line with its name.

    Derived in chapter 4.14.
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


# the figure
def loss_figure(steps, landmarks):
    """A matplotlib Figure of a run's losses; see `draw_losses`.

    Derived in chapter 4.14.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=100, layout="tight")
    draw_losses(figure.subplots(), steps, landmarks)
    return figure


def save_figure(path, draw, *data):
    """Write the Figure that `draw(*data)` makes, needing no display.

    path: its ending names the kind, such as .png, .pdf or .svg; without one
    it is a PNG. The user's own settings of matplotlib, such as fonts, are
    left aside. Raises ValueError for a kind that matplotlib does not write.

    Derived in chapter 4.14.
    """
    from matplotlib import style

    kind = os.path.splitext(path)[1][1:] or "png"
    with style.context("default"), replacing(path) as file:
        draw(*data).savefig(file, format=kind)
