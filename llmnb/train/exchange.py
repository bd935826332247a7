# Written by `make export` from notebooks/6_machines/01_gradients.py: edit that file.

"""Gradients that many processes have computed, summed in one order."""

__all__ = ["BUFFER", "blocks_of", "exchange", "shards"]


# imports of the exchange
import math
from itertools import pairwise

import numpy as np

from llmnb.cpu.adamw import PIECES, piece_length
from llmnb.train.group import Tree


# what a process has to send
def blocks_of(pieces):
    """The blocks of a `Tree` to which a range of micro-batches adds up.

    Returns a list of (start, stop).

    Derived in chapter 6.1.
    """
    tree = Tree(lambda before, array: None)
    for k in pieces:
        tree.push(k, k + 1, None)
    return [(start, stop) for start, stop, _ in tree.blocks]


# who owns what
def shards(size, ranks):
    """Where the shards of a flat array begin and end: a list of pairs.

    size: elements of the array. ranks: processes, a shard each, of
    whole pieces of the norm's sum (see `llmnb.cpu.global_norm`). Raises
    ValueError when there are more processes than such pieces.

    Derived in chapter 6.1.
    """
    if ranks > PIECES:
        raise ValueError(f"a group has at most {PIECES} ranks, got {ranks}")
    length = piece_length(size)
    ends = (r * PIECES // ranks * length for r in range(ranks + 1))
    return list(pairwise(min(size, end) for end in ends))


# the exchange
BUFFER = 1 << 24  # bytes that arrive at a time


def exchange(group, grads, blocks, count, came=None, add=None):
    """Leave in this process's shard of grads the sum over all processes.

    group: a Group of several, each of which calls this. grads: a model's
    gradients, flat. blocks: those of its `GradientTree`, which may lie in
    grads. count: micro-batches of the update. The rest of grads is left as
    it is. came: None, or a flat array for what arrives. add: None, or what
    adds that up, a function (out, blocks of each rank, what came).

    Derived in chapter 6.1.
    """
    spans, rank = shards(grads.size, group.size), group.rank
    held = [blocks_of(group.share(count, r)) for r in range(group.size)]
    parts = max(map(len, held)), group.size
    if came is None:
        size = max(BUFFER // grads.itemsize, math.prod(parts))
        came = np.empty(size, grads.dtype)
    width = came.size // math.prod(parts)
    came = came[: math.prod(parts) * width].reshape(*parts, width)
    for at in range(0, max(b - a for a, b in spans), width):
        cut = [(min(a + at, b), min(a + at + width, b)) for a, b in spans]
        for i in range(parts[0]):
            mine = blocks[i][2] if i < len(blocks) else None
            group.exchange(came[i], mine, cut, [i < len(x) for x in held])
        start, stop = cut[rank]
        if start < stop:
            (add or _add)(grads[start:stop], held, came)


def _add(out, held, came):
    """The tree of (4.13.3) over the blocks of all, in their order."""
    tree = Tree(lambda before, array: np.add(before, array, out=array))
    for rank, blocks in enumerate(held):
        for i, (start, stop) in enumerate(blocks):
            tree.push(start, stop, came[i, rank, : out.size])
    out[:] = tree.whole()
