"""How much memory some work takes."""

import tracemalloc


def peak(work):
    """The most bytes that Python and NumPy held at once for `work()`."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        work()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
