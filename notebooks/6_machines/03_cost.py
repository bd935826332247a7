# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       bench.ranks: "The step of a group of processes, measured."
# ---

# %% [markdown]
# # Cost: what a wire allows
#
# > Two numbers describe a wire, one a processor, and together they say how many
# > machines are worth having; measured on two emulated hosts, and then on paper
# > for 512.
#
# *Reading time: 15 minutes. You need: [chapter 6.2](02_shards.ipynb).*

# %% [markdown]
# ## Where we are
#
# The bits do not depend on the number of machines. The time does, and not always as one
# would like. At the end of this chapter you can
#
# - predict the time of a step from a wire's two numbers, and hold it to a
#   measurement;
# - say how many tokens a rank must compute between two exchanges to be worth its
#   place;
# - tell where more machines stop helping, and what is done then;
# - measure all of this on machines of your own.
#
# ## Setup

# %% setup
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import llmnb
from llmnb.book.diagram import PALETTE
from llmnb.book.verify import verdict
from llmnb.model.tensors import parameter_count

measured = json.loads(Path("../../book/machines.json").read_text("utf-8"))
here, link = measured["here"], measured["link"]

# %% [markdown]
# ## A wire in two numbers
#
# A message of $x$ bytes takes a time that grows with $x$ and does not begin at zero:
#
# $$ t(x) = \alpha + \beta x . \tag{6.3.1} $$
#
# $\alpha$ is the **latency**, what even an empty message takes: system calls, the
# journey, the other process waking up. $\beta$ is the time of a byte, one over the **bandwidth**.
# A gigabit a second is $\beta = 8 \cdot 10^{-9}$ seconds.
#
# `tests/record_machines.py` has measured both between two processes of one
# machine, which share memory, and between two *hosts*: network namespaces of
# the same machine, each with a network card of its own that exists in
# software only, and a cable between them whose rate was set. The processes are
# started by `mpirun` with a list of hosts, and talk TCP. The least length gives $\alpha$, the
# greatest $\beta$.


# %% the two numbers
def alpha_beta(rows):
    """Latency and seconds a byte, of the shortest and longest message."""
    (x0, t0), *_, (x1, t1) = rows
    beta = (t1 - t0) / (x1 - x0)
    return t0 - beta * x0, beta


wires = {"one machine": alpha_beta(here["memory of one machine"])}
for name in ("100 Mbit/s", "1 Gbit/s", "10 Gbit/s"):
    wires[name] = alpha_beta(link[name]["wire"])
print(here["machine"], here["cores"], "cores")
for name, (alpha, beta) in wires.items():
    print(f"{name:12} {1e6 * alpha:7.0f} us {8e-9 / beta:8.2f} Gbit/s")

# %% [markdown]
# The cable of 10 gigabits is emulated by the same two cores that compute, and
# gives what they can. The delay of a cable could not be set here; real ones,
# through a switch, add some tens of microseconds.
#
# ## A step
#
# Let an update have $n$ micro-batches, each of which takes a rank $c$ seconds
# forward and backward, and let $u$ be the seconds of AdamW on the whole model.
# Both are divided among the $R$ ranks. The exchange has $k$ parts, in each of
# which a rank sends $R - 1$ messages; the spreading of parameters has $R - 1$
# more. A part is $2^{24}$ bytes for each rank (chapter 6.1), so $k = 4P / 2^{24}$,
# rounded up. With the bytes of (6.1.2), one block to a rank,
#
# $$
# \begin{aligned}
# t_R &= \frac{n c + u}{R} + (k + 1) (R - 1) \alpha \\
#    &\quad {} + 8 P \beta \left(1 - \frac1R\right) .
# \end{aligned}
# \tag{6.3.2}
# $$
#
# The first term falls with $R$, the others grow. The **efficiency** is the share of
# time in which a rank does what one process would have done:
#
# $$ e = \frac{t_1}{R\, t_R} . \tag{6.3.3} $$
#
# ## Predicted, and measured
#
# GPT-2 124M, four rows of 64 tokens to a micro-batch, two of them to an update; a
# thread to each rank. One process with one thread gives $n c + u$, the wires are
# measured, and nothing is left to fit:

