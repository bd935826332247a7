# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       bench.stopwatch: "A stopwatch around a backend: where a step's time goes."
#       bench.bench: "A training step measured, alone or in a race: the numbers, in words and drawn."
# ---

# %% [markdown]
# # Where the time goes: a step, layer by layer
#
# > A stopwatch around the layers says what to make faster next; a report says
# > how fast the whole is, beside others and beside the machine's limit.
#
# *Reading time: 22 minutes. You need: [chapter 2.7](07_step.ipynb).*

# %% [markdown]
# ## Where we are
#
# A speed that you cannot measure is a speed that you cannot improve. This
# chapter builds most of `llmnb bench`. At its end you can
#
# - say which layer takes the time of a step, on your machine;
# - read a report, and say what its numbers are shares of;
# - read the [results page](../../book/results.md).
#
# How two programs are compared so that the machine's moods cancel is told in
# [chapter A.8](../appendix/08_racing.ipynb).

# %% [markdown]
# ## Setup

# %% setup
import numpy as np

from llmnb.config import GPT2Config
from llmnb.model.gpt2 import GPT2
from llmnb.book.verify import verdict

V, B, T = 1024, 8, 64
cfg = GPT2Config(T, V, num_layers=4, num_heads=4, channels=128)
model = GPT2(cfg, batch_size=B, seq_len=T)

# %% [markdown]

# ## Where the time goes
#
# Chapters 1.5 to 1.12 timed their layers alone. In a training step they run
# together, and we want to know which one to make faster next. The model
# calls its layers through one object, its backend. `Stopwatch` stands in
# for that object: it hands out the same functions, each wrapped so that
# its time is added up.

# %% imports of the benchmark tags=["export"] module="bench.stopwatch"
import time


# %% a stopwatch around a backend tags=["export"] module="bench.stopwatch"
class Stopwatch:
    """A backend whose functions add up the seconds they take.

    backend: an object with functions as attributes. wait: what to call
    before a clock is read, where functions return before their work is
    done, as on a GPU. seconds, calls: dicts from function name to what has
    been added up since `reset`.
    """

    def __init__(self, backend, wait=lambda: None):
        self._backend, self.wait = backend, wait
        self.reset()

    def reset(self):
        """Forget what has been measured."""
        self.seconds, self.calls = {}, {}

    def __getattr__(self, name):
        function = getattr(self._backend, name)
        if not callable(function):
            return function

        def timed(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.wait()
            spent = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0) + spent
            self.calls[name] = self.calls.get(name, 0) + 1
            return result

        return timed


# %% [markdown]
# The step that we measure is forward, backward and update. It does not clip
# gradients: llm.c's program on a CPU does not, and in a race all programs must
# do the same work.


# %% one measured step tags=["export"] module="bench.stopwatch"
PARTS = ("forward", "backward", "update")


def timed_step(model, tokens, targets, step):
    """Train a GPT2 once; say what each part and each layer took.

    model.ops must be a `Stopwatch`. step: counts from 1. Returns a dict: the
    loss, a float; parts and layers, dicts from name to seconds; calls, a
    dict from layer to a count.
    """
    model.ops.reset()
    times = [time.perf_counter()]
    loss = model.forward(tokens, targets)
    times.append(time.perf_counter())
    model.backward()
    model.ops.wait()
    times.append(time.perf_counter())
    model.update(step=step)
    model.ops.wait()
    times.append(time.perf_counter())
    spent = [b - a for a, b in zip(times, times[1:], strict=False)]
    return {
        "loss": loss,
        "parts": dict(zip(PARTS, spent, strict=True)),
        "layers": model.ops.seconds,
        "calls": model.ops.calls,
    }


# %% the model above, measured tags=["nbval-ignore-output"]
from llmnb.bench.stopwatch import Stopwatch, timed_step

