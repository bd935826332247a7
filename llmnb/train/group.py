# Written by `make export` from notebooks/4_practice/13_loop.py: edit that file.

"""The processes that train together: here one; and the order of a sum."""

__all__ = [
    "ALONE", "GradientTree", "Group", "Tree", "group_of", "tree_of", "waiting",
]


# imports of the group
from weakref import WeakKeyDictionary


# the order of a sum
class Tree:
    """A sum over 0, 1, 2, ... in an order that does not depend on who adds.

    add: a function of two arrays, of an earlier and of a later block, that
    returns their sum. blocks: what waits for its neighbour, a list of
    (start, stop, array), each a sum over range(start, stop).

    Derived in chapter 4.13.
    """

    def __init__(self, add):
        self.add, self.blocks = add, []

    def push(self, start, stop, array):
        """Put a block behind the others; it joins those it can. (4.13.3)"""
        while self.blocks and _joins(self.blocks[-1], stop):
            start, _, before = self.blocks.pop()
            array = self.add(before, array)
        self.blocks.append((start, stop, array))

    def whole(self):
        """The sum of all that was pushed; no block is left."""
        _, _, array = self.blocks.pop()
        while self.blocks:
            array = self.add(self.blocks.pop()[2], array)
        return array


# do two blocks become one
def _joins(block, end):
    """Whether a block and the one behind it, to `end`, make one."""
    start, stop, _ = block
    length = stop - start
    return end - stop == length and start % (2 * length) == 0


# the tree of a model's gradients
class GradientTree(Tree):
    """A `Tree` of gradients, whose newest block lies in a model's grads.

    grads: these, flat; ops: layers that add. On the host.

    Derived in chapter 4.13.
    """

    def __init__(self, grads, ops):
        super().__init__(self._sum)
        self.grads, self._ops, self._spare = grads, ops, []

    def clear(self):
        """Forget all blocks; their memory is kept."""
        self._spare += [x for *_, x in self.blocks if x is not self.grads]
        self.blocks.clear()

    def make_room(self):
        """Copy the newest block aside: grads will be overwritten."""
        if self.blocks:
            start, stop, array = self.blocks.pop()
            self.blocks.append((start, stop, self._aside(array)))

    def _aside(self, array):
        aside = self._spare.pop() if self._spare else array.copy()
        aside[:] = array
        return aside

    def _sum(self, before, array):
        self._ops.residual_forward(array, before, array)
        self._spare.append(before)
        return array


_TREES = WeakKeyDictionary()  # of models


def tree_of(model):
    """The GradientTree of a model, empty.

    Derived in chapter 4.13.
    """
    if model not in _TREES:
        kind = getattr(model, "tree", GradientTree)
        _TREES[model] = kind(model.memory.flat("grads"), model.ops)
    _TREES[model].clear()
    return _TREES[model]


def waiting(pieces):
    """How many gradients wait at most while a range of pieces is computed.

    Besides the one in model.grads.

    Derived in chapter 4.13.
    """
    tree, most = Tree(lambda before, array: None), 0
    for k in pieces:
        most = max(most, len(tree.blocks))
        tree.push(k, k + 1, None)
    return most


# one process
class Group:
    """The processes that train together: a group of one.

    rank: which of them this is, from 0 on. size: how many there are. Of
    several, each calls the same methods in the same order; those of a larger
    group, which chapter 6.1 adds, move parts of arrays. on_gpus: whether
    these lie on GPUs. in_graph: whether a recorded step may hold such calls.

    Derived in chapter 4.13.
    """

    rank, size = 0, 1
    on_gpus, in_graph = False, True

    @property
    def first(self):
        """Whether this is the one that writes and speaks for all."""
        return self.rank == 0

    def gather(self, x):
        """What each of them has given, a list in order of rank.

        x: numbers, texts, lists and dicts, as JSON has them.
        """
        return [x]

    def share(self, count, rank=None):
        """The range of `count` things, in order, that this one does.

        rank: of another one.
        """
        rank = self.rank if rank is None else rank
        first, last = (r * count // self.size for r in (rank, rank + 1))
        return range(first, last)


ALONE = Group()


def group_of(model):
    """The Group that a model trains in.

    Derived in chapter 4.13.
    """
    return getattr(model, "group", ALONE)
