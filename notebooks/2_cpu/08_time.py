# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       bench.stopwatch: "A stopwatch around a backend: where a step's time goes."
#       bench.bench: "Training steps, starts and texts measured, alone or in a race."
# ---

# %% [markdown]
# # Where the time goes: a step, layer by layer
#
# > A stopwatch around the layers says what to make faster next; a report says
# > how fast the whole is, beside others and beside the machine's limit.
#
# *Reading time: 25 minutes. You need: [chapter 2.7](07_step.ipynb).*

# %% [markdown]
# ## Where we are
#
# A speed that you cannot measure is a speed that you cannot improve. This
# chapter builds most of `llmnb bench`. At its end you can
#
# - say which layer takes the time of a step, on your machine;
# - say what keeps a product from the peak, by leaving parts of it out;
# - read a report, and say what its numbers are shares of;
# - read the [results page](../../book/results.md).
#
# How two programs are compared so that the machine's moods cancel is told in
# [chapter A.8](../appendix/08_racing.ipynb).

# %% [markdown]
# ## Setup

# %% setup
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from llmnb.book.diagram import PALETTE
from llmnb.book.verify import verdict
from llmnb.config import GPT2Config
from llmnb.model.gpt2 import GPT2

V, B, T = 1024, 8, 64
cfg = GPT2Config(T, V, num_layers=4, num_heads=4, channels=128)
model = GPT2(cfg, batch_size=B, seq_len=T)

# %% [markdown]
# ## Where the time goes
#
# Chapters 2.1 to 2.5 timed their layers alone. In a training step they run
# together, and we want to know which one to make faster next. The model
# calls its layers through one object, its backend. `Stopwatch` stands in
# for that object: it hands out the same functions, each wrapped so that
# its time is added up.

# %% imports of the benchmark tags=["export"] module="bench.stopwatch"
import time


# %% a stopwatch around a backend tags=["export"] module="bench.stopwatch"
class Stopwatch:
    """An object whose functions add up the seconds they take.

    watched: an object with functions as attributes, such as a backend's
    layers. wait: what to call before a clock is read, where functions return
    before their work is done, as on a GPU. seconds, calls: dicts from
    function name to what has been added up since `reset`.
    """

    def __init__(self, watched, wait=lambda: None):
        self._watched, self.wait = watched, wait
        self.reset()

    def reset(self):
        """Forget what has been measured."""
        self.seconds, self.calls = {}, {}

    def __getattr__(self, name):
        function = getattr(self._watched, name)
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
# The step that we measure is forward, backward and update. A second stopwatch
# stands around the model itself and takes their times. The step does not clip
# gradients: llm.c's program on a CPU does not, and in a race all programs must
# do the same work.


# %% one measured step tags=["export"] module="bench.stopwatch"
def timed_step(model, tokens, targets, step):
    """Train a GPT2 once; say what each part and each layer took.

    model.ops must be a `Stopwatch`. step: counts from 1. Returns a dict: the
    loss, a float; parts and layers, dicts from name to seconds; calls, a
    dict from layer to a count.
    """
    layers, parts = model.ops, Stopwatch(model, model.ops.wait)
    layers.reset()
    loss = parts.forward(tokens, targets)
    parts.backward()
    parts.update(step=step)
    found = {"loss": loss, "parts": parts.seconds}
    return found | {"layers": layers.seconds, "calls": layers.calls}


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

# %% draw a step of GPT-2 124M tags=["hide-input"]
path = Path("../../book/results/1-zen3.json")
found = json.loads(path.read_text("utf-8"))
race = next(x for x in found["contests"] if x["name"] == "124m-64")
row = next(x for x in race["contestants"] if x["name"] == "llmnb fp32")
bars = {}
for layer in row["layers"]:
    words = re.fullmatch(r"(.*?)(?:_(forward|backward))?", layer["name"])
    bar = bars.setdefault(words[1].replace("_softmax", ""), {})
    bar[words[2] or "forward"] = 1000 * layer["seconds"]