text = np.random.RandomState(19).randint(0, V, (B, T + 1))
tokens, targets = text[:, :-1], text[:, 1:]
layers, model.ops = model.ops, Stopwatch(model.ops)
found = [timed_step(model, tokens, targets, 1 + i) for i in range(5)][-1]
model.ops = layers
whole = sum(found["parts"].values())
for name, spent in found["layers"].items():
    print(f"{name:<30} {found['calls'][name]:3} {spent / whole:6.1%}")

# %% [markdown]
# Most of the time goes into `matmul`, as the counts of
# [chapter 1.7](../1_by_hand/07_matmul.ipynb) foretold, and the backward pass takes more
# than the forward pass: it forms two products for each one of the forward
# pass. `llmnb bench` prints such a table for any configuration, and
# `llmnb bench --plot layers.png` draws it.
#
# The arena keeps a promise of [chapter 1.14](../1_by_hand/14_memory.ipynb). It is laid out
# before the first step and holds weights, gradients, optimiser state and
# activations. What the process holds beyond it is Python, the libraries,
# the compiled kernels and the text. One group is left out below, `work`: it is
# the scratch of the matrix products, some megabytes whose number goes by the
# processor's tile and by its threads.

# %% where the memory goes
for group, size in model.memory.sizes().items():
    if group != "work":
        print(f"{group:<8} {size / 1e6:8.2f} MB")

# %% [markdown]
# ## The report
#
# `race` ([chapter A.8](../appendix/08_racing.ipynb)) gives a step's times, of
# one program or of several in turns. What is left is to gather the numbers,
# print them and draw them. Some
# configurations have names: a small model, GPT-2 with 124 million
# parameters on short and on long texts, and a batch that is worth a GPU.
#
# Taking turns does not make a busy machine a quiet one. When a third program
# wants a core, the contestants suffer differently: threads that spin until
# all of them have finished lose the most. So the report states the machine's
# **load** before the race. A load far below 1 is a quiet machine.

# %% imports of the report tags=["export"] module="bench.bench"
import math
import os
import re
import subprocess
from datetime import date
from pathlib import Path
from statistics import median

from llmnb.bench import peers
from llmnb.config import GPT2Config
from llmnb.model.tensors import flops_per_token, parameter_count
from llmnb.model.gpt2 import GPT2
from llmnb.bench.race import (
    WARM_UP,
    Settings,
    cores,
    lineup,
    no_device,
    race,
    race_writers,
    ratios,
    start_times,
)
from llmnb.bench.stopwatch import PARTS
from llmnb.timing import machine

# %% named configurations tags=["export"] module="bench.bench"
SMALL = GPT2Config(64, 256, 4, 4, 128)
CONFIGS = {
    "small": (SMALL, 12, 64),
    "124m-64": (GPT2Config(), 4, 64),
    "124m-256": (GPT2Config(), 4, 256),
    "124m-1024": (GPT2Config(), 1, 1024),
    "124m-16x1024": (GPT2Config(), 16, 1024),
}


# %% a shape tags=["exporti"] module="bench.bench"
def _shape(cfg, batch_size, seq_len):
    sizes = {"batch_size": batch_size, "seq_len": seq_len}
    return {"model": dict(vars(cfg)), **sizes}


# %% the benchmark tags=["export"] module="bench.bench"
def bench(configs, settings=None, start=False, bar=iter):
    """Measure training steps, and starts; a dict ready for JSON.

    configs: a dict from name to (GPT2Config, batch_size, seq_len), such as
    `CONFIGS`. settings: a `race.Settings`. start: whether to measure
    `start_times` of the small model too. bar: see `race`. Seconds are those
    of the rounds, in order; memory is in bytes. Raises ValueError,
    ChildProcessError, or FloatingPointError at a loss that is not finite, in
    one sentence.
    """
    settings = settings or Settings()
    lineup(settings)  # so that a mistake is found before anything is built
    result = {"date": date.today().isoformat(), "commit": _commit()}
    result |= {"machine": machine(), "threads": settings.threads or cores()}
    result |= {"load": load(), "backend": settings.backend}
    result["configs"] = [
        _config_result(name, *what, settings, bar)
        for name, what in configs.items()
    ]
    shape = _shape(*CONFIGS["small"])
    result["start"] = start_times(shape, settings, bar) if start else []
    if settings.backend == "cuda" and configs:
        result["losses"] = loss_curves(settings.precisions)
    return shares(result)


