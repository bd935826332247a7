# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     module: cli
# ---

# %% [markdown]
# # Put the chapters on the command line
#
# > Every command is a short function over what the chapters have built, its
# > options are the fields of a dataclass, and a mistake gets one line.

# %% [markdown]
# ## Where we are

# %% where we are
from llmnb.diagram import gpt2_diagram

gpt2_diagram(lit="all")

# %% [markdown]
# *Figure 20.1. The model, its training and its writing are built. What is
# left is a way to reach them from a terminal.*
#
# At the end of this chapter you can
#
# - find the function behind each command of `llmnb`;
# - add an option, in one place;
# - say what a command does with a mistake of its user, and why.
#
# You need [chapter 13](13_training.ipynb) for the run and
# [chapter 14](14_generation.ipynb) for the text it writes.

# %% [markdown]
# ## Setup

# %% setup
from tempfile import TemporaryDirectory

from llmnb.verify import verdict

# %% [markdown]
# ## The commands
#
# `llmnb` has five commands, and each is a short function over what the
# chapters have built:
#
# | command | what it does |
# |---|---|
# | `llmnb train` | trains on a corpus and writes a run folder |
# | `llmnb generate RUN` | continues a prompt with a run's model |
# | `llmnb data FOLDER` | turns text into token shards |
# | `llmnb bench` | measures a training step, alone or against others |
# | `llmnb info` | versions, threads, and the size of a configuration |
#
# Three rules make it pleasant to use. `--help` answers at once: numba and
# matplotlib are imported by the commands that need them, when they run. An
# option has one home: the fields of `TrainConfig` with their help become
# the options of `llmnb train`. And a mistake of the user gets one line and
# an exit code that is not zero, without a traceback.

# %% imports of the command line tags=["export"] module="cli"
import argparse
import json
import os
import re
import sys
import time
from dataclasses import fields
from functools import partial
from importlib.metadata import version
from pathlib import Path


from llmnb.files import replacing
from llmnb.train import (
    DataOptions,
    LearningOptions,
    ModelOptions,
    TrainConfig,
)