# %% predicted against measured
P = parameter_count(llmnb.GPT2Config(64, 50257, 12, 12, 768))
one = here["one process, 1 thread"]["seconds"]
parts = int(np.ceil(4 * P / 2**24))  # of the exchange


def predicted(R, alpha, beta, work=one, size=P, parts=parts):
    """Seconds of a step: (6.3.2)."""
    wire = 8 * size * beta * (1 - 1 / R)
    return work / R + (parts + 1) * (R - 1) * alpha + wire


rows = {"one machine": here["2 ranks, 1 thread each"]}
rows |= {name: link[name] for name in ("1 Gbit/s", "10 Gbit/s")}
print(f"one process, one thread: {one:.2f} s a step")
for name, row in rows.items():
    guess, took = predicted(2, *wires[name]), row["seconds"]
    print(f"{name:12} predicted {guess:5.2f} s, took {took:5.2f} s, "
          f"efficiency {one / 2 / took:.2f}")  # fmt: skip

# %% the same step, drawn tags=["hide-input"]
fig, ax = plt.subplots(figsize=(7.5, 2.6), dpi=100)
for y, (name, row) in enumerate(rows.items()):
    guess = predicted(2, *wires[name])
    ax.barh(y - 0.18, one / 2, 0.32, color=PALETTE["grey"])
    ax.barh(y - 0.18, guess - one / 2, 0.32, left=one / 2,
            color=PALETTE["orange"])  # fmt: skip
    took, waits = row["seconds"], row["communication"]
    ax.barh(y + 0.18, took - waits, 0.32, color=PALETTE["ink"])
    ax.barh(y + 0.18, waits, 0.32, left=took - waits, color=PALETTE["blue"])
ax.set(yticks=range(len(rows)), yticklabels=rows, xlabel="seconds a step")
ax.invert_yaxis()
ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 6.3.1. A step of two ranks. The upper bar of each pair is the
# prediction, work in grey and wire in orange; the lower one is measured, work in
# the colour of the text and time within the calls in blue.*
#
# At 10 gigabits the prediction is met to a few per cent, at one gigabit the step
# takes 27 % longer than predicted. Where is that lost? The calls against the bytes
# alone:

# %% the wire's part
for name in ("1 Gbit/s", "10 Gbit/s"):
    wire = 4 * P * wires[name][1]  # (6.3.2) at R = 2
    took = link[name]["communication"]
    print(f"{name:10} bytes {wire:.2f} s, calls {took:.2f} s, "
          f"ratio {took / wire:.2f}")  # fmt: skip

# %% [markdown]
# So all of it is in the calls. Why those take 1.41 times the bytes at one
# gigabit, and only 1.12 times at ten, we do not know.
#
# ## When a second machine helps
#
# The row of one gigabit says more than that. One process takes 4.54 s for this step,
# two hosts take 8.14 s: the second machine made it *slower*. When does it help?
# Subtract (6.3.2) from $t_1 = n c + u$. Every term has the factor $R - 1$, and
#
# $$ t_R < t_1 \iff R < R_1 , \qquad
#    R_1 = \frac{n c + u - 8 P \beta}{(k + 1)\, \alpha} . \tag{6.3.4} $$
#
# The numerator decides. A step of $R$ ranks is $1/R$ of the work and $1 - 1/R$ of
# $8 P \beta$, and latencies besides. So where $8 P \beta$ is more than the work, no
# number of machines is faster than one. Where it is less, the derivative of (6.3.2)
# by $R$ is zero at $\sqrt{R_1}$: up to there each rank makes the step shorter, beyond
# it longer, for the latencies grow with $R$ and less and less is saved.

# %% the best number of ranks
for name in ("1 Gbit/s", "10 Gbit/s"):
    alpha, beta = wires[name]
    most = (one - 8 * P * beta) / ((parts + 1) * alpha)
    best = f"{np.sqrt(most):.0f}" if most > 1 else "one"
    print(f"{name:10} work {one:.2f} s, bytes up to {8 * P * beta:.2f} s, "
          f"best number of ranks: {best}")  # fmt: skip

