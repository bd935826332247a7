# Written by `make export` from notebooks/4_practice/26_bench.py: edit that file.

"""`llmnb bench`: measure a training step, alone or against others."""

__all__ = ["BenchOptions", "FILE", "NAMED", "OPTIONS", "run"]


# its options
import json
import re
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

from llmnb.bench.bench import CONFIGS, bench, bench_writers
from llmnb.bench.contest import kernel_contests
from llmnb.bench.ladders import ladder_named
from llmnb.bench.race import PEERS, Settings
from llmnb.bench.report import bars_figure, layers_figure, report
from llmnb.cli.options import GroupOptions, ThreadOptions, fields_of
from llmnb.cli.options import set_threads, some_of
from llmnb.config import GPT2Config
from llmnb.files import write_whole
from llmnb.train.drawing import save_figure
from llmnb.train.group import ALONE
from llmnb.train.options import DataOptions, ModelOptions, TrainConfig
from llmnb.train.options import option
from llmnb.train.terminal import progress_bar

NAMED = {"metavar": "NAME"}
FILE = {"metavar": "FILE"}


@dataclass
class BenchOptions:
    """What `llmnb bench` is told: who races, on what, and what is kept.

    Derived in chapter 4.26.
    """

    config: tuple = option((), f"{', '.join(CONFIGS)}, or several", **NAMED)
    precision: tuple = option(
        (),
        "what llmnb computes in (default: fp32 bf16, on a GPU fp32 tf32)",
        **NAMED,
    )
    against: tuple = option(
        (), f"{', '.join(PEERS)}, or llmc=PATH of llm.c's train_gpt2", **NAMED
    )
    torch_python: str = option(
        Settings().torch_python,
        "the Python that has torch (default: this one)",
        metavar="PATH",
    )
    steps: int = option(Settings().steps, "rounds to measure")
    turn: float = option(
        Settings().turn, "seconds of training in a turn of each, at least"
    )
    in_backward: bool = option(
        False, "let llmnb race once more, learning in its backward pass"
    )
    write: bool = option(
        False, "time tokens of a 124M model instead, against transformers"
    )
    kernels: str = option(
        None,
        "with --backend cuda: compare every version of these layers, or of "
        "all; without --config this alone",
        nargs="*",
        metavar="LAYER",
    )
    start: bool = option(
        False,
        "time the first step of fresh processes; without --config this alone",
    )
    total_batch: int = option(
        0, "of a group: tokens in an update; 0: one batch for each rank"
    )
    json: str = option(None, "write all numbers; - prints them", **FILE)
    plot: str = option(None, "draw where the time goes", **FILE)


OPTIONS = {
    "": fields(BenchOptions) + fields(GroupOptions) + fields(ThreadOptions),
    "the model, without --config": some_of(DataOptions, "vocab_size")
    + tuple(x for x in fields(ModelOptions) if x.name != "precision"),
}


# measure
def run(args):
    """Time training steps on random tokens.

    Tokens a second, memory, where the time goes. Every contestant has a
    process of its own; they take turns, and all are in memory at once. On a
    GPU each runs alone. Under mpirun or srun the group is measured instead:
    tokens a second, efficiency, and what each rank waits, sends and holds.

    Derived in chapter 4.26.
    """
    from llmnb.cli.together import in_group  # Part 6

    in_group(args, _run)


def _run(args, group):
    """Measure what is asked for, as one of a group; the first reports."""
    for path in filter(None, (args.json, args.plot)):
        if not Path(path).parent.is_dir():
            raise FileNotFoundError(f"there is no folder {Path(path).parent}")
    measure = _writers if args.write else _steps
    if group is not ALONE:
        measure = partial(_ranks, group)
    elif args.total_batch:
        raise ValueError("--total-batch is of a group: start it with mpirun")
    result = measure(args)
    print(_json(args, result) if args.json == "-" else report(result))
    if group.first:
        _keep(args, result)
    if args.plot:
        steps = "step" in [x["kind"] for x in result["contests"]]
        save_figure(args.plot, layers_figure if steps else bars_figure, result)