# %% errors in one line tags=["exporti"] module="cli"
class _Parser(argparse.ArgumentParser):
    """A parser whose errors take one line instead of the whole usage."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (try --help)\n")


def _one_line(error):
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


# %% options from fields tags=["exporti"] module="cli"
PARTS = {
    "what to read": DataOptions,
    "what the model looks like": ModelOptions,
    "how it learns": LearningOptions,
}


def _add_fields(parser, part, names=None):
    """One option for each field of a dataclass, or for those in names."""
    for field in fields(part):
        if names and field.name not in names:
            continue
        many = isinstance(field.default, tuple)
        shown = " ".join(field.default) if many else field.default
        note = f" (default: {shown})" if shown != "" else ""
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=str if many else field.type,
            nargs="+" if many else None,
            default=field.default,
            metavar=field.name.upper() if many else field.type.__name__,
            help=field.metadata["help"] + note,
        )


# %% fields from options tags=["exporti"] module="cli"
def _from_fields(args, part):
    values = {f.name: getattr(args, f.name) for f in fields(part)}
    return {k: tuple(v) if type(v) is list else v for k, v in values.items()}


# %% the number of threads tags=["exporti"] module="cli"
def _add_threads(parser):
    parser.add_argument(
        "--threads", type=int, metavar="int",
        help="threads of the kernels (default: one for each core)",
    )  # fmt: skip


def _set_threads(args):
    import numba

    if args.threads is not None:
        numba.set_num_threads(args.threads)


# %% llmnb train tags=["exporti"] module="cli"
def _add_train(commands):
    parser = commands.add_parser(
        "train",
        help="train a GPT-2 and write a run folder",
        description="Train a GPT-2 from scratch. The defaults take about two "
        "minutes on two cores.",
    )
    parser.add_argument(
        "--out", metavar="FOLDER",
        help="where to write (default: a new folder in runs/)",
    )  # fmt: skip
    parser.add_argument(
        "--force", action="store_true", help="write into a folder in use"
    )
    _add_threads(parser)
    for title, part in PARTS.items():
        _add_fields(parser.add_argument_group(title), part)
    parser.set_defaults(run=_train)


# %% a name for a run tags=["exporti"] module="cli"
RUNS = Path("runs")


def _new_folder(config):
    """runs/NAME, or the first of runs/NAME-2, -3, ... that is free."""
    first = Path(config.shards or config.corpus[0]).resolve().stem or "run"
    folder, number = RUNS / first, 1
    while folder.exists():
        number += 1
        folder = RUNS / f"{first}-{number}"
    return folder


def _newest_run():
    found = [x.parent for x in RUNS.glob("*/model.bin")]
    if not found:
        raise FileNotFoundError(
            f"there is no run in {RUNS}/ here: name a folder, or train one "
            "with `llmnb train`"
        )
    return max(found, key=lambda x: (x / "model.bin").stat().st_mtime)


# %% train, with a bar tags=["exporti"] module="cli"
def _train(args):
    from llmnb import train as t

    config = TrainConfig(**_from_fields(args, TrainConfig))
    _set_threads(args)
    folder = t.run_folder(args.out or _new_folder(config), args.force)
    start = time.perf_counter()
    data = t.prepare(config)
    _say("corpus", data.source)
    tokens = len(data.train_tokens), len(data.val_tokens)
    _say("tokens", "{:,} to train on, {:,} to validate on".format(*tokens))
    batches, validation = t.loaders(config, data)
    model = t.new_model(config, data.encoding.n_vocab)
    _say("model", _size_of(model))
    _say("folder", folder)
    run = t.train(config, model, batches, validation)
    steps = _follow(run, config, folder / "log.csv")
    t.save_run(folder, config, model, data, steps)
    _say("took", f"{time.perf_counter() - start:.0f} s")
    _report(folder, steps, t.landmarks(config, data))


# %% lines of a report tags=["exporti"] module="cli"
def _say(label, text):
    print(f"{label:<10} {text}", flush=True)


def _size_of(model):
    cfg = model.cfg
    count = sum(x.size for x in model.params.values())
    return (
        f"{cfg.num_layers} layers, {cfg.num_heads} heads, {cfg.channels} "
        f"channels, {cfg.vocab_size} tokens: {count:,} parameters, "
        f"{model.memory.nbytes / 1e6:.0f} MB in all"
    )


# %% follow a run tags=["exporti"] module="cli"
def _follow(run, config, log):
    """Collect the steps of a run; show a bar; keep the log up to date."""
    from tqdm import tqdm

    from llmnb.train import write_log

    steps, shown = [], {}
    bar = tqdm(total=config.steps, unit="step", dynamic_ncols=True)
    try:
        with bar:
            for step in run:
                steps.append(step)
                if step.val_loss is not None:
                    shown["val"] = f"{step.val_loss:.3f}"
                    write_log(log, steps)
                if step.loss is not None:
                    shown["loss"] = f"{step.loss:.3f}"
                    shown["tok/s"] = f"{step.tokens_per_second:,.0f}"
                    bar.update()
                bar.set_postfix(shown, refresh=False)
    except KeyboardInterrupt:
        if not steps:
            raise
        print("stopped: keeping what there is", file=sys.stderr)
    except FloatingPointError:
        write_log(log, steps)
        raise
    return steps


# %% the end of a run tags=["exporti"] module="cli"
SAMPLE = {"count": 200, "temperature": 0.8, "top_p": 0.95}


def _report(folder, steps, marks):
    from llmnb.files import replacing
    from llmnb.generate import decoded, generate
    from llmnb.train import load_run

    losses = [x.val_loss for x in steps if x.val_loss is not None]
    known = ", ".join(f"{name} {loss:.3f}" for name, loss in marks.items())
    _say("loss", f"{losses[-1]:.3f} on validation text ({known})")
    model, encoding, _ = load_run(folder)
    eot = encoding.eot_token
    tokens = generate(model, [eot], stop=eot, **SAMPLE)
    text = "".join(decoded(encoding, tokens))
    with replacing(folder / "sample.txt") as file:
        file.write(text.encode("utf-8"))
    print(f"\n{text}\n")
    names = " ".join(sorted(x.name for x in folder.iterdir()))
    _say("wrote", f"{folder}: {names}")
    _say("go on", f'llmnb generate {folder} --prompt "def "')


# %% llmnb generate tags=["exporti"] module="cli"
DRAWS = {
    "prompt": (str, "", "the beginning of the text"),
    "tokens": (int, 200, "tokens to write at most"),
    "temperature": (
        float,
        0.8,
        "0: the likeliest token; 1: as the model says",
    ),
    "top_k": (int, None, "draw among the k likeliest tokens only"),
    "top_p": (float, None, "draw among the likeliest that make up p only"),
    "seed": (int, 42, "another seed, another text"),
    "tokenizer": (str, "gpt2", "of a .bin file: gpt2, byte or a rank file"),
}


# %% the options of generate tags=["exporti"] module="cli"
def _add_generate(commands):
    parser = commands.add_parser(
        "generate",
        help="continue a prompt",
        description="Continue a prompt with the model of a run folder, or "
        "of a .bin file in llm.c's format.",
    )
    parser.add_argument(
        "model", nargs="?", metavar="RUN",
        help="a run folder or a .bin file (default: the newest in runs/)",
    )  # fmt: skip
    for name, (kind, default, text) in DRAWS.items():
        shown = "none" if default in (None, "") else default
        parser.add_argument(
            "--" + name.replace("_", "-"),
            type=kind,
            default=default,
            metavar=kind.__name__,
            help=f"{text} (default: {shown})",
        )
    _add_threads(parser)
    parser.set_defaults(run=_generate)


# %% write to the terminal tags=["exporti"] module="cli"
def _generate(args):
    from llmnb.generate import check_sampling, decoded, generate

    settings = args.temperature, args.top_k, args.top_p
    check_sampling(*settings)
    _set_threads(args)
    model, encoding = _load_model(args)
    eot = encoding.eot_token
    ids = [eot, *encoding.encode_ordinary(args.prompt)]
    tokens = generate(
        model, ids, args.tokens, *settings, seed=args.seed, stop=eot
    )
    print(args.prompt, end="", flush=True)
    for piece in decoded(encoding, tokens):
        print(piece, end="", flush=True)
    print()


# %% which model tags=["exporti"] module="cli"
def _load_model(args):
    from llmnb.train import load_run

    path = Path(args.model) if args.model else _newest_run()
    if not args.model:
        print(f"model: {path}", file=sys.stderr)
    if path.is_file():
        return _load_file(path, args)
    if not path.exists():
        raise FileNotFoundError(f"there is no run {path}")
    model, encoding, _ = load_run(path)
    return model, encoding


# %% a model from a file tags=["exporti"] module="cli"
def _load_file(path, args):
    """A .bin file's model, laid out for no more tokens than are asked for."""
    from llmnb.checkpoint import read_config
    from llmnb.gpt2 import GPT2
    from llmnb.train import make_encoding

    cfg = read_config(path)
    encoding = make_encoding(TrainConfig(tokenizer=args.tokenizer), [])
    if encoding.n_vocab != cfg.vocab_size:
        raise ValueError(
            f"{path} has {cfg.vocab_size} tokens, the tokenizer "
            f"{args.tokenizer} has {encoding.n_vocab}"
        )
    length = 1 + len(encoding.encode_ordinary(args.prompt)) + args.tokens
    length = max(1, min(length, cfg.max_seq_len))
    return GPT2.from_checkpoint(path, 1, length), encoding


