# Written by `make export` from notebooks/6_machines/01_gradients.py: edit that file.

"""A group of threads that stand for processes."""

__all__ = ["LEFT", "Rehearsal", "rehearse"]


# imports of the rehearsal
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from llmnb.train.group import Group


# threads that stand for processes
LEFT = object()  # what a thread brings that has returned


class Rehearsal(Group):
    """One of a group of threads, with what a group of processes does.

    sent: bytes that it would have sent to others in exchange and spread.

    Derived in chapter 6.1.
    """

    def __init__(self, rank, table, barrier):
        self.rank, self.size, self.sent = rank, len(table), 0
        self._table, self._barrier = table, barrier

    def _meet(self, x=None):
        """What each has brought, when all are there."""
        self._table[self.rank] = x
        self._barrier.wait()
        found = list(self._table)
        self._barrier.wait()
        gone = [other is LEFT for other in found]
        if any(gone) and not all(gone):
            raise RuntimeError(
                f"{self.name(gone.index(True))} of the group has returned, "
                f"and {self.name(gone.index(False))} waits for it"
            )
        return found

    def name(self, rank):
        """A rank in words."""
        return f"rank {rank}"

    def gather(self, x):
        return self._meet(x)

    def exchange(self, out, array, spans, senders):
        """Send each its span of an array; out[r] begins with what r sent.

        array: flat, or None for who does not send. spans: a (start, stop)
        for each. senders: whether it sends, for each.
        """
        start, stop = spans[self.rank]
        for rank, other in enumerate(self._meet(array)):
            if senders[rank]:
                out[rank, : stop - start] = other[start:stop]
        self._meet()  # until all have read
        if senders[self.rank]:
            others = sum(b - a for a, b in spans) - (stop - start)
            self.sent += others * array.itemsize

    def spread(self, array, spans):
        """Have all of an array, of which each has its own span."""
        for other, span in zip(self._meet(array), spans, strict=True):
            if other is not array:
                array[slice(*span)] = other[slice(*span)]
        self._meet()
        start, stop = spans[self.rank]
        self.sent += (self.size - 1) * (stop - start) * array.itemsize

    def collect(self, part, lengths):
        """The parts of all in one array, for the first; None for others."""
        found = self._meet(part)
        whole = np.concatenate(found) if self.first else None
        self._meet()
        return whole

    def rest(self):
        """Wait for all; as threads do at each call."""
        self._meet()


# rehearse
def rehearse(size, work):
    """What work(group) returns in each of `size` threads, a list.

    An error in one of them ends all, and is raised. Raises RuntimeError
    when one returns while others wait for it.

    Derived in chapter 6.1.
    """
    table, barrier = [None] * size, threading.Barrier(size)

    def part(rank):
        try:
            group = Rehearsal(rank, table, barrier)
            result = work(group)
            group._meet(LEFT)
            return result
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        made = [pool.submit(part, rank) for rank in range(size)]
    for error in [x.exception() for x in made if x.exception()]:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [x.result() for x in made]
