# Written by `make export` from notebooks/4_practice/23_commands.py: edit that file.

"""A command run from a notebook's cell, and a run that takes seconds."""

__all__ = ["TINY", "run_command"]


# imports of the cell
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

from llmnb.cli.__main__ import main


# run a command
def run_command(*args):
    """What a command prints, on standard error too, and its exit code.

    Derived in chapter 4.23.
    """
    out, err, code = StringIO(), StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main([str(x) for x in args])
        except SystemExit as stop:
            code = stop.code
    return out.getvalue(), err.getvalue(), code


TINY = (  # options of a run
    "--tokenizer byte --limit 100000 --num-layers 1 --channels 32 "
    "--num-heads 2 --seq-len 32 --batch-size 4 --steps 30"
)
