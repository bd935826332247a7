# Written by `make export` from notebooks/3_gpu/11_step.py: edit that file.

"""Launches recorded once and replayed as one."""

__all__ = ["Graph"]


# imports of the graph
import functools
import gc
import weakref

from llmnb.gpu.launch import DeviceArray, stream
from llmnb.gpu.toolkit import numba_cuda


# a graph
class Graph:
    """What a function launches, as one launch.

    function: called with nothing, it launches kernels on a device's arrays
    and does nothing else: it must not allocate, copy or wait. like: one of
    those arrays. A call runs the function as it is on the simulated GPU,
    and so does the first call on a real one, which compiles what is not
    compiled yet; if an error ends it, the next call does so again. The second
    call there records what is launched, as a CUDA graph, and from then on a
    call launches the record. A record holds
    addresses and numbers: what is to change between two calls must lie in
    the arrays. Raises RuntimeError when the driver refuses.

    Derived in chapter 3.11.
    """

    def __init__(self, function, like):
        self.function, self._compiled, self._made = function, False, None
        self._simulated = isinstance(like, DeviceArray)

    def __call__(self):
        if self._simulated or not self._compiled:
            self.function()
            self._compiled = True
            return
        from cuda.bindings import driver

        if self._made is None:
            self._made = _recorded(self.function)
            weakref.finalize(self, driver.cuGraphExecDestroy, self._made)
        _asked(driver.cuGraphLaunch(self._made, _stream().handle))


# a stream to record on
@functools.cache
def _stream():
    """A stream of our own: the default one cannot be recorded.

    It waits for what was put on the default stream before, and that for it.
    """
    return numba_cuda().stream()


def _asked(answer):
    """What the driver answers: raise its error, or return its values."""
    code, *values = answer
    if int(code):
        raise RuntimeError(f"CUDA driver: {code.name}")
    return values[0] if len(values) == 1 else values


# record
def _recorded(function):
    """An executable graph of what a function launches; nothing runs yet."""
    from cuda.bindings import driver

    real = numba_cuda()
    place = _stream()
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    place.synchronize()
    gc.collect()  # what dies now is not freed while we record
    with real.defer_cleanup(), stream(place):
        _asked(driver.cuStreamBeginCapture(place.handle, mode))
        try:
            function()
        finally:  # leave the mode whatever happened
            answer = driver.cuStreamEndCapture(place.handle)
    graph = _asked(answer)
    try:
        return _asked(driver.cuGraphInstantiate(graph, 0))
    finally:
        driver.cuGraphDestroy(graph)