def _json(args, result):
    """A result as text, after the command that measured it."""
    return json.dumps({"command": _command(args.argv)} | result, indent=1)


def _keep(args, result):
    """Write a result, or what there is of it so far, if a file is wanted."""
    if args.json and args.json != "-":
        write_whole(args.json, _json(args, result).encode() + b"\n")


# measure steps and kernels
def _steps(args):
    gpu = args.backend == "cuda"
    if args.kernels is not None and not gpu:
        raise ValueError("--kernels needs a GPU: add --backend cuda")
    for layer in args.kernels or ():  # before minutes are spent on steps
        ladder_named(layer)
    settings = _settings(args, ("fp32", "tf32" if gpu else "bf16"))
    bar = partial(progress_bar, unit="round", leave=False)
    keep = partial(_keep, args)
    result = bench(_configs_of(args), settings, args.start, bar, keep)
    if args.kernels is not None:
        bar = partial(progress_bar, unit="layer", leave=False)
        result["contests"] += kernel_contests(args.kernels, bar=bar)
    return result


def _settings(args, precisions=("fp32",)):
    """The Settings of a command, with precisions if it names none."""
    _, *names, _ = Settings._fields  # a command has all patience
    options = {name: getattr(args, name) for name in names}
    return Settings(args.precision or precisions, **options)


# measure writing
_OF_STEPS = (
    "config", "precision", "against", "turn", "in_backward", "start", "plot",
)  # fmt: skip
_SHAPE = {"vocab_size", *(x.name for x in fields(ModelOptions))}
_OF_SHAPE = _SHAPE - {"backend", "precision"}


def _leave_out(args, names, why):
    """Raise ValueError for options that would change nothing."""
    found = [f"--{x.replace('_', '-')}" for x in args.given if x in names]
    if found:
        raise ValueError(f"{why}: leave out {', '.join(sorted(found))}")


def _writers(args):
    own = "--write has a model and a rival of its own, in float32, and no "
    _leave_out(args, {*_OF_STEPS, *_OF_SHAPE}, f"{own}picture")
    if args.backend != "cpu" or args.kernels is not None:
        raise ValueError("--write times the backend cpu alone")
    return bench_writers(GPT2Config(), settings=_settings(args))


# measure a group
_OF_ONE = (
    "against", "torch_python", "turn", "in_backward", "write", "kernels",
    "start", "plot",
)  # fmt: skip


def _ranks(group, args):
    from llmnb.bench.ranks import bench_group  # Part 6
    from llmnb.cli.together import check_command

    for name in _OF_ONE:
        if name in args.given:
            option = name.replace("_", "-")
            raise ValueError(
                f"--{option} is of one process: leave it out, or add "
                "--group none"
            )
    set_threads(args)
    check_command(args, group)
    configs = _configs_of(args)
    return bench_group(group, configs, _settings(args), args.total_batch)


# the configurations
def _configs_of(args):
    for name in args.config:
        if name not in CONFIGS:
            known = ", ".join(CONFIGS)
            raise ValueError(f"no config {name!r}: choose from {known}")
    if args.config or args.start or args.kernels is not None:
        own = "--config, --start and --kernels have shapes of their own"
        _leave_out(args, _OF_SHAPE, own)
        return {name: CONFIGS[name] for name in args.config}
    shape = fields_of(vars(args), ModelOptions) | {"precision": "fp32"}
    config = TrainConfig(**shape, vocab_size=args.vocab_size)
    cfg = config.model(config.vocab_size)
    return {"custom": (cfg, config.batch_size, config.seq_len)}


def _command(argv):
    """The command without the folders of this machine."""
    words = [re.sub(r"^([^=/\\]*=)?.*[/\\]", r"\1", x) for x in argv]
    return " ".join(["llmnb", *words])
