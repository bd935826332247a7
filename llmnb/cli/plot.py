# Written by `make export` from notebooks/4_practice/23_commands.py: edit that file.

"""`llmnb plot`: draw and compare runs."""

__all__ = [
    "DESCRIPTION",
    "PlotOptions",
    "add",
    "run",
]


# llmnb plot
from dataclasses import dataclass

from matplotlib import style

from llmnb.cli.options import add_options, option, say
from llmnb.files import replacing
from llmnb.train.watch import compare_runs, read_log, run_table

DESCRIPTION = (
    "Draw the losses, learning rates, gradient norms and speeds of runs in "
    "one picture, and print a table. A run may still be going on."
)


@dataclass
class PlotOptions:
    """What `llmnb plot` is told.

    Derived in chapter 4.23.
    """

    runs: str = option(
        None,
        "a run folder or a log.csv",
        positional=True,
        nargs="+",
        metavar="RUN",
    )
    out: str = option("runs.png", "the picture, a PNG", metavar="FILE")
    window: int = option(20, "steps in a running mean")


def add(parser):
    """Declare the options.

    Derived in chapter 4.23.
    """
    add_options(parser, PlotOptions)


def run(args):
    """Print the table and write the picture.

    Derived in chapter 4.23.
    """
    logs = {path: read_log(path) for path in args.runs}
    print(*run_table(logs), sep="\n")
    with style.context("default"), replacing(args.out) as file:
        compare_runs(logs, args.window).savefig(file, format="png")
    say("wrote", args.out)
