# Written by `make export` from notebooks/2_cpu/08_time.py: edit that file.

"""Training steps, starts and texts measured, alone or in a race."""

__all__ = [
    "CONFIGS", "TOKEN_TIMES", "WARM_UP", "WRITERS", "bench", "bench_writers",
]


# imports of the benchmark of steps
import math
import tempfile
from functools import partial
from statistics import median

from llmnb.arena import footprint
from llmnb.backend import PRECISIONS
from llmnb.bench.peers import write_random
from llmnb.bench.race import (
    STARTS, Settings, by_key, facts_of, lineup, race, race_starts, ratios,
)
from llmnb.checks import SMALLER, check_room
from llmnb.config import GPT2Config
from llmnb.cpu.bfloat16 import has_bf16
from llmnb.model.layout import gpt2_layout
from llmnb.model.tensors import flops_per_token, parameter_count


# named configurations
CONFIGS = {
    "small": (GPT2Config(64, 256, 4, 4, 128), 12, 64),
    "124m-64": (GPT2Config(), 4, 64),
    "124m-256": (GPT2Config(), 4, 256),
    "124m-1024": (GPT2Config(), 1, 1024),
    "124m-16x1024": (GPT2Config(), 16, 1024),
}
WARM_UP = 2  # rounds that are not measured: they compile and touch memory


# the benchmark
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


# the benchmark
def bench(configs, settings=None, start=False, bar=iter, keep=None):
    """Measure training steps, and starts; a dict ready for JSON.

    configs: a dict from name to (GPT2Config, batch_size, seq_len), such as
    `CONFIGS`. settings: a `race.Settings`. start: whether to measure starts
    of the small model too. bar: see `race`. keep: called with the result so
    far after each contest, to be written down. contests, a list, holds what
    was measured. Seconds are of the rounds, in order; memory is in bytes.
    Raises ValueError, MemoryError, ChildProcessError, or FloatingPointError
    at a loss that is not finite, in one sentence.

    Derived in chapter 2.8.
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


# a contest of steps
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


# one contestant
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


# a contest of starts
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


# the same losses
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


# a contest of writers
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

    Derived in chapter 2.8.
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