# %% llmnb data tags=["exporti"] module="cli"
def _add_data(commands):
    parser = commands.add_parser(
        "data",
        help="turn text into token shards",
        description="Write train.bin, val.bin and tokenizer.tiktoken, for "
        "`llmnb train --shards FOLDER`.",
    )
    parser.add_argument("out", metavar="FOLDER", help="where to write")
    parser.add_argument(
        "--force", action="store_true", help="write into a folder in use"
    )
    names = "corpus", "limit", "tokenizer", "vocab_size"
    _add_fields(parser, DataOptions, names)
    parser.set_defaults(run=_data)


# %% write the shards tags=["exporti"] module="cli"
def _data(args):
    from llmnb import tokenizer
    from llmnb.data import write_shard
    from llmnb.train import prepare, run_folder

    config = TrainConfig(
        corpus=tuple(args.corpus),
        limit=args.limit,
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size,
    )
    folder = run_folder(args.out, args.force)
    data = prepare(config)
    _say("corpus", data.source)
    for name, tokens in (
        ("train", data.train_tokens),
        ("val", data.val_tokens),
    ):
        write_shard(folder / f"{name}.bin", tokens)
        _say(name, f"{len(tokens):,} tokens in {folder / name}.bin")
    tokenizer.save(data.encoding, folder / "tokenizer.tiktoken")
    _say("go on", f"llmnb train --shards {folder}")


