# Written by `make export` from notebooks/2_cpu/08_time.py: edit that file.

"""A stopwatch around a backend: where a step's time goes."""

__all__ = [
    "PARTS",
    "Stopwatch",
    "timed_step",
]


# imports of the benchmark
import time


# a stopwatch around a backend
class Stopwatch:
    """A backend whose functions add up the seconds they take.

    backend: an object with functions as attributes. wait: what to call
    before a clock is read, where functions return before their work is
    done, as on a GPU. seconds, calls: dicts from function name to what has
    been added up since `reset`.

    Derived in chapter 2.8.
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


# one measured step
PARTS = ("forward", "backward", "update")


def timed_step(model, tokens, targets, step):
    """Train a GPT2 once; say what each part and each layer took.

    model.ops must be a `Stopwatch`. step: counts from 1. Returns a dict: the
    loss, a float; parts and layers, dicts from name to seconds; calls, a
    dict from layer to a count.

    Derived in chapter 2.8.
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
