# Written by `make export` from notebooks/1_by_hand/16_memory.py: edit that file.

"""One block of memory that holds named groups of named tensors."""

__all__ = ["Arena", "footprint", "put"]


# imports of the arena
import math

import numpy as np


# round up
ALIGN = 64  # bytes


def _round_up(n, to):
    return -(-n // to) * to


# allocate
def _zeros(nbytes):
    block = np.zeros(nbytes + ALIGN, np.uint8)
    skip = -block.ctypes.data % ALIGN
    return block[skip : skip + nbytes]


def _allocate(nbytes, zeros):
    try:
        return zeros(nbytes)
    except (MemoryError, ValueError):  # the latter from 2**63 bytes on
        raise MemoryError(
            f"the model needs one block of {nbytes:,} bytes, more than this "
            f"system gives; lower batch_size or seq_len, or the model's size"
        ) from None


# the arena
class Arena:
    """One zeroed block of memory that holds named groups of named tensors.

    groups: a mapping from group name to (dtype, shapes), where shapes maps
    tensor names to shapes. The tensors of a group lie one after the other
    without a gap, so that a group is also one flat array; each group begins
    at a multiple of 64 bytes. (dtype, shapes, True) lays a group over the
    one before it: both begin at the same byte. The block is allocated once,
    here: the system hands out its pages, zeroed, when they are first
    written. zeros: a function from a number of bytes to such a block, a 1-D
    uint8 array, where memory is not the host's. Raises MemoryError, which
    says how many bytes were asked for.

    arena[group][tensor] is the view of a tensor; .nbytes the block's size.

    Derived in chapter 1.16.
    """

    def __init__(self, groups, zeros=_zeros):
        self._rows, self._spans, start, end = [], {}, 0, 0
        for group, (dtype, shapes, *over) in groups.items():
            dtype = np.dtype(dtype)
            offset = start = start if over else _round_up(end, ALIGN)
            for name, shape in shapes.items():
                row = (group, name, tuple(shape), dtype, offset)
                self._rows.append(row)
                offset += math.prod(shape) * dtype.itemsize
            self._spans[group] = start, offset, dtype
            end = max(end, offset)
        self.nbytes = _round_up(end, ALIGN)
        self._block = _allocate(self.nbytes, zeros)
        self._views = {group: {} for group in groups}
        for group, name, shape, dtype, offset in self._rows:
            size = math.prod(shape) * dtype.itemsize
            flat = self._block[offset : offset + size].view(dtype)
            self._views[group][name] = flat.reshape(shape)

    def __getitem__(self, group):
        """The tensors of a group: a mapping from name to view."""
        return self._views[group]

    def flat(self, group):
        """A whole group as one 1-D view."""
        start, stop, dtype = self._spans[group]
        return self._block[start:stop].view(dtype)

    def table(self):
        """Rows (group, tensor, shape, dtype name, offset, bytes) in order."""
        return [
            (g, name, shape, d.name, at, math.prod(shape) * d.itemsize)
            for g, name, shape, d, at in self._rows
        ]

    def sizes(self):
        """Bytes of each group, padding left out."""
        return {g: stop - start for g, (start, stop, _) in self._spans.items()}


# overwrite a tensor
def put(array, values):
    """Overwrite an array, on the host or on a device, with a host's values.

    values: an array of the same shape, of any dtype that can be converted.

    Derived in chapter 1.16.
    """
    if isinstance(array, np.ndarray):
        np.copyto(array, values, casting="unsafe")
    else:
        array.copy_to_device(np.ascontiguousarray(values, array.dtype))


# bytes of each group
def footprint(layout):
    """Bytes of each group of an arena, as a dict, before there is one.

    layout: as Arena takes it. A group that lies over another counts for
    what it is longer, so that the sum is what the arena takes, up to the
    padding between groups.

    Derived in chapter 1.16.
    """
    sizes, longest = {}, 0
    for group, (dtype, shapes, *over) in layout.items():
        count = sum(math.prod(shape) for shape in shapes.values())
        size = count * np.dtype(dtype).itemsize
        before = longest if over else 0  # of the groups in this place
        sizes[group] = max(0, size - before)
        longest = max(before, size)
    return sizes
