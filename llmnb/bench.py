# Written by `make export` from notebooks/13_training.py: edit that file.

"""Train a GPT-2 and watch it learn.

Text becomes batches, batches become gradients, gradients become a model that
predicts better than counting can, along the curve PyTorch draws.
"""

__all__ = [
    "Stopwatch",
    "WARM_UP",
    "bench",
    "peak_memory",
    "report",
]


# imports of the benchmark
import sys
import time
from statistics import median

import numba
import numpy as np

from llmnb.config import flops_per_token, parameter_count
from llmnb.timing import machine


# a stopwatch around a backend
class Stopwatch:
    """A backend whose functions add up the seconds they take.

    backend: an object with functions as attributes. seconds, calls: dicts
    from function name to what has been added up since `reset`.

    Derived in chapter 13.
    """

    def __init__(self, backend):
        self._backend = backend
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
            spent = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0) + spent
            self.calls[name] = self.calls.get(name, 0) + 1
            return result

        return timed


# peak memory
def peak_memory():
    """The most bytes this process has held in memory; None if unknown.

    It counts everything: Python, NumPy, the compiler, the model.

    Derived in chapter 13.
    """
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# one measured step
def _timed_step(model, watch, tokens, targets, step):
    """Seconds of the four parts of a step, and of each layer in them."""
    parts = {
        "forward": lambda: model.forward(tokens, targets),
        "backward": model.backward,
        "clip": lambda: model.clip_gradients(1.0),
        "update": lambda: model.update(step=step),
    }
    watch.reset()
    seconds = {}
    for name, work in parts.items():
        start = time.perf_counter()
        work()
        seconds[name] = time.perf_counter() - start
    return seconds, watch.seconds, watch.calls


# the benchmark
WARM_UP = 2  # steps that are not measured: they compile and touch memory


def bench(cfg, batch_size=4, seq_len=64, steps=10, **options):
    """Time training steps of a GPT2 on random tokens.

    cfg: a GPT2Config. steps: how many are measured, after `WARM_UP` others.
    options: what else GPT2 takes. Returns a dict ready for JSON: seconds
    are medians over the steps, memory is in bytes. Raises ValueError when
    steps is below 1.

    Derived in chapter 13.
    """
    from llmnb.gpt2 import GPT2

    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    model = GPT2(cfg, batch_size, seq_len, **options)
    draw = np.random.RandomState(0)
    shape = 2, batch_size, seq_len
    tokens, targets = draw.randint(0, cfg.vocab_size, shape)
    model.ops = watch = Stopwatch(model.ops)
    rows = [
        _timed_step(model, watch, tokens, targets, 1 + step)
        for step in range(WARM_UP + steps)
    ]
    return _summary(model, rows[WARM_UP:])


# medians
def _summary(model, rows):
    cfg, tokens = model.cfg, model.batch_size * model.seq_len
    whole = [sum(parts.values()) for parts, _, _ in rows]
    flops = flops_per_token(cfg, model.seq_len) * tokens
    return {
        "machine": machine(),
        "threads": numba.get_num_threads(),
        "model": vars(cfg),
        "batch_size": model.batch_size,
        "seq_len": model.seq_len,
        "parameters": parameter_count(cfg),
        "steps": len(rows),
        "step_seconds": median(whole),
        "step_seconds_range": [min(whole), max(whole)],
        "tokens_per_second": tokens / median(whole),
        "flops_per_second": flops / median(whole),
        "arena_bytes": model.memory.nbytes,
        "peak_bytes": peak_memory(),
        "parts": {
            name: median(parts[name] for parts, _, _ in rows)
            for name in rows[0][0]
        },
        "layers": _layers(rows),
    }


# medians, layer by layer
def _layers(rows):
    """One dict a backend function, in the order of first use."""
    table = []
    for name, calls in rows[0][2].items():
        seconds = median(spent[name] for _, spent, _ in rows)
        table.append({"name": name, "calls": calls, "seconds": seconds})
    rest = [sum(p.values()) - sum(s.values()) for p, s, _ in rows]
    table.append({"name": "(the rest)", "calls": 1, "seconds": median(rest)})
    return table


# a report in words
def report(result):
    """The result of `bench` as a text of lines to print.

    Derived in chapter 13.
    """
    low, high = result["step_seconds_range"]
    shape = "L {num_layers}  NH {num_heads}  C {channels}  V {vocab_size}"
    peak = result["peak_bytes"]
    head = [
        f"machine  {result['machine']}, {result['threads']} threads",
        f"model    {shape.format(**result['model'])}  "
        f"B {result['batch_size']}  T {result['seq_len']}: "
        f"{result['parameters']:,} parameters",
        f"step     {result['step_seconds'] * 1e3:.1f} ms, median of "
        f"{result['steps']} ({low * 1e3:.1f} to {high * 1e3:.1f})",
        f"speed    {result['tokens_per_second']:,.0f} tokens/s, "
        f"{result['flops_per_second'] / 1e9:.1f} GFLOP/s",
        f"memory   {result['arena_bytes'] / 1e6:.1f} MB in the arena, "
        + (f"{peak / 1e6:.0f} MB at most in all" if peak else "peak unknown"),
    ]
    return "\n".join([*head, "", *_table(result)])


# the table
def _table(result):
    total = result["step_seconds"]
    rows = [(name, "", s) for name, s in result["parts"].items()]
    rows += [("", "", None)]
    rows += [(x["name"], x["calls"], x["seconds"]) for x in result["layers"]]
    yield f"{'':<30} {'calls':>6} {'ms':>9} {'share':>7}"
    for name, calls, s in rows:
        if s is None:
            yield ""
            continue
        yield f"{name:<30} {calls:>6} {s * 1e3:9.2f} {s / total:7.1%}"
