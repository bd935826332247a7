# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       bench.report: "What was measured, in words and drawn."
#       cli.bench: "`llmnb bench`: measure a training step, alone or against others."
# ---

# %% [markdown]
# # The bench command: race from a terminal
#
# > One report for all that is measured, and one command that times a training
# > step, on the sizes that have names, against the contestants that you bring.
#
# *Reading time: 20 minutes. You need: [chapter A.8](../appendix/08_racing.ipynb)
# and [chapter 4.23](23_commands.ipynb).*

# %% [markdown]
# ## Where we are
#
# [Chapter 2.8](../2_cpu/08_time.ipynb) has the stopwatch and
# [chapter A.8](../appendix/08_racing.ipynb) the race. This one reports what they
# found, in words and drawn, and lets you start them from a terminal. At its
# end you can
#
# - time a step of a model of your own size;
# - race PyTorch and llm.c, each in a process of its own;
# - measure several processes that train together;
# - keep all numbers as JSON, and draw where the time goes.

# %% [markdown]
# ## Setup

# %% setup
import json
from pathlib import Path
from tempfile import TemporaryDirectory

from llmnb.book.verify import verdict
from llmnb.cli.cell import run_command

# %% [markdown]
# ## The report
#
# A contest ([chapter 2.8](../2_cpu/08_time.ipynb)) is a dict: a name, a sentence
# about what was done, and a row for each contestant with its seconds, round by
# round, or the reason why it has none. Of each the report makes a table: a
# row for each contestant, and a column for each of our own that says what
# share of the other's time it takes. What was not measured stands below, with
# the reason. The tables are Markdown, so that the
# [results page](../../book/results.md) is made of the same lines as your
# terminal shows.

# %% imports of the report tags=["export"] module="bench.report"
import re
from statistics import median


# %% the columns of tables tags=["exporti"] module="bench.report"
# of each kind of contest: title, key in a row, what it is multiplied by, form
_COLUMNS = {
    "step": [
        ("ms a step", "step_seconds", 1e3, ",.1f"),
        ("tokens/s", "tokens_per_second", 1, ",.0f"),
        ("GFLOP/s", "flops_per_second", 1e-9, ",.1f"),
        ("memory, MB", "memory_bytes", 1e-6, ",.0f"),
    ],
    "start": [("cold, s", "cold", 1, ".2f"), ("warm, s", "warm", 1, ".2f")],
    "losses": [("losses at most away", "worst", 1, ".1e")],
    "gradients": [
        ("loss away", "loss_apart", 1, ".1e"),
        ("worst gradient away", "worst", 1, ".1e"),
        ("steps of 4 with the same bits", "same_steps", 1, "d"),
    ],
    "write": [
        ("first token, ms", "first_seconds", 1e3, ",.1f"),
        ("later token, ms", "token_seconds", 1e3, ",.2f"),
        ("later tokens/s", "tokens_per_second", 1, ",.1f"),
    ],
    "group": [
        ("ms a step", "step_seconds", 1e3, ",.1f"),
        ("tokens/s", "tokens_per_second", 1, ",.0f"),
        ("efficiency", "efficiency", 1, ".2f"),
        ("in calls, ms", "waiting_seconds", 1e3, ",.1f"),
        ("sent, MB", "sent", 1e-6, ",.1f"),
        ("memory, MB", "memory_bytes", 1e-6, ",.0f"),
    ],
    "kernel": [
        ("launches", "launches", 1, ",d"),
        ("moved", "moved", 1, ".2f"),
        ("requests", "requests", 1, ",d"),
        ("time, µs", "seconds", 1e6, ",.1f"),
        ("away from float64", "worst", 1, ".1e"),
    ],
}
_COMPILED = "registers", "shared", "vector_loads", "vector_stores", "spilled"


def _cell(row, key, scale, form):
    """A number of a row, the median of several; empty where it has none."""
    number = row.get(key)
    if isinstance(number, list):
        number = median(number)
    return "" if number is None else format(scale * number, form)


def _per_kernel(row, fact):
    """A fact of each kernel of a version, on an A100 and an H100."""
    each = [
        " + ".join(f"{x[cc][fact]:,}" for x in row.get("compiled", []))
        for cc in ("sm_80", "sm_90")
    ]
    return "; ".join(dict.fromkeys(each))


