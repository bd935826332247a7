# Written by `make export` from notebooks/4_practice/23_commands.py: edit that file.

"""Options of a command, from the fields of dataclasses."""

__all__ = [
    "Parser",
    "add_options",
    "add_threads",
    "check_backend",
    "fields_of",
    "one_line",
    "option",
    "say",
    "set_threads",
    "shape_config",
    "tell_compiling",
    "warn",
]


# imports of the options
import argparse
import os
import sys
import warnings
from dataclasses import field, fields

from llmnb.train.options import ModelOptions, TrainConfig


# one option
def option(default, text, **how):
    """A field of an option table: its default, its help, and how it is read.

    how: further arguments of argparse's add_argument, such as metavar and
    nargs; positional=True for what is named by its place.

    Derived in chapter 4.23.
    """
    return field(default=default, metadata={"help": text, **how})


# a table of options
def add_options(parser, table, names=None, asked=False):
    """One option for each field of a dataclass, or for those in names.

    asked: leave out of the result what the user has not asked for.

    Derived in chapter 4.23.
    """
    for x in fields(table):
        if names and x.name not in names:
            continue
        how = _how(x)
        if asked:
            how["default"] = argparse.SUPPRESS
        name = "--" + x.name.replace("_", "-")
        if how.pop("positional", False):
            name = x.name
        parser.add_argument(name, **how)


def _how(x):
    """argparse's words for a field."""
    how = {"default": x.default} | x.metadata
    many = isinstance(x.default, tuple)
    shown = " ".join(x.default) if many else x.default
    if shown not in ("", None) and "(default" not in how["help"]:
        how["help"] += f" (default: {shown})"
    if x.type is bool:
        return how | {"action": "store_true"}
    if many:
        return {"nargs": "+", "metavar": x.name.upper()} | how
    return {"type": x.type, "metavar": x.type.__name__} | how


# fields from options
def fields_of(args, table):
    """The fields of a table that are among the options: a dict.

    Derived in chapter 4.23.
    """
    names = [x.name for x in fields(table) if hasattr(args, x.name)]
    values = {name: getattr(args, name) for name in names}
    return {k: tuple(v) if type(v) is list else v for k, v in values.items()}


# the number of threads
def add_threads(parser):
    """The option --threads, of the kernels.

    Derived in chapter 4.23.
    """
    parser.add_argument(
        "--threads", type=int, metavar="int",
        help="threads of the kernels (default: one for each core)",
    )  # fmt: skip


def set_threads(args):
    """Do what --threads says.

    Derived in chapter 4.23.
    """
    import numba

    if args.threads is not None:
        numba.set_num_threads(args.threads)


# is the GPU there
def check_backend(name):
    """Refuse a GPU that is not there, unless the simulator is asked for.

    Derived in chapter 4.23.
    """
    if name != "cuda":
        return
    from llmnb.cuda.model import no_gpu

    if no_gpu():
        raise ValueError(
            f"no backend cuda here: {no_gpu()}; LLMNB_CUDA=simulator runs "
            "small models without a GPU"
        )


# say what the wait is for
def tell_compiling(backend):
    """Announce that kernels will be compiled, if none have been yet.

    Derived in chapter 4.23.
    """
    if backend != "cpu":
        return
    from llmnb.cpu.compiled import cache_folder

    folder, often = cache_folder(), "once"
    if folder is None:
        often = "each time, for want of a folder to keep them: set LLMNB_CACHE"
    elif any(folder.iterdir()):
        return
    text = f"llmnb: compiling kernels takes up to half a minute, {often}"
    print(text, file=sys.stderr, flush=True)


# the model of some options
def shape_config(args):
    """The TrainConfig that the options of a model's shape make.

    Derived in chapter 4.23.
    """
    names = {x.name for x in fields(ModelOptions)} - {"precision"}
    shape = {name: getattr(args, name) for name in names}
    return TrainConfig(**shape, vocab_size=args.vocab_size)


# lines of a report
def say(label, text):
    """Print a line of a report.

    Derived in chapter 4.23.
    """
    print(f"{label:<10} {text}", flush=True)


# errors in one line
class Parser(argparse.ArgumentParser):
    """A parser whose errors take one line instead of the whole usage.

    Derived in chapter 4.23.
    """

    def __init__(self, *args, **how):
        super().__init__(*args, **how)
        self.color = False  # the escapes that Python 3.14 would send

    def error(self, message):
        """Exit with status 2 and one line on standard error."""
        self.exit(2, f"{self.prog}: error: {message} (try --help)\n")


def one_line(error):
    """What an error says, in one line.

    Derived in chapter 4.23.
    """
    text = str(error)
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    return " ".join(text.split()) or type(error).__name__


def warn(message, *where):
    """Show a warning in one line, as an error is shown; above any bar.

    Derived in chapter 4.23.
    """
    from tqdm import tqdm

    tqdm.write(f"llmnb: warning: {one_line(message)}", file=sys.stderr)
