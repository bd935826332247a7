# Written by `make export` from notebooks/5_modern/05_architectures.py: edit that file.

"""Token vectors on a GPU, without positions."""

__all__ = ["embedding_backward", "embedding_forward"]


# imports of the GPU's embedding
import numpy as np

from llmnb.cuda.encoder import THREADS, _where, encoder_scratch, into_buckets
from llmnb.gpu.launch import DEVICE, given_work, kernel
from llmnb.gpu.simulator import cuda
from llmnb.shapes import shapes


# the embedding's kernels
@kernel
def _embedding_forward(out, inp, wte, scale):
    i = cuda.grid(1)
    rows, C = out.shape
    if i < rows * C:
        n, c = i // C, i % C
        out[n, c] = wte[inp[n], c] * scale


@kernel
def _embedding_backward(dwte, dout, inp, scale, order, starts, K):
    at, c = cuda.blockIdx.x, cuda.blockIdx.y * THREADS + cuda.threadIdx.x
    C = dout.shape[1]
    if c - cuda.laneid >= C:
        return  # nothing is left for this warp
    token, mine, total = int(inp[order[at]]), c < C, np.float32(0)
    begin, end = starts[token % K], starts[token % K + 1]
    for first in range(begin, at, 32):
        if _where(inp, order, first, at, token) != 0:
            return  # the block of an earlier entry does it all
    if mine:
        total = dwte[token, c]
    for first in range(at, end, 32):
        bits = _where(inp, order, first, end, token)
        if mine and bits != 0:
            for k in range(32):
                if (bits >> k) & 1:
                    total += dout[order[first + k], c] * scale
    if mine:
        dwte[token, c] = total


# token vectors on a GPU
@shapes("B T C!, B T of Vp, Vp C", DEVICE, scale="above 0")
def embedding_forward(out, inp, wte, scale=1.0):
    """Write the vector of each token, times scale.

    out: (B, T, C), overwritten. inp: (B, T) int32, each in [0, Vp): the
    caller sees to that. wte: (Vp, C). On a device, out and wte float32.
    Raises TypeError or ValueError before it launches anything.

    Derived in chapter 5.5.
    """
    rows, places = out.reshape(inp.size, out.shape[2]), inp.reshape(inp.size)
    grid = -(-out.size // THREADS)
    _embedding_forward[grid, THREADS](rows, places, wte, np.float32(scale))


@shapes("Vp C!, B T C, B T of Vp", DEVICE, scale="above 0", work="W!?")
def embedding_backward(dwte, dout, inp, scale=1.0, work=None):
    """Add dout's rows, times scale, to the rows that they came from.

    dwte: (Vp, C), added to; rows of absent tokens stay. dout: (B, T, C).
    inp: (B, T) int32. On a device, dwte and dout float32. work: float32 of
    `encoder_scratch(B * T)` elements, allocated when None. The places are
    sorted into buckets as in `encoder_backward`, a block for each: the first
    of each token adds all rows in the order of the text. Raises as
    `embedding_forward` does, and ValueError where work is too small.

    Derived in chapter 5.5.
    """
    n, C = inp.size, dout.shape[2]
    work = given_work("embedding_backward", work, encoder_scratch(n), dout)
    rows, places = dout.reshape(n, C), inp.reshape(n)
    grid, number = (n, -(-C // THREADS)), np.float32(scale)
    found = into_buckets(places, work)
    _embedding_backward[grid, THREADS](dwte, rows, places, number, *found)
