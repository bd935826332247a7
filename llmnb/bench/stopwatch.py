# Written by `make export` from notebooks/2_cpu/08_time.py: edit that file.

"""A stopwatch around a backend: where a step's time goes."""

__all__ = ["Stopwatch", "timed_step"]


# imports of the benchmark
import time


# a stopwatch around a backend
class Stopwatch:
    """An object whose functions add up the seconds they take.

    watched: an object with functions as attributes, such as a backend's
    layers. wait: what to call before a clock is read, where functions return
    before their work is done, as on a GPU. seconds, calls: dicts from
    function name to what has been added up since `reset`.

    Derived in chapter 2.8.
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


# one measured step
def timed_step(model, tokens, targets, step):
    """Train a GPT2 once; say what each part and each layer took.

    model.ops must be a `Stopwatch`. step: counts from 1. Returns a dict: the
    loss, a float; parts and layers, dicts from name to seconds; calls, a
    dict from layer to a count.

    Derived in chapter 2.8.
    """
    layers, parts = model.ops, Stopwatch(model, model.ops.wait)
    layers.reset()
    loss = parts.forward(tokens, targets)
    parts.backward()
    parts.update(step=step)
    found = {"loss": loss, "parts": parts.seconds}
    return found | {"layers": layers.seconds, "calls": layers.calls}