# %% [markdown]
# (An update can be shared by at most as many ranks as it has micro-batches. Here these
# are two; the number is that of an update with the same work in smaller ones.)
#
# ## Bytes and memory
#
# Are the bytes those that were derived? Each rank counts what it hands to MPI, and each
# namespace what crosses its end of the cable, with whatever TCP and MPI
# add:

# %% bytes on the cable
sent = here["2 ranks, 1 thread each"]["sent"]
verdict("a rank", sent == [4 * P, 4 * P], "counts (6.1.2)")
for name in ("1 Gbit/s", "10 Gbit/s"):
    row = link[name]
    derived = row["steps"] * 4 * P
    for host, crossed in zip("AB", row["on the link"], strict=True):
        ratio = crossed / derived
        print(f"{name}, host {host}: {ratio:.4f}")
        verdict(f"{name}, host {host}", abs(ratio - 1) < 0.02,
                "to 2 % of (6.1.2)")  # fmt: skip
same = {*here["one process, 2 threads"]["weights"]}
same |= {*here["2 ranks, 1 thread each"]["weights"]}
verdict("weights", len(same) == 1, "the same from 1 and 2")

# %% [markdown]
# A network's usual packet has 1,500 bytes, 1,448 of them data. A real card cuts to that,
# and each packet has 66 bytes of headers, 4.6 % of the data. Here there is up to 0.4 %
# more in all. We take it that a card of software counts what the kernel hands
# to it, which may be as much as 64 KB with one header; we have not looked.
#
# And the memory. Four ranks, four micro-batches to an update, against one process with
# the same update, whose gradients wait for each other besides:

# %% memory of a rank
whole, part = (here[x] for x in ("one process, 4 batches",
                                 "4 ranks, 1 thread each"))  # fmt: skip
share = max(part["m"]) / whole["m"][0]
ratio = max(part["peak"]) / whole["peak"][0]
print(f"m and v: {share:.3f} of one process's; in all: {ratio:.2f}")
verdict("m and v", share < 0.255, "a quarter each")
verdict("in all", ratio < 0.65, "less than 0.65 of it")

# %% [markdown]
# A quarter of $m$ and $v$, yet half of the memory: why? Count in lengths of $4P$ bytes.
# One process holds parameters, gradients, $m$, $v$ and two gradients that wait,
# six in all; a rank holds two and twice a quarter, 2.5, and no gradient waits.
# Either has 0.6 to 0.7 besides, which nobody divides: activations, Python, compiled
# kernels, buffers. $3.2 / 6.6$ is 0.48.
#
# How long does the same step take in PyTorch? Its DistributedDataParallel sums with
# *gloo*, sends buckets of gradients while the backward pass goes on, and keeps m and
# v whole on every rank. Two ranks of one thread, the same model, batch and
# clipping, AdamW fused; one after the other on the same machine. Ours was run
# again for it, and took 2.46 s this time, 2.27 s the first time:

# %% beside PyTorch
ddp = measured["ddp"]
theirs, ours = ddp["seconds"], ddp["ours"]
print(f"torch {ddp['torch']}: {theirs:.2f} s a step, llmnb: {ours:.2f} s, "
      f"ratio {ours / theirs:.2f}")  # fmt: skip

# %% [markdown]
# ## On your machines
#
# These numbers are of one machine. For yours there is `llmnb bench`, which under
# `mpirun` or `srun` measures the group in place of a race:
#
#     mpirun -n 2 llmnb bench --config 124m-64
#     mpirun -n 8 --hostfile hosts llmnb bench --depth 12 --total-batch 16384
#
# An update has one batch for each rank, unless `--total-batch` says more. A stopwatch
# ([chapter 2.8](../2_cpu/08_time.ipynb)) around the group tells what its calls take:
# the wire, and the wait for whoever is late.

# %% imports of the ranks tags=["export"] module="bench.ranks"
import gc
import time
from statistics import median
from types import SimpleNamespace

import numpy as np

from llmnb.bench.bench import WARM_UP
from llmnb.bench.peers import peak_memory
from llmnb.bench.race import Settings, by_key, facts_of, lineup
from llmnb.bench.stopwatch import Stopwatch
from llmnb.model.architectures import architecture_record
from llmnb.model.tensors import parameter_count
from llmnb.train.group import ALONE
from llmnb.train.loop import Progress, train_step
from llmnb.train.options import TrainConfig
from llmnb.train.start import empty_model