fig, ax = plt.subplots(figsize=(8, 3), dpi=100)
for name, bar in sorted(bars.items(), key=lambda x: sum(x[1].values())):
    left = 0
    for way, colour in (("forward", "blue"), ("backward", "orange")):
        ax.barh(name, bar.get(way, 0), left=left, color=PALETTE[colour])
        left += bar.get(way, 0)
    ax.text(left + 12, name, f"{left:.0f}", va="center")
style = {"ha": "center", "va": "center", "color": "white"}
ax.text(bar["forward"] / 2, name, "forward", **style)
ax.text(left - bar["backward"] / 2, name, "backward", **style)
ax.set(xlabel="milliseconds of a step", xlim=(0, 1.08 * left))
ax.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# *Figure 2.8.1. A step of GPT-2 124M with four rows of 64 tokens: almost
# nine tenths of it are matrix products. Measured with two threads on the first
# machine of the [results page](../../book/results.md).*

# %% [markdown]
# Most of the time goes into `matmul`, as the counts of
# [chapter 1.7](../1_by_hand/07_matmul.ipynb) foretold, and the backward pass takes more
# than the forward pass: it forms two products for each one of the forward
# pass. `llmnb bench` prints such a table for any configuration, and
# `llmnb bench --plot layers.png` draws it.
#
# The arena keeps a promise of [chapter 1.16](../1_by_hand/16_memory.ipynb). It is laid out
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
# ## What binds a product
#
# At the peak of the multiply-adds ([chapter A.2](../appendix/02_tile.ipynb)) a
# product would take its $2 \cdot \text{rows} \cdot \text{columns} \cdot
# \text{depth}$ operations over that peak. It takes longer. Which part of it is
# to blame? We leave parts out and see what time goes with them. The kernel of
# [chapter 2.4](04_matmul.ipynb) calls two routines that pack its factors, by
# their addresses; in place of either we hand it the address of one that packs
# nothing. The result is wrong then. The tiles do all their work just the same,
# on whatever lies in the panels.

# %% a product with parts left out
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

from numba import types

from llmnb import cpu
from llmnb.backend import recorded
from llmnb.bench.peak import fma_peak
from llmnb.cpu import matmul
from llmnb.cpu.jit import arguments, routine, team
from llmnb.cpu.panels import BLOCK, scratch, work_shape
from llmnb.timing import fastest, machine


def pack_nothing(panels, to, source, block):
    pass


numbers = types.CPointer(types.float32)
signature = types.void(numbers, types.int64, numbers, BLOCK)
nothing = routine(pack_nothing, signature)
work = np.zeros(work_shape(), np.float32)


def product_time(out, a, b, parts="rows columns"):
    """Seconds of out = a @ b in which only some factors are packed."""
    code, panels, _ = scratch(work, False, out.dtype)
    kept = ["rows" in parts, "columns" in parts, True]
    code = tuple(np.where(kept, code, nothing.address).tolist())
    with patch.object(matmul, "scratch", lambda *_: (code, panels, work)):
        return fastest(partial(matmul._product, out, a, b), runs=3)


# %% a small one, wrong and right
a, b = np.ones((2, 32, 32), np.float32)
out = np.zeros((32, 32), np.float32)
product_time(out, a, b, "")
verdict("no panels", not out.any(), "so their zeros are multiplied")
product_time(out, a, b)
verdict("both packed", (out == 32).all(), "the product")

# %% [markdown]
# Each weight of GPT-2 124M is in three products: forward, the gradient of what
# came in, and its own gradient. Here are all of them for a batch of 256
# tokens. *Tiles* is the share of the peak that the tiles reach alone; the next
# two columns say what packing each factor adds, in shares of the whole time;
# *memory* is the share in which the memory could copy all three matrices.