# %% llmnb bench tags=["exporti"] module="cli"
def _add_bench(commands):
    parser = commands.add_parser(
        "bench",
        help="measure a training step, alone or against others",
        description="Time training steps on random tokens: tokens a second, "
        "memory, where the time goes. Every contestant has a process of its "
        "own; they take turns, and all are in memory at once.",
    )
    _add_race(parser)
    _add_outputs(parser)
    _add_threads(parser)
    shape = parser.add_argument_group("the model, without --config")
    _add_fields(shape, DataOptions, ["vocab_size"])
    names = [x.name for x in fields(ModelOptions) if x.name != "precision"]
    _add_fields(shape, ModelOptions, names)
    parser.set_defaults(run=_bench)


# %% who races, on what tags=["exporti"] module="cli"
def _add_race(parser):
    add = parser.add_argument
    add(
        "--config", nargs="+", default=[], metavar="NAME",
        help="small, 124m-64, 124m-256, 124m-1024, or several",
    )  # fmt: skip
    add(
        "--precision", nargs="+", default=["fp32", "bf16"], metavar="NAME",
        help="what llmnb computes in (default: fp32 bf16)",
    )  # fmt: skip
    add(
        "--against", nargs="+", default=[], metavar="NAME",
        help="torch, torch-compile, torch-bf16, or llmc=PATH of llm.c's "
        "train_gpt2",
    )  # fmt: skip
    add(
        "--torch-python", default=sys.executable, metavar="PATH",
        help="the Python that has torch (default: this one)",
    )  # fmt: skip
    add(
        "--steps", type=int, default=10, metavar="int",
        help="steps of each to measure (default: 10)",
    )  # fmt: skip
    add(
        "--start", action="store_true",
        help="time the first step of fresh processes; without --config this "
        "alone",
    )  # fmt: skip


# %% what is written tags=["exporti"] module="cli"
def _add_outputs(parser):
    parser.add_argument(
        "--json", metavar="FILE", help="write all numbers; - prints them"
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="draw where the time goes, as a PNG"
    )


# %% measure tags=["exporti"] module="cli"
def _bench(args):
    from tqdm import tqdm

    from llmnb.bench import bench, report
    from llmnb.race import Settings

    settings = Settings(
        tuple(args.precision), tuple(args.against), args.steps,
        args.threads, args.backend, args.torch_python,
    )  # fmt: skip
    bar = partial(tqdm, unit="round", leave=False)
    configs = _configs_of(args)
    for path in filter(None, (args.json, args.plot)):
        if not Path(path).parent.is_dir():
            raise FileNotFoundError(f"there is no folder {Path(path).parent}")
    result = bench(configs, settings, args.start, bar)
    result = {"command": _command(sys.argv[1:]), **result}
    _write_result(args, result)
    as_json = json.dumps(result, indent=1)
    print(as_json if args.json == "-" else report(result))


# %% write the files tags=["exporti"] module="cli"
def _write_result(args, result):
    from llmnb.bench import layers_figure

    if args.json and args.json != "-":
        with replacing(args.json) as file:
            file.write(json.dumps(result, indent=1).encode() + b"\n")
    if args.plot:
        with replacing(args.plot) as file:
            layers_figure(result).savefig(file, format="png")


# %% the configurations tags=["exporti"] module="cli"
def _configs_of(args):
    from llmnb.bench import CONFIGS

    for name in args.config:
        if name not in CONFIGS:
            known = ", ".join(CONFIGS)
            raise ValueError(f"no config {name!r}: choose from {known}")
    if args.config or args.start:
        return {name: CONFIGS[name] for name in args.config}
    config = _config_of(args)
    cfg = config.model(config.vocab_size)
    return {"custom": (cfg, config.batch_size, config.seq_len)}


def _command(argv):
    """The command without the folders of this machine."""
    words = [re.sub(r"[^ =]*[/\\]", "", word) for word in argv]
    return " ".join(["llmnb", *words])


# %% the configuration of some options tags=["exporti"] module="cli"
def _config_of(args):
    names = {x.name for x in fields(ModelOptions)} - {"precision"}
    shape = {name: getattr(args, name) for name in names}
    return TrainConfig(**shape, vocab_size=args.vocab_size)


