# Written by `make export` from notebooks/3_gpu/01_threads.py: edit that file.

"""Draw which thread owns which element."""

__all__ = ["draw_owners"]


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