# %% the same losses tags=["export"] module="bench.bench"
def loss_curves(precisions, steps=20, shape=(SMALL, 12, 64)):
    """Train a small model on the CPU and on the GPU, from the same start.

    shape: a GPT2Config, batch size and length. Returns a dict of lists of
    losses, by backend and precision, and worst: the largest difference from
    the CPU's in fp32, by precision. Without a GPU it says unmeasured alone.
    Raises FloatingPointError when a loss is not finite.
    """
    if no_device("cuda"):
        return {"unmeasured": no_device("cuda")}
    batch = peers.random_batch(_shape(*shape))
    runs = [("cpu", "fp32"), *(("cuda", x) for x in precisions)]
    found = {}
    for backend, precision in runs:
        if peers.missing(precision, backend):
            continue
        model = GPT2(*shape, backend=backend, precision=precision)
        losses = found[f"{backend} {precision}"] = []
        for step in range(1, 1 + steps):
            losses.append(float(model.forward(*batch)))
            model.backward()
            model.update(step=step)
        _check_losses(f"{backend} {precision}", losses)
    want, *others = found.values()
    worst = [
        max(abs(a - b) for a, b in zip(want, x, strict=True)) for x in others
    ]
    return found | {"worst": dict(zip([*found][1:], worst, strict=True))}


def _check_losses(name, losses):
    """Raise at a loss that is not finite: who computes no numbers is fast."""
    for step, loss in enumerate(losses):
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"{name}: the loss is {loss} at step {step}, so its time "
                "means nothing"
            )


# %% the benchmark of writing tags=["export"] module="bench.bench"
def bench_writers(cfg, prompt=64, count=64, rounds=10, threads=None, **how):
    """Measure tokens written against transformers; a dict ready for JSON.

    The arguments are those of `race_writers`, and so is what it raises.
    Seconds are those of the rounds, in order: of the first token, which
    reads the prompt, and of a later one, the median of a text.
    """
    result = {"date": date.today().isoformat(), "commit": _commit()}
    result |= {"machine": machine(), "threads": threads or cores()}
    result |= {"load": load(), "model": dict(vars(cfg))}
    found = race_writers(cfg, prompt, count, rounds, threads, **how)
    rows, texts = {}, []
    for name, each in found.items():
        steps = each["steps"]
        texts.append([x["tokens"] for x in steps])
        rows[name] = {
            kind: [x[kind] for x in steps]
            for kind in ("first_seconds", "token_seconds")
        }
    for kind in ("first_seconds", "token_seconds"):
        seconds = {name: row[kind] for name, row in rows.items()}
        result[f"{kind}_ratios"] = ratios(seconds)
    same = all(text == texts[0] for text in texts)
    result |= {"prompt": prompt, "count": count, "same_tokens": same}
    result["writers"] = {n: rows[n] | found[n]["facts"] for n in rows}
    return result


def writers_report(result):
    """The result of `bench_writers` as a text of lines to print."""
    lines = [f"machine  {result['machine']}, {result['threads']} threads"]
    if result["load"] is not None:
        lines += [f"load     {result['load']:.2f} before the race"]
    same = "the same tokens" if result["same_tokens"] else "OTHER TOKENS"
    lines += [
        f"a prompt of {result['prompt']} tokens, {result['count']} more: "
        f"{same}",
        "",
        f"{'':<16}{'first ms':>11}{'ms a token':>11}{'tokens/s':>11}",
    ]
    for name, row in result["writers"].items():
        first, each = (
            median(row[x]) for x in ("first_seconds", "token_seconds")
        )
        numbers = f"{first * 1e3:11.1f}{each * 1e3:11.2f}{1 / each:11.1f}"
        lines.append(f"{name:<16}{numbers}")
    for kind, what in (("first", "first token"), ("token", "later token")):
        for x in result[f"{kind}_seconds_ratios"]:
            lines.append(
                f"{what}: {x['ours']} / {x['peer']}: {x['ratio']:.2f} of its "
                f"time ({x['low']:.2f} to {x['high']:.2f})"
            )
    return "\n".join(lines)