# %% batches that cost nothing tags=["exporti"] module="bench.ranks"
def _same(cfg, *shape):
    """A loader whose batches are all the same random tokens."""
    draw = np.random.default_rng(0)
    batch = draw.integers(0, cfg.vocab_size, (2, *shape), np.int32)
    return SimpleNamespace(next_batch=lambda: batch, skip=lambda count: None)


# %% the steps of a rank tags=["exporti"] module="bench.ranks"
def timed_updates(config, cfg, count, group=ALONE):
    """Train for some updates, in a group that all its processes call this in.

    config: a TrainConfig, of which the batches count; cfg: the model's
    configuration. Returns a dict of lists, a number an update, but for
    `WARM_UP` before them: seconds; waiting, those in the group's calls;
    sent, bytes.
    """
    watch, rows, at = Stopwatch(group), [], Progress()
    model = empty_model(config, cfg, config.seed, watch)
    batches = _same(cfg, config.batch_size, config.seq_len)
    for _ in range(WARM_UP + count):
        group.gather("all are here")
        watch.reset()
        before = getattr(group, "sent", 0)
        start = time.perf_counter()
        train_step(config, model, batches, at)
        seconds = time.perf_counter() - start
        sent = int(getattr(group, "sent", 0) - before)
        waiting = sum(watch.seconds.values())
        rows.append({"seconds": seconds, "waiting": waiting, "sent": sent})
    return by_key(rows[WARM_UP:])


# %% [markdown]
# A step of the group takes as long as that of its slowest rank. The efficiency
# (6.3.3) needs $t_1$: the same update, by one rank with its threads, while the others
# rest. That comes last, so that it does not stand in what the first rank's memory
# was at most. Where the whole model does not fit one rank, there is no $t_1$, and the
# report says so.


# %% the group, and one rank alone tags=["exporti"] module="bench.ranks"
def group_contest(name, config, cfg, count, group):
    """Measure the updates of a group, and those of one rank, as a contest.

    All processes call it, with the arguments of `timed_updates`; name: of
    the contest. Raises ValueError when the ranks cannot share an update.
    """
    _check_shared(config, group)
    mine = timed_updates(config, cfg, count, group)
    ranks = group.gather(mine | {"memory_bytes": peak_memory()})
    gc.collect()  # the model; one rank's comes in its place
    one = _alone(config, cfg, count) if group.first else None
    group.rest()
    rows = _group_rows(group, ranks, group.gather(one)[0])
    tokens = config.micro_batches * config.batch_size * config.seq_len
    for row in rows[:2]:
        if "step_seconds" in row:
            row["tokens_per_second"] = tokens / row["step_seconds"]
    return {
        "name": name, "kind": "group", "model": architecture_record(cfg),
        "batch_size": config.batch_size, "seq_len": config.seq_len,
        "total_batch": tokens, "parameters": parameter_count(cfg),
        "about": f"{parameter_count(cfg):,} parameters; updates of "
        f"{config.micro_batches} batches of {config.batch_size} times "
        f"{config.seq_len} tokens; medians of {count}",
        "contestants": rows,
    }  # fmt: skip


def _check_shared(config, group):
    tokens = group.size * config.batch_size * config.seq_len
    if config.micro_batches % group.size:
        raise ValueError(
            f"total_batch must be a multiple of {tokens} tokens, a batch for "
            f"each of {group.size} ranks, got {config.total_batch}"
        )


def _alone(config, cfg, count):
    """The row of one rank that does the whole update."""
    row = {"name": "one rank alone"}
    try:
        found = timed_updates(config, cfg, count)
    except MemoryError as why:
        return row | {"unmeasured": str(why)}
    return row | {"step_seconds": median(found["seconds"])}