# %% the products of a step tags=["nbval-ignore-output"]
sizes = {
    "q, k, v": (768, 2304),
    "projection": (768, 768),
    "up to 4C": (768, 3072),
    "down to C": (3072, 768),
    "logits": (768, 50304),
}
tokens, peak = 256, fma_peak()
source, target = np.ones((2, 1 << 25), np.float32)
copied = 2 * source.nbytes / fastest(np.copyto, target, source, runs=5)
spent = np.zeros(3)
print(f"{machine()}, peak {peak / 1e9:.0f} GFLOP/s")
print(f"{'':22}{'ms':>8}  of peak  tiles  rows  columns  memory")
for name, (C, OC) in sizes.items():
    x, dy = np.ones((tokens, C), np.float32), np.ones((tokens, OC), np.float32)
    w = np.ones((OC, C), np.float32)
    ways = {
        "forward": (dy, x, w.T),
        "dinp": (x, dy, w),
        "dweight": (w, dy.T, x),
    }
    for way, (y, a, b) in ways.items():
        least = 2 * a.size * b.shape[1] / peak
        whole = product_time(y, a, b)
        tiles = product_time(y, a, b, "")
        rows, columns = (
            product_time(y, a, b, part) - tiles for part in ("rows", "columns")
        )
        moved = 4 * (y.size + a.size + b.size) / copied
        blocks = 1 if name == "logits" else 12
        spent += blocks * np.array([whole, tiles, least])
        print(
            f"{name:12}{way:10}{1000 * whole:8.2f}{least / whole:9.0%}"
            f"{least / tiles:7.0%}{rows / whole:6.0%}{columns / whole:9.0%}"
            f"{moved / whole:8.0%}"
        )
least, tiles = spent[2] / spent[:2]
print(f"{'a step':22}{1000 * spent[0]:8.2f}{least:9.0%}{tiles:7.0%}")

# %% [markdown]
# Of what is missing to the peak, about half is lost in the tiles, which begin
# and end their sums and wait for panels from the second cache. They are mostly
# slowest in `dweight`: its sums go over the 256 tokens, and are short. The
# rest is lost while the product packs. Memory alone does not say why: it could move
# all three matrices in less than a fifth of the time, and most of that goes on while
# the tiles compute, for they ask for the next columns meanwhile. What counts is
# how often a packed number is used. A weight is packed once for all tokens,
# and 256 of them are not many. (The columns need not add up: a panel that was
# just packed is in the cache, and the tiles that read it are faster for it.)
#
# This is how the products were improved. What looked slow was left out first,
# and only what bought time by its absence was worth the work. Some of that
# bought nothing when it was done, and is not there: wider blocks of columns,
# asking the memory for the next packed panel too, spreading over all tiles what
# is asked of columns that lie side by side.
#
# ## What a launch costs
#
# A small model has another enemy. To run a kernel, Python hands over its arrays and
# wakes the other threads: a *launch*. Before it, the layer has checked the arrays. That
# takes the same time whether they are long or short. We count the launches of
# a step, time an empty one, and run a step whose launches are left out
# altogether. What is left is Python, and the little that runs on one thread without a
# launch: the encoder, zeros, the last sums of the norms. We do that twice, first as the
# model trains, replaying what its first step noted down
# ([chapter A.13](../appendix/13_backend.ipynb)), and then with layers that are
# watched, so that each of them is called in every step.

# %% launches and Python tags=["nbval-ignore-output"]
from llmnb.cpu import jit


@team
def idle(part, parts, address):
    arguments(address)


def step():
    model.forward(text[:, :-1], text[:, 1:])
    model.backward()
    model.update()


whole, launches, begin = fastest(step, runs=20), [], jit._begin
with patch.object(jit, "_begin", lambda *a: launches.append(begin(*a))):
    step()
row, grid = np.zeros(4, np.float32), np.zeros((4, 4), np.float32)
given = row, row, grid, grid, (1, 2, 3), (1, 2, 3, 4, 5, 6, 7), True
((launch, given),) = recorded(partial(idle, *given))
empty = len(launches) * fastest(launch, *given, runs=1000)
with patch.object(jit, "_begin", lambda *a: None):
    replayed = fastest(step, runs=20)
    layers, model.ops = model.ops, SimpleNamespace(**vars(cpu))
    called = fastest(step, runs=20)
    model.ops = layers
