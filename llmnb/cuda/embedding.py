# Written by `make export` from notebooks/5_modern/05_architectures.py: edit that file.

"""Token vectors on a GPU, without positions."""

__all__ = ["embedding_backward", "embedding_forward"]


# imports of the GPU's embedding
import numpy as np

from llmnb.cuda.encoder import THREADS, _where
from llmnb.gpu.launch import DEVICE, kernel
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
def _embedding_backward(dwte, dout, inp, scale):
    n, c = cuda.blockIdx.x, cuda.blockIdx.y * THREADS + cuda.threadIdx.x
    rows, C = dout.shape
    if c - cuda.laneid >= C:
        return  # nothing is left for this warp
    token, mine, total = int(inp[n]), c < C, np.float32(0)
    for first in range(0, n, 32):
        if _where(inp, first, 0, n, token) != 0:
            return  # the block of an earlier place does it all
    if mine:
        total = dwte[token, c]
    for first in range(n // 32 * 32, rows, 32):
        bits = _where(inp, first, n, rows, token)
        if mine and bits != 0:
            for k in range(32):
                if (bits >> k) & 1:
                    total += dout[first + k, c] * scale
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


@shapes("Vp C!, B T C, B T of Vp", DEVICE, scale="above 0")
def embedding_backward(dwte, dout, inp, scale=1.0):
    """Add dout's rows, times scale, to the rows that they came from.

    dwte: (Vp, C), added to; rows of absent tokens stay. dout: (B, T, C).
    inp: (B, T) int32. On a device, dwte and dout float32. A block for each
    place: the first of each token adds all rows in the order of the text.
    Raises as `embedding_forward` does.

    Derived in chapter 5.5.
    """
    n, C = inp.size, dout.shape[2]
    rows, places = dout.reshape(n, C), inp.reshape(n)
    grid, number = (n, -(-C // THREADS)), np.float32(scale)
    _embedding_backward[grid, THREADS](dwte, rows, places, number)
