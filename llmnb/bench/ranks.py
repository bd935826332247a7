# Written by `make export` from notebooks/6_machines/03_cost.py: edit that file.

"""The step of a group of processes, measured."""

__all__ = ["bench_group"]


# imports of the ranks
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


# batches that cost nothing
def _same(cfg, *shape):
    """A loader whose batches are all the same random tokens."""
    draw = np.random.default_rng(0)
    batch = draw.integers(0, cfg.vocab_size, (2, *shape), np.int32)
    return SimpleNamespace(next_batch=lambda: batch, skip=lambda count: None)


# the steps of a rank
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


# the group, and one rank alone
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


# its rows
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


# all that is wanted
def bench_group(group, configs, settings=None, total_batch=0):
    """Measure the updates of a group; a dict ready for JSON, like `bench`'s.

    configs: a dict from name to (configuration, batch_size, seq_len).
    settings: a `Settings`, without those of a race; threads: of each rank.
    total_batch: tokens of an update; 0: one batch a rank. Raises ValueError
    for what makes no sense.

    Derived in chapter 6.3.
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