print(f"a step: {1000 * whole:.1f} ms, {len(launches)} launches")
print(f"empty launches            {empty / whole:6.1%}")
print(f"the rest, replaying       {replayed / whole:6.1%}")
print(f"the rest, layers called   {called / whole:6.1%}")

# %% [markdown]
# A launch itself costs some microseconds. Calling a layer costs more than that
# before its first launch, all of it in Python: for each array, is it of the right
# dtype and shape, does it overlap another, which compiled routine takes such
# arrays? In a replay none of this is asked. What is left of Python is the handing
# over of arguments, the check of the batch, and AdamW, whose numbers change from
# step to step. A wider model does more in each launch and would hardly notice
# either; this one notices.

# %% [markdown]
# ## What is measured
#
# `race` ([chapter A.8](../appendix/08_racing.ipynb)) gives the times of
# programs in turns, each in a process of its own. What is left is to say what
# they are to do, and to gather the numbers. Everything that can be measured
# is a **contest**: a dict with a name, a sentence about what is done, and a
# row for each contestant, with its seconds round by round or the reason why it
# has none. Four kinds stand here: a training step, the losses of a GPU's
# steps beside the CPU's, the start of a process, and a text that is written.
# The fifth is a kernel on a GPU ([chapter A.7](../appendix/07_ladders.ipynb)).
#
# Some configurations have names: a small model, GPT-2 with 124 million
# parameters on short and on long texts, and a batch that is worth a GPU.

# %% imports of the benchmark of steps tags=["export"] module="bench.bench"
import math
import tempfile
from functools import partial
from statistics import median

from llmnb.arena import footprint
from llmnb.backend import PRECISIONS
from llmnb.bench.peers import write_random
from llmnb.bench.race import (
    STARTS,
    Settings,
    by_key,
    facts_of,
    lineup,
    race,
    race_starts,
    ratios,
)
from llmnb.checks import SMALLER, check_room
from llmnb.config import GPT2Config
from llmnb.cpu.bfloat16 import has_bf16
from llmnb.model.layout import gpt2_layout
from llmnb.model.tensors import flops_per_token, parameter_count

# %% named configurations tags=["export"] module="bench.bench"
CONFIGS = {
    "small": (GPT2Config(64, 256, 4, 4, 128), 12, 64),
    "124m-64": (GPT2Config(), 4, 64),
    "124m-256": (GPT2Config(), 4, 256),
    "124m-1024": (GPT2Config(), 1, 1024),
    "124m-16x1024": (GPT2Config(), 16, 1024),
}
WARM_UP = 2  # rounds that are not measured: they compile and touch memory


# %% the benchmark tags=["exporti"] module="bench.bench"
def _record(cfg):
    """A configuration for JSON."""
    from llmnb.model.architectures import architecture_record  # Part 5

    return architecture_record(cfg)


def _model_words(cfg):
    family = "" if cfg.family == "gpt2" else f"{cfg.family}, "
    return (
        f"{family}{cfg.num_layers} layers, {cfg.channels} channels, "
        f"{cfg.num_heads} heads, {cfg.vocab_size:,} tokens in the vocabulary"
    )


# %% the benchmark tags=["export"] module="bench.bench"
def bench(configs, settings=None, start=False, bar=iter, keep=None):
    """Measure training steps, and starts; a dict ready for JSON.

    configs: a dict from name to (GPT2Config, batch_size, seq_len), such as
    `CONFIGS`. settings: a `race.Settings`. start: whether to measure starts
    of the small model too. bar: see `race`. keep: called with the result so
    far after each contest, to be written down. contests, a list, holds what
    was measured. Seconds are of the rounds, in order; memory is in bytes.
    Raises ValueError, MemoryError, ChildProcessError, or FloatingPointError
    at a loss that is not finite, in one sentence.
    """
    settings = settings or Settings()
    lineup(settings)  # so that a mistake is found before anything is built
    result = facts_of(settings) | {"contests": []}
    parts = [partial(_steps, k, *x, settings, bar) for k, x in configs.items()]
    if "gpu" in result and configs:
        parts.append(partial(losses_contest, settings.precisions, settings))
    if start:
        parts.append(partial(_starts, *CONFIGS["small"], settings, bar))
    for part in parts:
        result["contests"].append(part())
        _set_limit(result["contests"])
        if keep:
            keep(result)
    return result


