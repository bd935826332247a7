# Written by `make export` from notebooks/4_practice/26_bench.py: edit that file.

"""`llmnb bench`: measure a training step, alone or against others."""

__all__ = [
    "BenchOptions",
    "DESCRIPTION",
    "add",
    "run",
]


# its options
import json
import re
import sys
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

from llmnb.bench.bench import (
    CONFIGS,
    bench,
    bench_writers,
    layers_figure,
    report,
    writers_report,
)
from llmnb.bench.contest import contest, contest_report, ladders_figure
from llmnb.bench.race import Settings
from llmnb.cli.options import (
    add_options,
    add_threads,
    option,
    shape_config,
)
from llmnb.config import GPT2Config
from llmnb.files import replacing
from llmnb.train.terminal import progress
from llmnb.train.options import DataOptions, ModelOptions

DESCRIPTION = (
    "Time training steps on random tokens: tokens a second, memory, where "
    "the time goes. Every contestant has a process of its own; they take "
    "turns, and all are in memory at once."
)


@dataclass
class BenchOptions:
    """What `llmnb bench` is told: who races, on what, and what is kept.

    Derived in chapter 4.26.
    """

    config: tuple = option(
        (),
        "small, 124m-64, 124m-256, 124m-1024, 124m-16x1024, or several",
        metavar="NAME",
    )
    precision: tuple = option(
        (),
        "what llmnb computes in (default: fp32 bf16, on a GPU fp32 tf32)",
        metavar="NAME",
    )
    against: tuple = option(
        (),
        "torch, torch-compile, torch-bf16, torch-tf32, torch-compile-tf32, "
        "or llmc=PATH of llm.c's train_gpt2",
        metavar="NAME",
    )
    torch_python: str = option(
        sys.executable,
        "the Python that has torch (default: this one)",
        metavar="PATH",
    )
    steps: int = option(10, "steps of each to measure")
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
    json: str = option(
        None, "write all numbers; - prints them", metavar="FILE"
    )
    plot: str = option(
        None, "draw where the time goes, as a PNG", metavar="FILE"
    )


def add(parser):
    """Declare the options.

    Derived in chapter 4.26.
    """
    add_options(parser, BenchOptions)
    add_threads(parser)
    shape = parser.add_argument_group("the model, without --config")
    add_options(shape, DataOptions, ["vocab_size"])
    names = [x.name for x in fields(ModelOptions) if x.name != "precision"]
    add_options(shape, ModelOptions, names)


# measure
def run(args):
    """Measure, print a report, and write what is asked for.

    Derived in chapter 4.26.
    """
    for path in filter(None, (args.json, args.plot)):
        if not Path(path).parent.is_dir():
            raise FileNotFoundError(f"there is no folder {Path(path).parent}")
    (_bench_writers if args.write else _bench_steps)(args)


def _bench_steps(args):
    gpu = args.backend == "cuda"
    if args.kernels is not None and not gpu:
        raise ValueError("--kernels needs a GPU: add --backend cuda")
    precisions = args.precision or ["fp32", "tf32" if gpu else "bf16"]
    settings = Settings(
        tuple(precisions), tuple(args.against), args.steps,
        args.threads, args.backend, args.torch_python,
    )  # fmt: skip
    bar = partial(progress, unit="round", leave=False)
    configs = _configs_of(args)
    result = bench(configs, settings, args.start, bar)
    result = {"command": _command(sys.argv[1:]), **result}
    words = [report(result)]
    if args.kernels is not None:
        kernels = contest(args.kernels, bar=partial(bar, unit="layer"))
        words.append(contest_report(kernels))
        result |= kernels
    as_json = json.dumps(result, indent=1)
    print(as_json if args.json == "-" else "\n\n".join(words))
    _write_result(args, result)


# measure writing
def _bench_writers(args):
    if args.config or args.against or args.plot:
        raise ValueError(
            "--write has a model and a rival of its own, and no picture: "
            "leave out --config, --against and --plot"
        )
    if args.backend != "cpu" or args.kernels is not None:
        raise ValueError("--write times the backend cpu alone")
    how = {"threads": args.threads, "python": args.torch_python}
    result = bench_writers(GPT2Config(), rounds=args.steps, **how)
    result = {"command": _command(sys.argv[1:]), **result}
    as_json = json.dumps(result, indent=1)
    print(as_json if args.json == "-" else writers_report(result))
    _write_result(args, result)


# write the files
def _write_result(args, result):
    draw = layers_figure if result.get("configs") else ladders_figure
    if args.json and args.json != "-":
        with replacing(args.json) as file:
            file.write(json.dumps(result, indent=1).encode() + b"\n")
    if args.plot:
        from matplotlib import style

        with style.context("default"), replacing(args.plot) as file:
            draw(result).savefig(file, format="png")


# the configurations
def _configs_of(args):
    for name in args.config:
        if name not in CONFIGS:
            known = ", ".join(CONFIGS)
            raise ValueError(f"no config {name!r}: choose from {known}")
    if args.config or args.start or args.kernels is not None:
        return {name: CONFIGS[name] for name in args.config}
    config = shape_config(args)
    cfg = config.model(config.vocab_size)
    return {"custom": (cfg, config.batch_size, config.seq_len)}


def _command(argv):
    """The command without the folders of this machine."""
    words = [re.sub(r"[^ =]*[/\\]", "", word) for word in argv]
    return " ".join(["llmnb", *words])