# %% its rows tags=["exporti"] module="bench.ranks"
def _group_rows(group, ranks, one):
    """The rows of a contest: one rank, all of them, and each."""
    steps = zip(*(x["seconds"] for x in ranks), strict=True)
    seconds = [max(step) for step in steps]
    every = {"name": f"all {group.size} ranks", "seconds": seconds}
    every["step_seconds"] = median(seconds)
    if "step_seconds" in one:
        share = one["step_seconds"] / group.size  # (6.3.3)
        every["efficiency"] = share / every["step_seconds"]
    each = [
        {
            "name": group.name(rank),
            "waiting_seconds": median(x["waiting"]),
            "sent": median(x["sent"]),
            "memory_bytes": x["memory_bytes"],
        }
        for rank, x in enumerate(ranks)
    ]
    return [one, every, *each]


# %% all that is wanted tags=["export"] module="bench.ranks"
def bench_group(group, configs, settings=None, total_batch=0):
    """Measure the updates of a group; a dict ready for JSON, like `bench`'s.

    configs: a dict from name to (configuration, batch_size, seq_len).
    settings: a `Settings`, without those of a race; threads: of each rank.
    total_batch: tokens of an update; 0: one batch a rank. Raises ValueError
    for what makes no sense.
    """
    settings = settings or Settings()
    lineup(settings)  # so that a mistake is found before anything is built
    result = facts_of(settings) | {"ranks": group.size, "contests": []}
    for name, (cfg, *shape) in configs.items():
        for precision in settings.precisions:
            total = total_batch or group.size * shape[0] * shape[1]
            config = TrainConfig(
                batch_size=shape[0], seq_len=shape[1], total_batch=total,
                precision=precision, backend=settings.backend,
            )  # fmt: skip
            how = config, cfg, settings.steps, group
            contest = group_contest(f"{name}, {precision}", *how)
            result["contests"].append(contest)
    return result


# %% two threads as ranks
from llmnb.bench.report import report
from llmnb.train.rehearsal import rehearse

tiny = {"tiny": (llmnb.GPT2Config(16, 131, 1, 2, 16), 2, 16)}
quick = Settings(steps=2, threads=1)
first, _ = rehearse(2, lambda group: bench_group(group, tiny, quick))
(contest,) = first["contests"]
print(*[row["name"] for row in contest["contestants"]], sep=", ")
whole = 4 * contest["parameters"]
sent = [row["sent"] for row in contest["contestants"][2:]]
verdict("two ranks", sum(sent) == 2 * whole, "send (6.1.2)")
verdict("the report", "efficiency" in report(first), "has all columns")

# %% [markdown]
# ## How many tokens a rank must have
#
# Leave latency and AdamW aside for now. A rank computes $b$ tokens between two
# exchanges, at $6 P$ operations each (1.4.2) and $F$ operations a second. So
# $t_1 = R \cdot 6 P b / F$ and $t_R = 6 P b / F + 8 P \beta (1 - 1/R)$. In (6.3.3) $P$
# drops out:
#
# $$ e = \frac{1}{1 + b_0 / b} , \qquad
#    b_0 = \frac43 \beta F \left(1 - \frac1R\right) . \tag{6.3.5} $$
#
# $b_0$ is the number of tokens at which half of the time is lost, and for many ranks
# nearly $\frac43 \beta F$, as the cell computes it. It depends on the
# machine alone: the better it computes, and the worse its wire, the more
# tokens it must have. Attention, which (1.4.2) adds to $6P$, helps.
#
# And latency? It does not fade as models grow, for $k$ grows with $P$ like the bytes:
# to each part of 16 MB belong $R - 1$ messages. It is small as long as
# $(R - 1) \alpha$ is small beside $2^{24} \beta$, the time of a part. With many ranks and
# a fast wire it is not, whatever the model.

# %% half of the time is lost at
tokens = 2 * 256
F = 6 * P * tokens / one
for rate in (1, 10, 100):
    print(f"{rate:3} Gbit/s: {4 / 3 * 8e-9 / rate * F:8,.0f} tokens "
          f"at {F / 1e9:.0f} GFLOP/s")  # fmt: skip

# %% [markdown]
# ## On paper: 8, 64, 512 machines
#
# Batches cannot grow without end; GPT-2 and its kin learn well from half a million
# tokens to an update, and gain less and less from more. With 524,288 of them, a
# rank of 512 has 1,024. Take machines that compute ten times what one thread
# does here, as sixteen cores may, and let them have wires of three kinds, with 20
# microseconds of latency. (`llmnb` has at most 256 ranks; on paper, 512 are as good.)