# %% is the machine busy tags=["export"] module="bench.bench"
def load():
    """How many threads have wanted to run in the last minute, on average.

    None where the system does not say.
    """
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


# %% which llmnb tags=["exporti"] module="bench.bench"
def _commit():
    """The commit of the checkout that this file is in; None elsewhere."""
    command = ["git", "describe", "--always", "--dirty"]
    folder = Path(peers.__file__).parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        found = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip() or None


# %% one configuration tags=["exporti"] module="bench.bench"
def _config_result(name, cfg, batch_size, seq_len, settings, bar):
    shape = _shape(cfg, batch_size, seq_len)
    found, why = race(shape, settings, bar)
    flops = flops_per_token(cfg, seq_len) * batch_size * seq_len
    rows = [_row(name, flops, shape, **x) for name, x in found.items()]
    rows += [{"name": k, "unmeasured": v} for k, v in why.items()]
    order = [*lineup(settings)]
    rows.sort(key=lambda row: order.index(row["name"]))
    seconds = {x["name"]: x["seconds"] for x in rows if "seconds" in x}
    facts = {"parameters": parameter_count(cfg), "flops_per_step": flops}
    facts |= {"contestants": rows, "ratios": ratios(seconds)}
    if settings.backend == "cuda":
        facts["captures"] = captures(seconds)
    return {"name": name, **shape, **facts}


# %% what a graph saves tags=["export"] module="bench.bench"
def captures(seconds):
    """Seconds a step that a captured graph saves, by contestant.

    seconds: a dict from name to a list, one number a round. Returns a list
    of dicts: name, and the median, lowest and highest of the rounds'
    differences, saved, low and high.
    """
    table = []
    for name, fast in seconds.items():
        slow = seconds.get(f"{name}, no graph")
        if slow:
            each = [b - a for a, b in zip(fast, slow, strict=True)]
            row = {"name": name, "saved": median(each)}
            table.append(row | {"low": min(each), "high": max(each)})
    return table


# %% shares of the peak tags=["export"] module="bench.bench"
def shares(result):
    """Give each row of a result its share of the machine's FMA peak.

    The peak is the highest that any row has measured: other programs can
    only lower it. Changes result in place and returns it.
    """
    rows = [row for c in result["configs"] for row in c["contestants"]]
    peak = max((row.get("fma_peak", 0) for row in rows), default=0)
    for row in rows:
        if peak and "flops_per_second" in row:
            row["share_of_peak"] = row["flops_per_second"] / peak
    return result


# %% one contestant tags=["exporti"] module="bench.bench"
def _row(name, flops, shape, steps, facts):
    _check_losses(name, [x["loss"] for x in steps])
    measured = steps[WARM_UP:]
    seconds = [x["seconds"] for x in measured]
    middle = median(seconds)
    row = {"name": name, "seconds": seconds, "step_seconds": middle}
    tokens = shape["batch_size"] * shape["seq_len"]
    row["tokens_per_second"] = tokens / middle
    row["flops_per_second"] = flops / middle
    apart = facts.pop("apart", None)  # steps whose layers were timed alone
    row |= {"first_loss": steps[0]["loss"], **facts}
    timed = apart or (measured if "layers" in steps[0] else None)
    if timed:
        row |= {"parts": _parts(timed), "layers": _layers(timed)}
    return row


