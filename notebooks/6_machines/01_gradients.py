# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       train.exchange: "Gradients that many processes have computed, summed in one order."
#       train.rehearsal: "A group of threads that stand for processes."
# ---

# %% [markdown]
# # Many gradients: one sum, one order
#
# > Summary.

# %% imports of the exchange tags=["export"] module="train.exchange"
from itertools import pairwise

import numpy as np

from llmnb.cpu.adamw import PIECES, piece_length
from llmnb.train.group import Tree


# %% who owns what tags=["export"] module="train.exchange"
def shards(size, ranks):
    """Where the shards of a flat array begin and end: a list of pairs.

    size: elements of the array. ranks: processes, a shard each, of
    whole pieces of the norm's sum (see `llmnb.cpu.global_norm`). Raises
    ValueError when there are more processes than such pieces.
    """
    if ranks > PIECES:
        raise ValueError(f"a group has at most {PIECES} ranks, got {ranks}")
    length = piece_length(size)
    ends = (r * PIECES // ranks * length for r in range(ranks + 1))
    return list(pairwise(min(size, end) for end in ends))


# %% what a process has to send tags=["export"] module="train.exchange"
def blocks_of(pieces):
    """The blocks of a `Tree` to which a range of micro-batches adds up.

    Returns a list of (start, stop).
    """
    tree = Tree(lambda before, array: None)
    for k in pieces:
        tree.push(k, k + 1, None)
    return [(start, stop) for start, stop, _ in tree.blocks]


# %% the exchange tags=["export"] module="train.exchange"
BUFFER = 1 << 24  # bytes that arrive at a time


def exchange(group, grads, blocks, count):
    """Leave in this process's shard of grads the sum over all processes.

    group: a Group of several, each of which calls this. grads: a model's
    gradients, flat. blocks: those of its `GradientTree`, which may lie in
    grads. count: micro-batches of the update. The rest of grads is left as
    it is.
    """
    spans, rank = shards(grads.size, group.size), group.rank
    held = [blocks_of(group.share(count, r)) for r in range(group.size)]
    rounds = max(map(len, held))
    width = max(1, BUFFER // (rounds * group.size * grads.itemsize))
    came = np.empty((rounds, group.size, width), grads.dtype)
    for at in range(0, max(b - a for a, b in spans), width):
        cut = [(min(a + at, b), min(a + at + width, b)) for a, b in spans]
        for i in range(rounds):
            mine = blocks[i][2] if i < len(blocks) else None
            group.exchange(came[i], mine, cut, [i < len(x) for x in held])
        start, stop = cut[rank]
        grads[start:stop] = _sum(held, came[..., : stop - start])


def _sum(held, came):
    """The tree of (4.13.3) over the blocks of all, in their order."""
    tree = Tree(lambda before, array: np.add(before, array, out=array))
    for rank, blocks in enumerate(held):
        for i, (start, stop) in enumerate(blocks):
            tree.push(start, stop, came[i, rank])
    return tree.whole()


# %% imports of the rehearsal tags=["export"] module="train.rehearsal"
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from llmnb.train.group import Group


# %% threads that stand for processes tags=["export"] module="train.rehearsal"
class Rehearsal(Group):
    """One of a group of threads, with what a group of processes does.

    sent: bytes that it would have sent to others.
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
        return found

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
            self.sent += self._others(spans) * array.itemsize

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

    def _others(self, spans):
        """Elements of the spans of others."""
        return sum(b - a for a, b in spans) - np.diff(spans[self.rank])[0]


# %% rehearse tags=["export"] module="train.rehearsal"
def rehearse(size, work):
    """What work(group) returns in each of `size` threads, a list.

    An error in one of them ends all, and is raised.
    """
    table, barrier = [None] * size, threading.Barrier(size)

    def part(rank):
        try:
            return work(Rehearsal(rank, table, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        made = [pool.submit(part, rank) for rank in range(size)]
    errors = [x.exception() for x in made if x.exception()]
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [x.result() for x in made]