# %% on paper tags=["hide-input"]
TOTAL, ALPHA = 524_288, 20e-6
models = {
    "124M": llmnb.GPT2Config(1024, 50257, 12, 12, 768),
    "1.5B": llmnb.GPT2Config(1024, 50257, 48, 25, 1600),
}
print("efficiency" + " " * 14 + "  ".join(f"{R:>5}" for R in (8, 64, 512)))
paper = {}
for name, cfg in models.items():
    size = parameter_count(cfg)
    work, k = 6 * size * TOTAL / (10 * F), np.ceil(size / 2**22)
    for rate in (1, 10, 100):
        row = []
        for R in (8, 64, 512):
            how = ALPHA, 8e-9 / rate, work, size, k
            row.append(work / R / predicted(R, *how))
        paper[name, rate] = row
        print(f"{name} {rate:4} Gbit/s        "
              + "  ".join(f"{e:5.2f}" for e in row))  # fmt: skip

# %% efficiency over machines tags=["hide-input"]
fig, ax = plt.subplots(figsize=(7.5, 3), dpi=100)
many = 2 ** np.arange(1, 11)
for rate, colour in (1, "orange"), (10, "blue"), (100, "green"):
    b0 = 4 / 3 * 8e-9 / rate * 10 * F * (1 - 1 / many)
    e = 1 / (1 + b0 / (TOTAL / many))
    ax.semilogx(many, e, base=2, color=PALETTE[colour])
    ax.text(many[-1] * 1.1, e[-1], f"{rate} Gbit/s", va="center",
            color=PALETTE[colour])  # fmt: skip
ax.axhline(0.5, color=PALETTE["grey"], lw=1, ls="--")
ax.set(xlabel="machines that share 524,288 tokens", ylabel="efficiency",
       ylim=(0, 1.02))  # fmt: skip
ax.set_xticks(many, many)
ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
plt.show()

# %% [markdown]
# *Figure 6.3.2. Equation (6.3.5) for a batch that does not grow. A curve falls
# through one half, the dashed line, where a machine's tokens are $b_0$: beyond it,
# more machines mostly wait. That of 100 gigabits does not come there. The figure leaves
# latency out, the table has it.*
#
# For 512 machines at 100 gigabits the figure says 0.92 and the table 0.70, for the
# small model and for the large. That is latency: 511 messages of 20
# microseconds are 10 ms, and the 16 MB that they carry take 1.3 ms.
#
# Where a curve has fallen, other things are done. *Send less*: two bytes a
# number, for half of the wire's time, at the price of rounding. *Send meanwhile*, while
# the backward pass goes on: see the next section. *Split the model*, not the
# batch: with layers, or parts of their matrices, on different machines, activations
# cross the wire in place of gradients, and a machine holds a part of
# the model only. A model that does not fit into one machine needs this, or the second
# and third stage of ZeRO, which put gradients and parameters into shards too
# ([chapter 6.2](02_shards.ipynb)). None of these is in `llmnb`.
#
# ## Why nothing is sent meanwhile
#
# The gradients of the last block are there while the first block is still computed.
# Most programs send them then, a *bucket* for each block, and hide a part of the wire
# behind the work. What could that hide here?
#
# Not the parameters, which are spread after the update: half of the bytes. Of the
# gradients only those of a rank's last micro-batch, since until then
# the sum is not whole; and of these only the blocks'. The table of tokens is used first and
# last. Its gradient begins with the head, and the encoder adds to it when all else is
# done. So the owner of a shard gets, before the end of the pass, the part of it that
# belongs to blocks. Where that is least, the wire has most to do afterwards, and
# the others wait. With $q$ for the least such part of a shard, a step becomes
# shorter by at most
#
# $$ q \cdot 4 P \beta \left(1 - \frac1R\right) . \tag{6.3.6} $$

# %% what is ready early
from llmnb.model.tensors import full_shape, tensor_table
from llmnb.train.exchange import shards


