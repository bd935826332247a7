# Written by `make export` from notebooks/1_by_hand/09_gelu.py: edit that file.

"""Kernels in which a thread owns one number, or four."""

__all__ = [
    "by_element",
    "by_four",
]


# imports of the launches
from llmnb.gpu.launch import aligned


# threads of a block
BLOCK = 256


def _launch(kernel, threads, arrays, numbers):
    if threads:
        blocks = (threads + BLOCK - 1) // BLOCK
        kernel[blocks, BLOCK](*arrays, *numbers)


# launches
def by_element(elements, arrays, *numbers):
    """Launch a kernel with a thread for each element of a flat array.

    elements: the kernel. arrays: its arguments that are arrays, the first
    one decides; numbers: the other arguments. An empty array launches
    nothing.

    Derived in chapter 1.9.
    """
    _launch(elements, arrays[0].size, arrays, numbers)


def by_four(fours, elements, arrays, *numbers):
    """Launch a kernel with a thread for each four elements of a flat array.

    fours: the kernel; its last threads, up to three, own the elements that
    are left over. elements: what is launched by element where an array does
    not begin at a multiple of 16 bytes. Otherwise as `by_element`.

    Derived in chapter 1.9.
    """
    if aligned(*arrays):
        threads = arrays[0].size // 4 + arrays[0].size % 4
        _launch(fours, threads, arrays, numbers)
    else:
        by_element(elements, arrays, *numbers)
