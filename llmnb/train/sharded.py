# Written by `make export` from notebooks/6_machines/02_shards.py: edit that file.

"""A model whose optimiser lies in shards on a group of processes."""

__all__ = ["Sharded", "Spread"]


# imports of the shards
import math

import numpy as np

from llmnb.arena import put
from llmnb.checks import check_fit
from llmnb.cpu.adamw import PIECES, piece_length, shrink, squares
from llmnb.model.gpt2 import GPT2
from llmnb.shapes import shapes
from llmnb.train.exchange import exchange, shards
from llmnb.train.group import ALONE


# a tensor that lies in parts
class Spread:
    """A tensor of m or v, of which each process of a group holds a part.

    part: this process's, flat, maybe empty. To others it looks like an array
    on a device: np.asarray gives a copy of the whole, in the first process,
    while the others call `collect` (it raises TypeError there), and
    llmnb.arena.put overwrites it.

    Derived in chapter 6.2.
    """

    def __init__(self, group, shape, part, places):
        self.group, self.shape, self.part = group, shape, part
        self.dtype, self.itemsize = part.dtype, part.dtype.itemsize
        self.nbytes = math.prod(shape) * self.itemsize
        self._places = places  # a slice of the flat tensor for each process

    def collect(self):
        """The whole tensor for the first process, None for the others."""
        lengths = [x.stop - x.start for x in self._places]
        whole = self.group.collect(np.asarray(self.part), lengths)
        return whole if whole is None else whole.reshape(self.shape)

    def __array__(self, dtype=None, copy=None):
        if not self.group.first:
            raise TypeError(
                "only the first process of a group gets a whole tensor of m "
                "or v, while the others call collect(): this is "
                f"{self.group.name(self.group.rank)}"
            )
        return np.asarray(self.collect(), dtype)

    def copy_to_device(self, values):
        """Keep of a whole tensor what lies here."""
        check_fit("put: values", values, self.shape, self.dtype)
        mine = self._places[self.group.rank]
        put(self.part, values.reshape(-1)[mine])


# the model
class Sharded(GPT2):
    """A GPT2 that trains in a group: each process holds its shard of m, v.

    Sharded.of(group) is the class to make one of, with the arguments of
    GPT2; the backend is "cpu". All processes of the group make one, and
    call its methods in the same order. grads holds, after `exchange`, the
    sum over the group in this process's shard, and elsewhere what was left.

    Derived in chapter 6.2.
    """

    group, backends = ALONE, ("cpu",)

    @classmethod
    def of(cls, group):
        """A class of models of this group."""
        return type(cls.__name__, (cls,), {"group": group})

    def _allocate(self, layout):
        dtype, named = layout["params"]
        size = sum(map(math.prod, named.values()))
        self.shards = shards(size, self.group.size)
        start, stop = self.shards[self.group.rank]
        own = dtype, {"shard": (stop - start,)}
        super()._allocate(layout | {"m": own, "v": own})
        for kind in ("m", "v"):
            tensors, at = self.memory[kind], 0
            shard = tensors.pop("shard")
            for name, shape in named.items():
                tensors[name] = self._spread(shard, at, shape)
                at += math.prod(shape)

    def _spread(self, shard, at, shape):
        """The tensor that begins at an element of the flat parameters."""
        size = math.prod(shape)
        ends = np.clip(np.array(self.shards) - at, 0, size).tolist()
        places = [slice(*pair) for pair in ends]
        rank = self.group.rank
        mine, first = places[rank], max(0, at - self.shards[rank][0])
        part = shard[first : first + mine.stop - mine.start]
        return Spread(self.group, shape, part, places)

    def step(self, *batch, **settings):
        """Refused: it would learn from this process's batch alone."""
        raise RuntimeError(
            "Sharded.step: a group exchanges gradients within a step; call "
            "llmnb.train.loop.train_step"
        )

    def exchange(self, blocks, count):
        """Sum the gradients of all processes; see train.exchange."""
        exchange(self.group, self.memory.flat("grads"), blocks, count)

    def _own(self, kind):
        """This process's shard of params or grads."""
        return self.memory.flat(kind)[slice(*self.shards[self.group.rank])]

    @shapes("-, above 0")
    def clip_gradients(self, max_norm):
        """As GPT2.clip_gradients, of the sum over the group."""
        self._check_gradients("clip_gradients")
        grads, size = self._own("grads"), self.shards[-1][1]
        found = squares(grads, piece_length(size)).tolist()
        found = sum(self.group.gather(found), [])
        sums = np.zeros(PIECES)
        sums[: len(found)] = found
        norm = math.sqrt(sums.sum())
        shrink(grads, norm, max_norm)
        return norm

    def _apply(self, decay):
        """AdamW on the own shard; then all parameters, from all."""
        update = getattr(self.ops, self._machine.update)
        own = [self._own(kind) for kind in ("params", "grads")]
        own += [self.memory.flat(kind) for kind in ("m", "v")]
        begin, end = self.shards[self.group.rank]
        for start, stop, decays in self._ranges(decay):
            start, stop = max(start, begin), min(stop, end)
            if start < stop:
                row = self._settings[not decays]
                update(*[x[start - begin : stop - begin] for x in own], row)
        self.group.spread(self.memory.flat("params"), self.shards)