# %% medians tags=["exporti"] module="bench.bench"
def _parts(steps):
    return {x: median(s["parts"][x] for s in steps) for x in PARTS}


def _layers(steps):
    """One dict a backend function, in the order of first use."""
    table = []
    for name, calls in steps[0]["calls"].items():
        seconds = median(x["layers"][name] for x in steps)
        table.append({"name": name, "calls": calls, "seconds": seconds})
    whole = [sum(x["parts"].values()) for x in steps]
    pairs = zip(whole, steps, strict=True)
    rest = [total - sum(x["layers"].values()) for total, x in pairs]
    table.append({"name": "(the rest)", "calls": 1, "seconds": median(rest)})
    return table


# %% a report in words tags=["export"] module="bench.bench"
def report(result):
    """The result of `bench` as a text of lines to print."""
    lines = [f"machine  {result['machine']}, {result['threads']} threads"]
    if result["load"] is not None:
        lines += [f"load     {result['load']:.2f} before the race"]
    for config in result["configs"]:
        lines += ["", *_config_lines(config)]
    if result["start"]:
        lines += ["", "seconds to the first step of the small model", ""]
        lines += [f"{'':<22} {'cold':>9} {'warm':>9}"]
        for row in result["start"]:
            times = row.get("unmeasured") or " ".join(
                f"{median(row[kind]):9.2f}" for kind in ("cold", "warm")
            )
            lines.append(f"{row['name']:<22} {times}")
    return "\n".join(lines + [*_losses_lines(result.get("losses"))])


def _losses_lines(losses):
    if losses is None:
        return
    yield ""
    if "unmeasured" in losses:
        yield f"losses against the CPU's: {losses['unmeasured']}"
        return
    for name, worst in losses["worst"].items():
        yield f"losses of {name} differ from the CPU's by at most {worst:.1e}"


# %% one configuration in words tags=["exporti"] module="bench.bench"
def _config_lines(config):
    shape = "L {num_layers}  NH {num_heads}  C {channels}  V {vocab_size}"
    yield (
        f"{config['name']}  {shape.format(**config['model'])}  "
        f"B {config['batch_size']}  T {config['seq_len']}: "
        f"{config['parameters']:,} parameters"
    )
    titles = "ms a step", "tokens/s", "GFLOP/s", "of peak", "peak MB"
    yield ""
    yield f"{'':<22}" + "".join(f"{x:>11}" for x in titles)
    for row in config["contestants"]:
        yield f"{row['name']:<22}" + _numbers(row)
    yield ""
    for x in config["ratios"]:
        yield (
            f"{x['ours']} / {x['peer']}: {x['ratio']:.2f} of its time, median "
            f"of the rounds ({x['low']:.2f} to {x['high']:.2f})"
        )
    for x in config.get("captures", []):
        yield f"{x['name']}: the graph saves {x['saved'] * 1e3:.2f} ms a step"
    for row in config["contestants"]:
        if "layers" in row:
            yield from ("", f"{row['name']}, where the time goes", "")
            yield from _table(row)


# %% the numbers of a row tags=["exporti"] module="bench.bench"
def _numbers(row):
    if "unmeasured" in row:
        return "  " + row["unmeasured"]
    share = row.get("share_of_peak")
    peak = row.get("device_bytes", row["peak_bytes"])
    cells = [
        f"{row['step_seconds'] * 1e3:.1f}",
        f"{row['tokens_per_second']:,.0f}",
        f"{row['flops_per_second'] / 1e9:.1f}",
        f"{share:.0%}" if share else "-",
        f"{peak / 1e6:,.0f}" if peak else "-",
    ]
    return "".join(f"{x:>11}" for x in cells)


# %% the table tags=["exporti"] module="bench.bench"
def _table(row):
    total = row["step_seconds"]
    rows = [(name, "", s) for name, s in row["parts"].items()]
    rows += [("", "", None)]
    rows += [(x["name"], x["calls"], x["seconds"]) for x in row["layers"]]
    yield f"{'':<30} {'calls':>6} {'ms':>9} {'share':>7}"
    for name, calls, s in rows:
        if s is None:
            yield ""
            continue
        yield f"{name:<30} {calls:>6} {s * 1e3:9.2f} {s / total:7.1%}"


