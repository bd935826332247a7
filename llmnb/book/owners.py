# Written by `make export` from notebooks/3_gpu/01_threads.py: edit that file.

"""Which thread owns which element, drawn and stepped through."""

__all__ = ["draw_owners", "walk"]


# imports of the picture
from matplotlib.patches import Rectangle

from llmnb.book.diagram import PALETTE


# the owners of elements
def draw_owners(ax, who, title="", group=None, rows="", cols=""):
    """Draw a matrix of which each element bears the number of its owner.

    ax: matplotlib's axes. who: a list of rows of ints, threads, warps or
    blocks; a negative number stands for nobody. group: how many owners have
    one colour, such as 32 for threads that are coloured by warp; None gives
    each its own. rows, cols: what the two directions are.

    Derived in chapter 3.1.
    """
    colours = [PALETTE[k] for k in ("blue", "orange", "green", "yellow")]
    for i, row in enumerate(who):
        for j, owner in enumerate(row):
            colour = colours[owner // (group or 1) % len(colours)]
            box = Rectangle((j, i), 1, 1, fc=colour, ec="white", alpha=0.45)
            if owner >= 0:
                ax.add_patch(box)
                ax.text(j + 0.5, i + 0.5, owner, ha="center", va="center")
    ax.set(xlim=(0, len(who[0])), ylim=(len(who), 0), title=title)
    ax.set(xticks=[], yticks=[], xlabel=cols, ylabel=rows, aspect="equal")


# imports of the steps
import inspect
import math
import textwrap

import numpy as np

from llmnb.gpu.simulator import Film, placed, simulate, watch


# the steps of a kernel
def _filmed(kernel, blocks, threads, args, together):
    """A film of a launch on copies of its arguments."""
    film = Film(together)
    copies = [placed(a, 16) if isinstance(a, np.ndarray) else a for a in args]
    with watch(film=film):
        simulate(kernel, blocks, threads, copies)
    return film


def _held(values):
    """Numbers as JSON has them: None for what nobody has written."""
    return [None if math.isnan(x) else round(x, 4) for x in values]


def _rows(film):
    """The steps of a film, a list for each."""
    return [
        [s.moment, s.block, s.thread, s.kind, s.function, s.line, s.array,
         s.first, _held(s.values), s.rival]
        for s in film.steps
    ]  # fmt: skip


# a walk through a kernel
def walk(name, kernel, blocks, threads, args, group=1):
    """The steps of a launch, in two orders, for a figure that moves.

    As `simulate` takes its arguments; the arrays in args stay as they are.
    group: how many threads of a block have one colour, in a grid of one.

    Derived in chapter 3.1.
    """
    kernel = getattr(kernel, "function", kernel)
    launch = kernel, blocks, threads, args
    films = {
        "together": _filmed(*launch, True),
        "alone": _filmed(*launch, False),
    }
    codes = films["alone"].codes.items()
    return {
        "name": name,
        "block": math.prod(threads) if isinstance(threads, tuple) else threads,
        "group": group,
        "main": kernel.__code__.co_name,
        "code": {x: textwrap.dedent(inspect.getsource(c)) for x, c in codes},
        "steps": {order: _rows(film) for order, film in films.items()},
        "arrays": {
            name: [*a.shape, _held(a.ravel().tolist())]
            for name, a in zip(
                inspect.signature(kernel).parameters, args, strict=True
            )
            if isinstance(a, np.ndarray)
        },
    }
