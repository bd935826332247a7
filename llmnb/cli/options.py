# Written by `make export` from notebooks/4_practice/23_commands.py: edit that file.

"""Options of a command, from the fields of dataclasses."""

__all__ = [
    "GroupOptions", "Parser", "ThreadOptions", "add_options", "check_backend",
    "fields_of", "let_first_speak", "one_line", "remark", "say",
    "set_threads", "some_of", "tell_compiling", "typed", "warn",
    "with_defaults",
]


# imports of the options
import argparse
import shlex
import sys
import time
from dataclasses import dataclass, fields
from itertools import chain

from llmnb.train.options import option


# tables of options
def some_of(table, *names):
    """The fields of an option table that have one of these names.

    Derived in chapter 4.23.
    """
    return tuple(x for x in fields(table) if x.name in names)


def add_options(parser, options):
    """One option for each field in `OPTIONS`, a command's.

    Derived in chapter 4.23.
    """
    for heading, group in options.items():
        place = parser.add_argument_group(heading) if heading else parser
        for x in group:
            how = _how(x)
            if how.pop("positional", False):
                place.add_argument(x.name, **how)
                continue
            # a name that Python keeps for itself ends in _
            dashed = "--" + x.name.rstrip("_").replace("_", "-")
            place.add_argument(dashed, dest=x.name, **how)


def _how(x):
    """argparse's words for a field."""
    how = {"help": x.metadata["help"]} | x.metadata["how"]
    many = x.type is tuple
    shown = " ".join(x.default or ()) if many else x.default
    if shown not in ("", None) and "(default" not in how["help"]:
        how["help"] += f" (default: {shown})"
    if x.type is bool:
        return how | {"action": "store_true"}
    if many:
        return {"nargs": "+", "metavar": x.name.upper()} | how
    return {"type": x.type, "metavar": x.type.__name__} | how


# what was asked for, and the rest
def with_defaults(asked, options):
    """The values of all options, a Namespace.

    asked: a Namespace of those that were asked for, kept as `given`, a dict.
    Several values come as a tuple.

    Derived in chapter 4.23.
    """
    found = vars(asked).items()
    given = {k: tuple(v) if type(v) is list else v for k, v in found}
    defaults = {x.name: x.default for x in chain(*options.values())}
    return argparse.Namespace(**defaults | given, given=given)


def fields_of(values, table):
    """Those of some values, a dict, that are fields of a table.

    Derived in chapter 4.23.
    """
    names = {x.name for x in fields(table)}
    return {name: x for name, x in values.items() if name in names}


# the number of threads
@dataclass
class ThreadOptions:
    """How many threads the kernels have.

    Derived in chapter 4.23.
    """

    threads: int = option(
        None, "threads of the kernels (default: one for each core)"
    )


def set_threads(args):
    """Do what --threads says.

    Derived in chapter 4.23.
    """
    import numba

    most = numba.config.NUMBA_NUM_THREADS
    if args.threads is None:
        return
    if not 1 <= args.threads <= most:
        raise ValueError(
            f"threads must lie in [1, {most}], as many as there are cores, "
            f"got {args.threads}"
        )
    numba.set_num_threads(args.threads)


# several processes
@dataclass
class GroupOptions:
    """Whether a command shares its work with other processes.

    Derived in chapter 4.23.
    """

    group: str = option(
        "", "processes that share the work: none, mpi, or nccl, which is MPI "
        "with NCCL between GPUs (default: if mpirun or srun has launched "
        "several, mpi, and nccl on GPUs)",
    )  # fmt: skip


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
    elif any(folder.glob("*.kernel")):
        return
    remark(f"llmnb: compiling kernels takes up to half a minute, {often}")


# lines of a report
def say(label, text):
    """Print a line of a report.

    Derived in chapter 4.23.
    """
    print(f"{label:<10} {text}", flush=True)


def remark(*lines):
    """Print lines beside the report, on standard error.

    Derived in chapter 4.23.
    """
    print(*lines, sep="\n", file=sys.stderr, flush=True)


def typed(path):
    """A Path as one word of a shell's line, whatever is in its name.

    Derived in chapter 4.23.
    """
    return shlex.quote(path.as_posix())


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
        let_first_speak()
        self.exit(2, f"{self.prog}: error: {message} (try --help)\n")


def let_first_speak():
    """Wait, unless this is the first of several: its end ends all.

    Derived in chapter 4.23.
    """
    from llmnb.train.machines import RANKS, launched  # Part 6

    time.sleep(min(2 * launched(RANKS, 0), 6))


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