def _set_limit(contests):
    """The best peak of all rows: others can only lower what a row measures."""
    rows = [row for x in contests for row in x["contestants"]]
    peak = max((row.get("fma_peak", 0) for row in rows), default=0)
    for contest in contests:
        contest["limit"] = peak if "work" in contest else 0


# %% a contest of steps tags=["exporti"] module="bench.bench"
def _specs(cfg, batch_size, seq_len, settings):
    """The specs of all contestants of some Settings, on one shape."""
    shape = {"model": _record(cfg), "batch_size": batch_size}
    shape |= {"seq_len": seq_len}
    return {k: x | shape for k, x in lineup(settings).items()}


def _check_together(cfg, batch_size, seq_len, settings):
    """Raise MemoryError when our own contestants alone do not fit."""
    ours = sum(
        settings.backend in PRECISIONS[x] and (x != "bf16" or has_bf16())
        for x in settings.precisions
    )
    ours *= 1 + settings.in_backward
    layout = gpt2_layout(cfg, batch_size, seq_len)
    if settings.backend != "cuda":
        size = ours * sum(footprint(layout).values())
        check_room(size, "fewer precisions, or " + SMALLER)


def _steps(name, cfg, batch_size, seq_len, settings, bar):
    """The contest of training steps on one shape."""
    _check_together(cfg, batch_size, seq_len, settings)
    specs = _specs(cfg, batch_size, seq_len, settings)
    tokens = batch_size * seq_len
    flops = flops_per_token(cfg, seq_len) * tokens
    rows = race(specs, WARM_UP + settings.steps, settings, bar)
    rows = [_step_row(row, tokens, flops) for row in rows]
    about = (
        f"{_model_words(cfg)}, {parameter_count(cfg):,} parameters; batches "
        f"of {batch_size} times {seq_len} tokens; {settings.steps} rounds of "
        f"turns of at least {settings.turn:g} s"
    )
    return {
        "name": name, "kind": "step", "about": about, "model": _record(cfg),
        "batch_size": batch_size, "seq_len": seq_len,
        "parameters": parameter_count(cfg), "work": flops,
        "contestants": rows, "ratios": ratios(rows),
    }  # fmt: skip


# %% one contestant tags=["exporti"] module="bench.bench"
def _step_row(row, tokens, flops):
    """What is kept of a contestant's answers: those of the measured rounds."""
    if "unmeasured" in row:
        return row
    losses = row.pop("loss")
    _check_losses(row["name"], losses)
    row["seconds"] = row["seconds"][WARM_UP:]
    row["step_seconds"] = median(row["seconds"])
    row["tokens_per_second"] = tokens / row["step_seconds"]
    row["flops_per_second"] = flops / row["step_seconds"]
    row["memory_bytes"] = row.get("device_bytes", row["peak_bytes"])
    row["first_loss"] = losses[0]
    if "apart" in row:  # steps of their own, whose layers were timed
        row |= _layer_times(by_key(row.pop("apart")))
    return row


def _check_losses(name, losses):
    """Raise at a loss that is not finite: who computes no numbers is fast."""
    for step, loss in enumerate(losses):
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"{name}: the loss is {loss} at step {step}, so its time "
                "means nothing"
            )


def _layer_times(steps):
    """Medians: of each part, and a dict a layer, in the order of first use."""
    parts, layers = by_key(steps["parts"]), by_key(steps["layers"])
    whole = [sum(x.values()) for x in steps["parts"]]
    spent = [sum(x.values()) for x in steps["layers"]]
    layers["(the rest)"] = [a - b for a, b in zip(whole, spent, strict=True)]
    calls = steps["calls"][0]
    return {
        "parts": {name: median(each) for name, each in parts.items()},
        "layers": [
            {"name": k, "calls": calls.get(k, 1), "seconds": median(each)}
            for k, each in layers.items()
        ],
    }