# %% shares of the limit tags=["export"] module="bench.report"
def shares(contest, row):
    """What share of the limit a contestant reaches, round by round.

    That is the contest's work, operations or bytes, done in its seconds,
    over what the machine can do in a second. An empty list where the work,
    the limit or the times are unknown.
    """
    most, seconds = contest.get("limit"), row.get("seconds", [])
    return [contest["work"] / s / most for s in seconds] if most else []


def _cells(contest, row):
    """The name of a row, its numbers, and our times as shares of its own."""
    cells = {"": row["name"]}
    for title, *how in _COLUMNS[contest["kind"]]:
        cells[title] = _cell(row, *how)
    if contest["kind"] == "kernel":
        cells |= {x: _per_kernel(row, x) for x in _COMPILED}
    if "work" in contest:
        each = shares(contest, row)
        cells["of limit"] = f"{median(each):.0%}" if each else ""
    for x in contest.get("ratios", ()):
        title = f"{x.get('of', x['ours'])}: ratio"
        cells.setdefault(title, "")
        if x["peer"] == row["name"]:
            reach = f"({x['low']:.2f} to {x['high']:.2f})"
            cells[title] = f"{x['ratio']:.2f} {reach}"
    return cells


# %% a contest in words tags=["export"] module="bench.report"
def table(rows):
    """Lines of a Markdown table from dicts; the first column is words."""
    lines = [[*rows[0]], *([*row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for number, line in enumerate(lines):
        first, *others = zip(line, widths, strict=True)
        cells = [first[0].ljust(first[1])]
        cells += [x.rjust(width) for x, width in others]
        yield "| " + " | ".join(cells) + " |"
        if number == 0:
            yield "|---|" + "---:|" * len(others)


def summary(contest, drawn=table):
    """Lines about a contest: what was done, the times, and what has none.

    drawn: makes lines of the dicts of a table.
    """
    rows, missing = contest["contestants"], {}
    known = [x for x in rows if "unmeasured" not in x or "sectors" in x]
    yield from (f"**{contest['name']}**: {contest['about']}.", "")
    if known:
        yield from (*drawn([_cells(contest, x) for x in known]), "")
    for row in rows:
        if "unmeasured" in row:
            missing.setdefault(row["unmeasured"], []).append(row["name"])
    for why, names in missing.items():
        yield from (f"Not measured: {'; '.join(names)} ({why}).", "")


# %% a report in words tags=["export"] module="bench.report"
def report(result):
    """A result, as `llmnb bench --json` writes it, as a text to print."""
    lines = [f"machine  {result['machine']}, {result['threads']} threads"]
    if result["load"] is not None:
        lines += [f"load     {result['load']:.2f} before the race"]
    if "gpu" in result:
        lines += [f"GPU      {result['gpu']['name']}"]
    for contest in result["contests"]:
        lines += ["", *summary(contest)]
        for row in contest["contestants"]:
            if "layers" in row:
                lines += [f"{row['name']}, where the time goes:", ""]
                lines += [*_layers_table(row), ""]
    return "\n".join(lines).strip()


def _layers_table(row):
    parts = [{"name": k, "seconds": s} for k, s in row["parts"].items()]
    return table([
        {
            "": x["name"],
            "calls": f"{x.get('calls', '')}",
            "ms": f"{x['seconds'] * 1e3:.2f}",
            "share": f"{x['seconds'] / row['step_seconds']:.1%}",
        }
        for x in parts + row["layers"]
    ])  # fmt: skip


# %% the bars tags=["export"] module="bench.report"
def bars_figure(result, kind="kernel"):
    """A matplotlib figure: a panel a contest, a bar a contestant.

    kind: "step", of which milliseconds are drawn, or "kernel", of which
    `shares` are. A bar is the median, and a thin line reaches from the
    lowest round to the highest. Raises ValueError where there are none.
    """
    panels = []
    for contest in [x for x in result["contests"] if x["kind"] == kind]:
        rows = [x for x in contest["contestants"] if "seconds" in x]
        rows = [(x, _drawn(kind, contest, x)) for x in rows]
        panels += [(contest["name"], rows)] if rows else []
    labels = {"step": "milliseconds a step"}
    labels["kernel"] = "per cent of the GPU's peak, or of a copy"
    return _figure(panels, _draw_rows, labels[kind])


def _drawn(kind, contest, row):
    """The number of each round that a bar stands for."""
    if kind == "step":
        return [1e3 * x for x in row["seconds"]]
    return [100 * x for x in shares(contest, row)]


def _draw_rows(ax, rows, palette):
    for x, each in rows:
        middle = median(each)
        reach = [[middle - min(each)], [max(each) - middle]]
        ours = x["name"].startswith("llmnb") or "sectors" in x
        colour = palette["blue" if ours else "grey"]
        ink = {"ecolor": palette["ink"], "error_kw": {"lw": 1}}
        ax.barh(x["name"], middle, xerr=reach, color=colour, **ink)


def _figure(panels, draw, label):
    """A figure of panels: each a title, and rows that draw puts on axes."""
    from matplotlib.figure import Figure

    from llmnb.book.diagram import PALETTE

    if not panels:
        raise ValueError("there is nothing to draw: nothing was measured")
    counts = [2 + len(rows) for _, rows in panels]
    fig = Figure(figsize=(8, 0.4 * sum(counts)), dpi=100)
    axes = fig.subplots(len(panels), squeeze=False, height_ratios=counts)
    for ax, (title, rows) in zip(axes[:, 0], panels, strict=True):
        draw(ax, rows, PALETTE)
        ax.invert_yaxis()
        ax.set_title(title, loc="left", size=11, parse_math=False)
        ax.set_xlabel(label)
    fig.tight_layout()
    return fig


# %% where the time goes, drawn tags=["export"] module="bench.report"
def layers_figure(result):
    """Where the time goes: a matplotlib figure, a panel for each llmnb row.

    result: of `bench`. Raises ValueError when it has no such row.
    """
    panels = [
        (f"{contest['name']}, {row['name']}", _layer_bars(row))
        for contest in result["contests"]
        for row in contest["contestants"]
        if "layers" in row
    ]
    return _figure(panels, _draw_layers, "milliseconds of a step")


def _layer_bars(row):
    """Milliseconds by layer, and by way: forward, backward, or neither."""
    found = {}
    for x in row["layers"]:
        name, way = re.fullmatch(
            r"(.*?)(?:_(forward|backward))?", x["name"]
        ).groups()
        found.setdefault(name, {})[way or "neither"] = 1e3 * x["seconds"]
    return found


def _draw_layers(ax, found, palette):
    """Bars of milliseconds: a layer's forward and backward in one bar."""
    colours = {"forward": "blue", "backward": "orange", "neither": "grey"}
    left = [0.0] * len(found)
    for way, colour in colours.items():
        width = [x.get(way, 0.0) for x in found.values()]
        ax.barh([*found], width, left=left, label=way, color=palette[colour])
        left = [a + b for a, b in zip(left, width, strict=True)]
    ax.legend(loc="lower right")


# %% [markdown]
# A result with numbers that are made up, of three rounds: the median stands in
# the table, and who has no number stands below it.

# %% a report, of made-up numbers
from llmnb.bench.report import report

ours = {
    "name": "llmnb fp32",
    "step_seconds": [0.012, 0.010, 0.031],
    "tokens_per_second": [5333, 6400, 2065],
}
absent = {"name": "torch fp32", "unmeasured": "torch is not installed"}
contest = {
    "name": "tiny",
    "kind": "step",
    "about": "a batch of 64 tokens",
    "contestants": [ours, absent],
}
made_up = {"machine": "none", "threads": 2, "load": None}
print(report(made_up | {"contests": [contest]}))

# %% [markdown]
# One round took three times as long, and the table does not show it: so the
# ratio of two contestants comes with its lowest and highest.
#
# ## The command
#
# Its options say who races and on what. Four things can be measured: a
# training step, the start of a process (`--start`), a text (`--write`), and
# the kernels of a GPU (`--kernels`). One report prints them all.

# %% its options tags=["export"] module="cli.bench"
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
    """What `llmnb bench` is told: who races, on what, and what is kept."""

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


# %% measure tags=["export"] module="cli.bench"
def run(args):
    """Time training steps on random tokens.

    Tokens a second, memory, where the time goes. Every contestant has a
    process of its own; they take turns, and all are in memory at once. On a
    GPU each runs alone. Under mpirun or srun the group is measured instead:
    tokens a second, efficiency, and what each rank waits, sends and holds.
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


# %% measure steps and kernels tags=["exporti"] module="cli.bench"
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


# %% measure writing tags=["exporti"] module="cli.bench"
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


# %% [markdown]
# Several processes that `mpirun` has started do not race. They train one model
# together, as [chapter 6.3](../6_machines/03_cost.ipynb) derives, and are
# measured with the same report.


# %% measure a group tags=["exporti"] module="cli.bench"
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


# %% the configurations tags=["exporti"] module="cli.bench"
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


# %% [markdown]
# ## Try it
#
# A tiny model in NumPy, which takes no compiling: three rounds, of one step each,
# since a turn may be short.

# %% a tiny model, timed
SHAPE = (
    "--num-layers 1 --num-heads 2 --channels 32 --seq-len 32 --batch-size 4 "
    "--vocab-size 257 --backend reference --precision fp32"
)
place = TemporaryDirectory()
file = Path(place.name, "tiny.json")
how = "--steps", 3, "--turn", 0, "--json", file
shown, _, code = run_command("bench", *SHAPE.split(), *how)
verdict("bench", code == 0 and "where the time goes" in shown, "has measured")
tiny = json.loads(file.read_text("utf-8"))
(row,) = tiny["contests"][0]["contestants"]
print(*tiny["command"].split()[-6:])
print(len(row["seconds"]), "rounds")
print(*[x["name"] for x in row["layers"]][:4], "...")

# %% [markdown]
# ## Take away
#
# - A result is a file: the command, the machine, every turn's time.
# - What is shown is the median of the rounds, which one slow round does not move, and
#   of ratios the lowest and the highest too.
# - The command is kept without the folders of the machine it ran on.
#
# ## Exercises
#
# **1** (★). Which command races the 124M model of 64 tokens, in float32, against PyTorch
# and the llm.c that you have built in `../llm.c`, ten rounds, keeps all numbers in
# `race.json`, and draws where the time goes? `llmnb bench --help` says what there is.
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# `llmnb bench --config 124m-64 --precision fp32 --against torch
# llmc=../llm.c/train_gpt2 --steps 10 --json race.json --plot race.png`. The cell
# reads it as the command does, and says what the file would keep of it.
# :::

# %% exercise 1, checked tags=["hide-cell"]
from llmnb.cli.__main__ import _parsed

line = (
    "bench --config 124m-64 --precision fp32 --against torch "
    "llmc=../llm.c/train_gpt2 --steps 10 --json race.json --plot race.png"
)
_, asked = _parsed(line.split())
wanted = {
    "config": ("124m-64",),
    "precision": ("fp32",),
    "against": ("torch", "llmc=../llm.c/train_gpt2"),
    "steps": 10,
    "json": "race.json",
}
drawn = asked.given.pop("plot", None)
verdict("exercise 1", drawn and asked.given == wanted, "what was asked for")
print(_command(line.split()))

# %% [markdown]
# **2** (★★). The step of the made-up contest has 1.2 billion operations, and the
# machine does at most 200 billion a second. Which share of that does the report
# show? Which would it be of the mean time?
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# Half: the median is 12 ms, and $1.2 / 0.012$ are 100 billion a second. The mean is
# 17.7 ms, of which it would be 34 %, for one slow round in three.
# :::

# %% exercise 2, checked tags=["hide-cell"]
known = contest | {"work": 1.2e9, "limit": 200e9}
rounds = ours["step_seconds"]
known["contestants"] = [ours | {"seconds": rounds}]
text = report(made_up | {"contests": [known]})
verdict("exercise 2", " 50% |" in text, "half of the limit")
print(f"of the mean {1.2e9 / (sum(rounds) / 3) / 200e9:.0%}")

# %% [markdown]
# **3** (★★). Write `heaviest(row, count)`: the names of the layers of a row that take
# most of its step, forward and backward together, the heaviest first.
#
# :::{admonition} Solution to exercise 3
# :class: dropdown
# `_layer_bars`, from which the bars are drawn, has each layer's milliseconds by way;
# what is left is a sum and a sort.
# :::


# %% exercise 3, checked tags=["hide-cell"]
def heaviest(row, count):
    """The names of the layers that take most, forward and backward."""
    bars = _layer_bars(row)
    sums = {name: sum(ways.values()) for name, ways in bars.items()}
    return sorted(sums, key=sums.get, reverse=True)[:count]


seconds = {
    "matmul_forward": 4,
    "matmul_backward": 5,
    "adamw_update": 6,
    "gelu_forward": 1,
    "gelu_backward": 2,
    "encoder_forward": 1,
}
layers = [{"name": k, "seconds": x} for k, x in seconds.items()]
found = heaviest({"layers": layers}, 3)
verdict("exercise 3", found == ["matmul", "adamw_update", "gelu"], "in order")

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

place.cleanup()
gained("4.26")
