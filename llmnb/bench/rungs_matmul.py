# Written by `make export` from notebooks/3_gpu/06_matmul.py: edit that file.

"""Plainer products on a GPU, to be timed."""

__all__ = [
    "MATMUL_BACKWARD", "MATMUL_FORWARD", "square_tiles", "thread_an_output",
]


# imports of the plainer versions
import functools

from llmnb.cuda.matmul import (
    ZERO, launch, matmul_backward, matmul_forward, named, register_tiles,
    tile_kernel, write,
)
from llmnb.gpu.simulator import cuda


# version 1
@functools.cache
def _simple_kernel(along_a, along_b):
    def multiply(out, start, bias, a, b, add, shift):
        j, i = cuda.grid(2)
        if i >= out.shape[0] or j >= out.shape[1]:
            return
        total = ZERO
        for k in range(a.shape[1] if along_a else a.shape[0]):
            x = a[i, k] if along_a else a[k, i]
            y = b[j, k] if along_b else b[k, j]
            total += x * y
        if shift:
            total += bias[j]
        write(out, start, (i, j), total, add)

    return named(multiply, "simple", along_a, along_b, 256)


def thread_an_output(p):
    """A product, one thread for each number of out; nothing is checked.

    Derived in chapter 3.6.
    """
    launch(_simple_kernel(p.along_a, p.along_b), (8, 32), (32, 8), p)


# version 2, launched
def square_tiles(p):
    """A product by 16 by 16 outputs a block; nothing is checked.

    Derived in chapter 3.6.
    """
    made = tile_kernel(16, 16, 1, p.along_a, p.along_b)
    launch(made, (16, 16), 256, p)


# the ladder
def _by(layer, version):
    """The layer by a version of the product, under that version's name."""

    def by(*arguments, **options):
        layer(*arguments, version=version, **options)

    by.__name__ = version.__name__
    return by


_VERSIONS = thread_an_output, square_tiles, register_tiles
MATMUL_FORWARD = tuple(_by(matmul_forward, f) for f in _VERSIONS)
MATMUL_BACKWARD = tuple(_by(matmul_backward, f) for f in _VERSIONS)