# %% a contest of starts tags=["exporti"] module="bench.bench"
def _starts(cfg, batch_size, seq_len, settings, bar):
    """The contest of first steps; llm.c has no compiled code to keep."""
    specs = _specs(cfg, batch_size, seq_len, settings)
    specs.pop("llm.c", None)
    about = (
        "seconds from the start of a process to the end of its first step of "
        "the small model, cold, with nothing compiled before, and warm, with "
        f"what the cold start compiled; {STARTS} starts"
    )
    rows = race_starts(specs, settings, bar)
    found = {"name": "starts", "kind": "start", "about": about}
    return found | {"contestants": rows}


# %% [markdown]
# A GPU can be fast at computing something else. From the same first weights
# and on the same batch it must go down the CPU's curve of losses, so these
# are compared whenever steps are timed on a GPU.


# %% the same losses tags=["exporti"] module="bench.bench"
def losses_contest(precisions, settings, steps=20, config=CONFIGS["small"]):
    """Train a small model on the CPU and on the GPU, from the same start.

    precisions: of the GPU's models. settings: see `race`. config: a
    GPT2Config, batch size and length. Returns a contest whose rows hold the
    losses of the steps, and worst, the largest difference from the CPU's in
    fp32. Raises FloatingPointError when a loss is not finite, and
    ChildProcessError when there are none of the CPU to compare with.
    """
    (spec,) = _specs(*config, Settings()).values()  # ours, on the CPU
    specs, there = {"cpu fp32": spec}, spec | {"backend": "cuda"}
    specs |= {f"cuda {x}": there | {"precision": x} for x in precisions}
    rows = race(specs, steps, settings._replace(turn=0))
    if "unmeasured" in rows[0]:  # with which all others are compared
        raise ChildProcessError(f"{rows[0]['name']}: {rows[0]['unmeasured']}")
    want = rows[0]["loss"]
    for row in rows:
        if "unmeasured" not in row:
            _check_losses(row["name"], row["loss"])
            pairs = zip(want, row["loss"], strict=True)
            row["worst"] = max(abs(a - b) for a, b in pairs)
    about = f"{steps} losses of the small model against those of the CPU"
    found = {"name": "losses", "kind": "losses", "about": about}
    return found | {"contestants": rows}


# %% a contest of writers tags=["export"] module="bench.bench"
WRITERS = {"llmnb": "llmnb-decoder", "transformers": "transformers"}
TOKEN_TIMES = {"first_seconds": "first token", "token_seconds": "later token"}


def bench_writers(cfg, prompt=64, count=64, settings=None):
    """Race a Decoder and transformers' generate on one random model.

    cfg: a GPT2Config. prompt, count: tokens to read and to write. settings:
    a `race.Settings`: its steps are the texts to measure, after one that is
    not. Returns a dict ready for JSON; seconds are those of the rounds, in
    order: of the first token, which reads the prompt, and of a later one,
    the median of a text. Raises ValueError for numbers that do not fit the
    model and ChildProcessError in one sentence.
    """
    if prompt < 1 or count < 2 or prompt + count > cfg.max_seq_len:
        raise ValueError(
            f"a prompt of {prompt} and {count} more tokens: must be at least "
            f"1 and 2, together at most {cfg.max_seq_len}"
        )
    settings = (settings or Settings())._replace(turn=0)
    lineup(settings)  # so that a mistake is found before anything is built
    result = facts_of(settings)
    spec = {"vocab_size": cfg.vocab_size, "prompt": prompt, "count": count}
    with tempfile.TemporaryDirectory() as folder:
        write_random(folder, cfg)
        spec["folder"] = folder
        specs = {k: spec | {"kind": kind} for k, kind in WRITERS.items()}
        rows = race(specs, 1 + settings.steps, settings)
    for row in rows:
        if "unmeasured" in row:
            raise ChildProcessError(row["unmeasured"])
    contest = {"name": "writing", "kind": "write", "model": vars(cfg)}
    contest["ratios"] = []
    for kind, words in TOKEN_TIMES.items():
        for row in rows:
            row[kind] = row[kind][1:]
        contest["ratios"] += [x | {"of": words} for x in ratios(rows, kind)]
    for row in rows:
        del row["seconds"]  # of a whole text
        row["tokens_per_second"] = 1 / median(row["token_seconds"])
    texts = [row.pop("tokens")[1:] for row in rows]
    contest["same_tokens"] = all(text == texts[0] for text in texts)
    same = "the same" if contest["same_tokens"] else "OTHER"
    contest["about"] = (
        f"{_model_words(cfg)}, random weights; a prompt of {prompt} tokens "
        f"and {count} more, always the likeliest; both wrote {same} tokens; "
        f"{settings.steps} texts"
    )
    return result | {"contests": [contest | {"contestants": rows}]}


