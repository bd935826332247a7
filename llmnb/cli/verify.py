# Written by `make export` from notebooks/4_practice/23_commands.py: edit that file.

"""`llmnb verify`: run llm.c's acceptance test."""

__all__ = [
    "DESCRIPTION",
    "VERDICTS",
    "VerifyOptions",
    "add",
    "run",
]


# llmnb verify
import sys
from dataclasses import dataclass

from llmnb.cli.options import (
    add_options,
    add_threads,
    check_backend,
    option,
    set_threads,
    tell_compiling,
)
from llmnb.formats.starter import accept

DESCRIPTION = (
    "Compare logits, loss, gradients and ten losses with what PyTorch "
    "recorded, in a folder with NAME.bin and NAME_debug_state.bin, such as "
    "llm.c's starter pack."
)


@dataclass
class VerifyOptions:
    """What `llmnb verify` is told.

    Derived in chapter 4.23.
    """

    folder: str = option(
        None, "the starter pack", positional=True, metavar="FOLDER"
    )
    backend: str = option("cpu", "cpu, cuda or reference", metavar="NAME")


def add(parser):
    """Declare the options.

    Derived in chapter 4.23.
    """
    add_options(parser, VerifyOptions)
    add_threads(parser)


# a table of verdicts
VERDICTS = {True: "ok", False: "FAIL", None: "no reference"}


def run(args):
    """Print each check as it is made; exit with 1 if one fails.

    Derived in chapter 4.23.
    """
    check_backend(args.backend)
    set_threads(args)
    tell_compiling(args.backend)
    row = "{:<10} {:>8} {:>8}  {}".format
    shown, bad = 0, 0
    for check in accept(args.folder, args.backend):
        if not shown:
            print(row("", "error", "allowed", ""))
        error = "-" if check.error is None else f"{check.error:.1e}"
        allowed = f"{check.allowed:.0e}"
        print(row(check.name, error, allowed, VERDICTS[check.ok]), flush=True)
        shown, bad = shown + 1, bad + (check.ok is False)
    if bad:
        print(f"{bad} of {shown} checks failed", file=sys.stderr)
        sys.exit(1)