# %% llmnb info tags=["exporti"] module="cli"
def _add_info(commands):
    parser = commands.add_parser(
        "info",
        help="versions, threads, and the size of a model",
        description="Print versions, and what a configuration takes: "
        "parameters, bytes, operations a token.",
    )
    _add_fields(parser, DataOptions, ["vocab_size"])
    _add_fields(parser, ModelOptions)
    parser.set_defaults(run=_info)


# %% report tags=["exporti"] module="cli"
def _info(args):
    import numba

    from llmnb.config import flops_per_token, parameter_count
    from llmnb.layout import footprint, gpt2_layout
    from llmnb.timing import machine

    config = _config_of(args)
    cfg = config.model(config.vocab_size)
    names = "llmnb", "numpy", "numba", "tiktoken"
    _say("versions", ", ".join(f"{x} {version(x)}" for x in names))
    _say("machine", machine())
    _say("threads", numba.get_num_threads())
    _say("parameters", f"{parameter_count(cfg):,}")
    sizes = footprint(gpt2_layout(cfg, config.batch_size, config.seq_len))
    shown = ", ".join(f"{k} {v / 1e6:.1f}" for k, v in sizes.items())
    _say("memory", f"{sum(sizes.values()) / 1e6:.1f} MB ({shown})")
    flops = flops_per_token(cfg, config.seq_len)
    _say("work", f"{flops / 1e6:.1f} MFLOP to train on a token")


# %% the command tags=["export"] module="cli"
COMMANDS = (
    _add_train,
    _add_generate,
    _add_data,
    _add_bench,
    _add_info,
)
USER_ERRORS = (ValueError, TypeError, OSError, ArithmeticError, MemoryError)


def main(argv=None):
    """Run the `llmnb` command; argv defaults to the process's arguments.

    Exits with code 2 for a wrong option and 1 for an error that the user
    can mend, each in one line on stderr; with 130 when interrupted. When
    the variable LLMNB_TRACEBACK is set, errors keep their traceback.

    Derived in chapter 20.
    """
    parser = _Parser("llmnb", description="Train GPT-2 and write with it.")
    parser.add_argument(
        "--version", action="version", version=f"llmnb {version('llmnb')}"
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(commands)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        sys.exit(130)
    except USER_ERRORS as error:
        if "LLMNB_TRACEBACK" in os.environ:
            raise
        print(f"llmnb: error: {_one_line(error)}", file=sys.stderr)
        sys.exit(1)


# %% [markdown]
# Now the commands themselves, from a notebook cell as from a terminal. A
# small run, then its model asked to go on:

# %% train from the command line
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

from llmnb.cli import main as llmnb

TINY = (
    "--tokenizer byte --limit 100000 --num-layers 1 --channels 32 "
    "--num-heads 2 --seq-len 32 --batch-size 4 --steps 30"
)


def run(*args):
    """What a command prints, and its exit code."""
    out, err, code = StringIO(), StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            llmnb([str(x) for x in args])
        except SystemExit as stop:
            code = stop.code
    return out.getvalue(), err.getvalue(), code


# %% a run folder, written and used
with TemporaryDirectory() as place:
    folder = Path(place, "run")
    _, _, code = run("train", "--out", folder, *TINY.split())
    print(code, *sorted(x.name for x in folder.iterdir()))
    ask = ["generate", folder, "--prompt", "def ", "--tokens", 20]
    text, _, code = run(*ask)
    verdict("generate", code == 0 and text.startswith("def "), "goes on")
    verdict("generate", run(*ask)[0] == text, "same seed, same text")
    _, _, code = run("train", "--out", folder, *TINY.split())
    verdict("train", code == 1, "keeps a folder in use")

# %% mistakes get one line
for args in (
    ["train", "--stepz", 3],
    ["train", "--channels", 130],
    ["train", "--corpus", "no-such-file"],
    ["generate", "no-such-run"],
    ["bench", "--num-layers", "many"],
    ["bench", "--against", "nobody"],
):
    _, message, code = run(*args)
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
# missing file, and after Ctrl-C? Find the three places in the code above.
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# 2 from `_Parser.error`, 1 from the last line of `main`, and 130, which is
# 128 plus the number of the signal, from its `KeyboardInterrupt`.
# :::

# %% exercise 1, checked tags=["hide-cell"]
codes = [run("info", "--layers", "x")[2], run("generate", "nothing")[2]]
verdict("exit codes", codes == [2, 1], "a wrong option, a missing file")

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.index import gained

gained("20_command")