# %% [markdown]
# ## A report
#
# What was measured becomes a table for each contest, which
# [chapter 4.26](../4_practice/26_bench.ipynb) prints: a row for each contestant,
# and a column for each of our own with its share of the other's time. *Of
# limit* is the share of the multiply-adds that this processor reaches in a
# loop of nothing else ([chapter A.2](../appendix/02_tile.ipynb)). Where the time
# goes is measured in other steps, in which each layer is called and nothing is
# replayed. They take longer, so the shares, of a step of the first table, may
# come to more than a whole.
#
# Here is the benchmark on this chapter's configuration, three rounds and
# nobody to race against.

# %% measured in a process of its own tags=["nbval-ignore-output"]
from llmnb.bench.bench import bench
from llmnb.bench.race import Settings
from llmnb.bench.report import report

print(report(bench({"this chapter": (cfg, B, T)}, Settings(steps=3))))

# %% [markdown]
# With PyTorch or llm.c on your machine, `llmnb bench --config 124m-64
# --against torch llmc=PATH` races against them. The
# [results page](../../book/results.md) shows such races.

# %% [markdown]
# ## Take away
#
# - A step's time is the sum of its layers' times, and the products take most
#   of it.
# - To know what a part costs, leave it out.
# - Say with every number on which machine it was measured, and how busy that
#   machine was.
#
# ## Design note
#
# A profiler would find the slow layer without a line of our own code. But a
# profiler that watches Python's calls charges each of them a microsecond or
# so, and one that samples the processor does not know where a layer begins.
# Our layers are a hundred calls or so a step, most of them far longer than a
# clock takes to read (exercise 1), and that needs no tool.

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
# spoil a layer of some fifty microseconds by a per cent. Here a LayerNorm takes
# half of that, and a product several times as much.
# :::

# %% exercise 1, checked
import timeit

reading = timeit.timeit(time.perf_counter, number=10_000) / 10_000
layer = 100 * 2 * reading  # seconds, of which two readings are one per cent
verdict("a layer", layer < 1e-3, "of 1 ms is spoilt by less")

# %% [markdown]
# **2** (★). Set `tokens = 1024` in the table of products. Say before you run it
# in which of the three products of a weight the tiles will gain most, and why.
#
# :::{admonition} Solution to exercise 2
# :class: dropdown
# In `dweight`. There the sums go over the tokens, and what it costs to fetch a
# tile of `out` and to write it is spread over their number, or over the 768 steps
# that panels hold if there are more. In the other two the sums go over channels, as
# before.
# :::

# %% exercise 2 tags=["hide-cell"]
answer = "dweight"

# %% exercise 2, checked
from llmnb.cpu.panels import LENGTH


def steps_a_tile(tokens, C=768, OC=3072):
    """Of each product: how long the sums are, in panels, on average."""
    sums = {"forward": C, "dinp": OC, "dweight": tokens}
    return {way: n / -(-n // LENGTH) for way, n in sums.items()}


few, many = steps_a_tile(256), steps_a_tile(1024)
for way in few:
    print(f"{way:8} {few[way]:4.0f} steps a tile, then {many[way]:.0f}")
most = max(few, key=lambda way: many[way] / few[way])
verdict("the tiles", answer == most, f"gain most in {most}")

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("2.8")
