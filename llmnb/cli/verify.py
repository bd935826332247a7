# Written by `make export` from notebooks/4_practice/23_commands.py: edit that file.

"""`llmnb verify`: run llm.c's acceptance test."""

__all__ = ["OPTIONS", "VerifyOptions", "run"]


# llmnb verify
import sys
from dataclasses import dataclass, fields

from llmnb.cli.options import ThreadOptions, check_backend, remark
from llmnb.cli.options import set_threads, tell_compiling
from llmnb.formats.starter import accept
from llmnb.train.options import option


@dataclass
class VerifyOptions:
    """What `llmnb verify` is told.

    Derived in chapter 4.23.
    """

    folder: str = option(
        None, "the starter pack", positional=True, metavar="FOLDER"
    )
    backend: str = option("cpu", "cpu, cuda or reference", metavar="NAME")


OPTIONS = {"": fields(VerifyOptions) + fields(ThreadOptions)}


# a table of verdicts
_VERDICTS = {True: "ok", False: "FAIL", None: "no reference"}


def run(args):
    """Compare a model with what PyTorch recorded, and print the verdicts.

    Logits, loss, gradients and ten losses, in a folder with NAME.bin and
    NAME_debug_state.bin, such as llm.c's starter pack. Exits with 1 if a
    check fails.

    Derived in chapter 4.23.
    """
    check_backend(args.backend)
    set_threads(args)
    checks = accept(args.folder, args.backend)
    tell_compiling(args.backend)
    row = "{:<10} {:>8} {:>8}  {}".format
    shown, bad = 0, 0
    for check in checks:
        if not shown:
            print(row("", "error", "allowed", ""))
        error = "-" if check.error is None else f"{check.error:.1e}"
        allowed = f"{check.allowed:.0e}"
        print(row(check.name, error, allowed, _VERDICTS[check.ok]), flush=True)
        shown, bad = shown + 1, bad + (check.ok is False)
    if bad:
        remark(f"{bad} of {shown} checks failed")
        sys.exit(1)
