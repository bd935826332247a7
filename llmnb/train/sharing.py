# Written by `make export` from notebooks/6_machines/04_sharing.py: edit that file.

"""Text that a group of processes encodes in turns."""

__all__ = ["encoded_by"]


# imports of sharing
from functools import partial
from itertools import chain, islice, pairwise, repeat

import numpy as np

from llmnb.text.shards import START, Origin, encoded, in_order


# batches in turns
def encoded_by(group):
    """An `encoded` for `write_shards`, whose batches a group shares.

    Every process of the group calls it, and comes to its end: the first,
    from `write_shards`, gets the blocks; the others get none, and go on from
    the first one's place.

    Derived in chapter 6.4.
    """

    def blocks(sources, encoding, options, place=START, workers=0):
        group.rest()
        place = Origin(*group.gather(place)[0])
        how = workers, partial(_turns, group)
        return encoded(sources, encoding, options, place, *how)

    return blocks


def _turns(group, function, items, workers):
    """`in_order` over a group, each process with its items, for the first."""
    own = islice(items, group.rank, None, group.size)
    for block in chain(in_order(function, own, workers), repeat(None)):
        group.rest()
        place, counts, tokens = block or (None, None, np.empty(0, np.uint16))
        heads = group.gather([place, counts, len(tokens)])
        lengths = [length for *_, length in heads]
        whole = group.collect(tokens, lengths)
        if not heads[0][0]:  # the first has none, and so has nobody
            return
        if group.first:
            yield from _blocks(heads, whole, lengths)


def _blocks(heads, whole, lengths):
    """What the first has collected, as blocks of `encoded`."""
    spans = pairwise(np.cumsum([0, *lengths]).tolist())
    for (place, counts, _), span in zip(heads, spans, strict=True):
        if place:
            yield Origin(*place), tuple(counts), whole[slice(*span)]