# %% the bars tags=["export"] module="bench.bench"
def layers_figure(result):
    """Where the time goes: a matplotlib figure, a panel for each llmnb row.

    result: of `bench`. Raises ValueError when it has no such row.
    """
    from matplotlib.figure import Figure

    rows = [
        (f"{config['name']}, {row['name']}", row)
        for config in result["configs"]
        for row in config["contestants"]
        if "layers" in row
    ]
    if not rows:
        raise ValueError("there is nothing to draw: no layer was measured")
    fig = Figure(figsize=(8, 0.4 + 2.9 * len(rows)), dpi=100)
    panels = fig.subplots(len(rows), squeeze=False)[:, 0]
    for ax, (title, row) in zip(panels, rows, strict=True):
        _draw_bars(ax, row)
        ax.set_title(title, loc="left", size=11, parse_math=False)
    fig.tight_layout()
    return fig


# %% one panel tags=["exporti"] module="bench.bench"
def _draw_bars(ax, row):
    """Bars of milliseconds: a layer's forward and backward in one bar."""
    from llmnb.book.diagram import PALETTE

    times, names = {x["name"]: x["seconds"] * 1e3 for x in row["layers"]}, {}
    for name in times:
        names.setdefault(re.sub(r"_(for|back)ward$", "", name), None)
    left = dict.fromkeys(names, 0.0)
    for way, colour in (("forward", "blue"), ("backward", "orange")):
        width = [times.get(f"{x}_{way}", 0.0) for x in names]
        ax.barh([*names], width, left=[*left.values()], label=way,
                color=PALETTE[colour])  # fmt: skip
        left = dict(zip(names, width, strict=True))
    ax.barh([*names], [times.get(x, 0.0) for x in names], label="neither",
            color=PALETTE["grey"])  # fmt: skip
    ax.invert_yaxis()
    ax.set_xlabel("milliseconds of a step")
    ax.legend(loc="lower right")


# %% [markdown]

# %% [markdown]
# Here is the benchmark on this chapter's configuration, three rounds and
# nobody to race against.

# %% measured in a process of its own tags=["nbval-ignore-output"]
from llmnb.bench.bench import bench, report
from llmnb.bench.race import Settings

print(report(bench({"this chapter": (cfg, B, T)}, Settings(steps=3))))

# %% [markdown]
# With PyTorch or llm.c on your machine, `llmnb bench --config 124m-64
# --against torch llmc=PATH` races against them. The
# [results page](../../book/results.md) shows such races.

# %% [markdown]

# %% [markdown]
# ## Take away
#
# - A step's time is the sum of its layers' times, and the products take most
#   of it.
# - Say with every number on which machine it was measured, and how busy that
#   machine was.
#
# ## Design note
#
# A profiler would find the slow layer without a line of our own code. But a
# profiler that watches Python's calls charges each of them a microsecond or
# so, and one that samples the processor does not know where a layer begins.
# Our layers are a few dozen calls a step, each of a millisecond: a clock
# read before and after costs nothing that could be seen, and needs no tool.

# %% [markdown]
# ## Exercises
#
# **1** (★★). Each layer's time is measured with a clock that is read twice.
# Measure what reading it costs, and say for how short a layer that would
# spoil the result by one per cent.
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# A reading takes well below a microsecond, so two of them and the addition
# spoil a layer of some fifty microseconds by a per cent. The layers of the
# model above take longer, except the residual sum of one short row.
# :::

# %% exercise 1, checked
import timeit

reading = timeit.timeit(time.perf_counter, number=10_000) / 10_000
verdict("a reading", reading < 5e-6, "takes less than 5 microseconds")

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("2.8")
