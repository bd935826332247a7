# Written by `make export` from notebooks/3_gpu/05_elementwise.py: edit that file.

"""Kernels of layers that compute each number by itself."""

__all__ = ["BLOCK", "count_fours", "elementwise"]


# imports of the factory
from llmnb.gpu.launch import aligned, device, kernel
from llmnb.gpu.simulator import cuda, load4, store4

BLOCK = 256  # threads of a block


# one result, or four
@device
def _write(out, i, add, value):
    if add:
        value += out[i]
    out[i] = value


@device
def _write_fours(out, i, add, a, b, c, d):
    if add:
        e, f, g, h = load4(out, i)
        a, b, c, d = e + a, f + b, g + c, h + d
    store4(out, i, a, b, c, d)


# kernels around a function
def _of_one(function):
    @kernel
    def one_or_four(out, inp, add, fours):
        i = cuda.grid(1)
        if i < fours:
            a, b, c, d = load4(inp, 4 * i)
            a, b, c, d = function(a), function(b), function(c), function(d)
            _write_fours(out, 4 * i, add, a, b, c, d)
        elif 3 * fours + i < out.size:
            i += 3 * fours
            _write(out, i, add, function(inp[i]))

    return one_or_four


def _of_two(function):
    @kernel
    def one_or_four(out, x, y, add, fours):
        i = cuda.grid(1)
        if i < fours:
            a, b, c, d = load4(x, 4 * i)
            e, f, g, h = load4(y, 4 * i)
            a, b = function(a, e), function(b, f)
            c, d = function(c, g), function(d, h)
            _write_fours(out, 4 * i, add, a, b, c, d)
        elif 3 * fours + i < out.size:
            i += 3 * fours
            _write(out, i, add, function(x[i], y[i]))

    return one_or_four


# the factory
def count_fours(*arrays):
    """How many vectors of four move flat arrays of one size.

    0 where one of them begins at no multiple of 16 bytes.

    Derived in chapter 3.5.
    """
    return arrays[0].size // 4 if aligned(*arrays) else 0


def elementwise(function, reads):
    """A function that computes `function` for all elements of device arrays.

    function: of `reads` float32 numbers, 1 or 2, marked with `device`.
    Returns run(out, *arrays, add=0): out and arrays are flat and of one
    size, out is overwritten, or added to where add is 1. Its kernel is
    run.kernel(out, *arrays, add, fours).

    Derived in chapter 3.5.
    """
    made = (_of_one if reads == 1 else _of_two)(function)

    def run(out, *arrays, add=0):
        fours = count_fours(out, *arrays)
        grid = -(-(out.size - 3 * fours) // BLOCK)
        made[grid, BLOCK](out, *arrays, add, fours)

    run.kernel = made
    return run
