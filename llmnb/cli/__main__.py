# Written by `make export` from notebooks/4_practice/23_commands.py: edit that file.

"""The `llmnb` command: which commands there are, and what an error looks like."""

__all__ = ["COMMANDS", "USER_ERRORS", "main"]


# imports of the command
import argparse
import importlib
import inspect
import os
import sys
import warnings
from importlib.metadata import version

from llmnb.cli.options import Parser, add_options, let_first_speak
from llmnb.cli.options import one_line, remark, warn, with_defaults
from llmnb.train.terminal import screens


# the commands
COMMANDS = {
    "train": "train a GPT-2 and write a run folder",
    "generate": "continue a prompt",
    "chat": "talk with a model",
    "data": "turn text into token shards",
    "eval": "measure a model on a text or on HellaSwag",
    "plot": "draw and compare runs",
    "fetch": "download a published model",
    "verify": "run llm.c's acceptance test",
    "bench": "measure a training step, alone or against others",
    "info": "versions, threads, and the size of a model",
}


def _parsed(argv):
    """The command in argv, a module, and the values of its options."""
    parser = Parser("llmnb", description="Train GPT-2 and write with it.")
    parser.add_argument(
        "--version", action="version", version=f"llmnb {version('llmnb')}"
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    asked = next((word for word in argv if word[:1] != "-"), None)
    for name, text in COMMANDS.items():
        command = commands.add_parser(
            name, help=text, argument_default=argparse.SUPPRESS
        )
        if name == asked:
            module = importlib.import_module(f"llmnb.cli.{name}")
            about, _, _ = inspect.getdoc(module.run).partition("\n\nDerived")
            command.description = about
            add_options(command, module.OPTIONS)
    values = parser.parse_args(argv)  # or exit
    return module, with_defaults(values, module.OPTIONS)


# run it
USER_ERRORS = (
    ValueError, TypeError, OSError, ArithmeticError, MemoryError,
    ImportError,  # of an extra that is not installed
)  # fmt: skip


def main(argv=None):
    """Run the `llmnb` command; argv defaults to the process's arguments.

    Exits with code 2 for a wrong option and 1 for an error that the user
    can mend, each in one line on stderr; with 130 when interrupted, 143 or
    129 when training was ended by SIGTERM or SIGHUP, and 141 when the
    reader of stdout has gone away, which does not end training. When the
    variable LLMNB_TRACEBACK is set, errors keep their traceback.

    Derived in chapter 4.23.
    """
    with screens():
        argv = sys.argv[1:] if argv is None else argv
        try:
            command, args = _parsed(argv)  # imports, which take a second
            args.argv = argv
            with warnings.catch_warnings():
                warnings.showwarning = warn
                command.run(args)
        except KeyboardInterrupt:
            sys.exit(130)
        except USER_ERRORS as error:
            if "LLMNB_TRACEBACK" in os.environ:
                raise
            let_first_speak()
            remark(f"llmnb: error: {one_line(error)}")
            sys.exit(1)


if __name__ == "__main__":
    main()
