# Written by `make export` from notebooks/4_practice/23_commands.py: edit that file.

"""`llmnb plot`: draw and compare runs."""

__all__ = ["OPTIONS", "PlotOptions", "run"]


# llmnb plot
from dataclasses import dataclass, fields

from llmnb.cli.options import say
from llmnb.train.drawing import save_figure
from llmnb.train.options import option
from llmnb.train.watch import compare_runs, read_log, run_table


@dataclass
class PlotOptions:
    """What `llmnb plot` is told.

    Derived in chapter 4.23.
    """

    runs: tuple = option(
        (), "a run folder or a log.csv", positional=True, metavar="RUN"
    )
    out: str = option("runs.png", "a .png, .pdf or .svg", metavar="FILE")
    window: int = option(20, "steps in a running mean")


OPTIONS = {"": fields(PlotOptions)}


def run(args):
    """Draw runs in one picture, and print a table.

    Losses, learning rates, gradient norms and speeds. A run may still be
    going on.

    Derived in chapter 4.23.
    """
    logs = {path: read_log(path) for path in args.runs}
    print(*run_table(logs), sep="\n")
    save_figure(args.out, compare_runs, logs, args.window)
    say("wrote", args.out)