def ready(cfg, R):
    """The least part of a shard that belongs to blocks."""
    blocks, at = [], 0
    for x in tensor_table(cfg):
        size = int(np.prod(full_shape(x, cfg)))
        blocks += [(at, at + size)] * x.stacked
        at += size
    return min(
        sum(max(0, min(b, stop) - max(a, start)) for a, b in blocks)
        / (stop - start)
        for start, stop in shards(at, R)
    )


small = models["124M"]
for R in (2, 3, 4, 8):
    print(f"{R} ranks: {ready(small, R):.2f}")
beta = wires["1 Gbit/s"][1]
saved = ready(small, 2) * 4 * P * beta / 2
print(f"1 Gbit/s: {saved:.2f} s of {link['1 Gbit/s']['seconds']:.2f}")

# %% [markdown]
# From four ranks on the table fills a shard by itself, and nothing can be gained. With
# two it is something, on a wire where two ranks are slower than one.
# `tests/overlapped.py` is a prototype for two ranks: a thread sends each block's
# gradients as they come. It was measured in turns with what `llmnb` does, a step of
# one, a step of the other, but not on free cores: other programs wanted them
# too. So only the two columns can be compared, and not with the other tables.

# %% sending after the pass, and meanwhile
overlap = measured["overlap"]
print(f"on average {overlap['load']:.0f} threads wanted {overlap['cores']} "
      "cores before it")  # fmt: skip
for name in ("one machine", "1 Gbit/s", "10 Gbit/s"):
    row = overlap[name]
    kinds = [np.array(row[x][1:]) for x in ("after", "meanwhile")]
    after, meanwhile = (float(np.median(x)) for x in kinds)
    print(f"{name:12} after {after:5.1f} s, meanwhile {meanwhile:5.1f} s, "
          f"ratio {meanwhile / after:.2f}")  # fmt: skip
    verdict(name, row["same as without"], "the same weights")
    spread = max(np.ptp(x) for x in kinds)
    verdict(name, abs(after - meanwhile) < spread, "within the turns")

# %% [markdown]
# The weights are the same. On such cores no difference is larger than that among
# turns of one kind. On free cores it has not been measured; there (6.3.6) is the
# most that two ranks could gain, and four gain nothing. So `llmnb` sends when the
# pass is done.
#
# ## Take away
#
# - A wire is $\alpha + \beta x$. $\beta$ decides, for models of any size, as long as
#   $(R - 1) \alpha$ is small beside the time of 16 MB.
# - Where the bytes take longer than the work, a second machine makes a step
#   slower, and so does a third.
# - On given machines, efficiency depends on the tokens that a rank computes between
#   two exchanges, and not on the model.
# - With a fixed batch every added machine has fewer tokens; half of the time
#   is lost at $b_0$.
#
# ## Design note
#
# Sending meanwhile could gain more if shards were dealt out crosswise, a part of
# each block to each rank. Then every bucket would have something for every owner, and
# only the table would come late. But a shard would be a hundred ranges in place of
# one, of parameters, gradients, $m$ and $v$, and the pieces of the norm would
# have to be cut anew. It takes a queue as well, and a thread that drives the library
# while kernels compute, on cores that would compute too.
#
# ## Exercises
#
# **1** (★). A wire of 1 gigabit, machines of 500 GFLOP/s. With how many tokens to each
# is the efficiency 0.9?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# For many machines $b_0 = \frac43 \cdot 8 \cdot 10^{-9} \cdot 5 \cdot 10^{11} = 5333$
# tokens; an efficiency of 0.9 needs nine times that, 48,000.
# :::

# %% exercise 1, checked tags=["hide-cell"]
b0 = 4 / 3 * 8e-9 * 5e11
print(f"{b0:.0f} {9 * b0:.0f} {1 / (1 + b0 / 48_000):.2f}")

# %% [markdown]
# ## Further reading
#
# - Hockney (1994), [The communication challenge for
#   MPP](https://doi.org/10.1016/S0167-8191(06)80021-9): where (6.3.1) is from.
# - McCandlish et al. (2018), [An Empirical Model of Large-Batch
#   Training](https://arxiv.org/abs/1812.06162): how large a batch is worth its tokens.
#
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("6.3")
