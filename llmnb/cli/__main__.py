# Written by `make export` from notebooks/4_practice/23_commands.py: edit that file.

"""The `llmnb` command: which commands there are, and what an error looks like."""

__all__ = [
    "COMMANDS",
    "USER_ERRORS",
    "main",
]


# imports of the command
import importlib
import os
import sys
import warnings
from importlib.metadata import version

from llmnb.cli.options import Parser, one_line, warn
from llmnb.train.terminal import screens


# the commands
COMMANDS = {
    "train": "train a GPT-2 and write a run folder",
    "generate": "continue a prompt",
    "data": "turn text into token shards",
    "eval": "measure a model on a text or on HellaSwag",
    "plot": "draw and compare runs",
    "fetch": "download a published model",
    "verify": "run llm.c's acceptance test",
    "bench": "measure a training step, alone or against others",
    "info": "versions, threads, and the size of a model",
}


def _parser(argv):
    """The parser, which knows the options of the command in argv."""
    parser = Parser("llmnb", description="Train GPT-2 and write with it.")
    parser.add_argument(
        "--version", action="version", version=f"llmnb {version('llmnb')}"
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    asked = next((word for word in argv if word[:1] != "-"), None)
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if name == asked:
            module = importlib.import_module(f"llmnb.cli.{name}")
            command.description = module.DESCRIPTION
            module.add(command)
            command.set_defaults(run=module.run)
    return parser


# run it
USER_ERRORS = (
    ValueError,
    TypeError,
    OSError,
    ArithmeticError,
    MemoryError,
    ImportError,  # of an extra that is not installed
)


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
        args = _parser(argv).parse_args(argv)
        try:
            with warnings.catch_warnings():
                warnings.showwarning = warn
                args.run(args)
        except KeyboardInterrupt:
            sys.exit(130)
        except USER_ERRORS as error:
            if "LLMNB_TRACEBACK" in os.environ:
                raise
            print(f"llmnb: error: {one_line(error)}", file=sys.stderr)
            sys.exit(1)


if __name__ == "__main__":
    main()
