# Written by `make export` from notebooks/5_modern/05_architectures.py: edit that file.

"""Token vectors, compiled for the processor's cores."""

__all__ = ["embedding_backward", "embedding_forward"]


# imports of the CPU's embedding
from llmnb.backend import noted
from llmnb.cpu.jit import inner
from llmnb.shapes import COMPILED, shapes


# the embedding's loops
@inner
def _embedding_forward(out, inp, wte, scale):
    rows, C = out.shape
    for n in range(rows):
        y, token = out[n], wte[inp[n]]
        for c in range(C):
            y[c] = token[c] * scale


@inner
def _embedding_backward(dwte, dout, inp, scale):
    rows, C = dout.shape
    for n in range(rows):
        dtoken, dy = dwte[inp[n]], dout[n]
        for c in range(C):
            dtoken[c] += dy[c] * scale


# token vectors, compiled
@shapes("B T C!, B T of Vp, Vp C", COMPILED, scale="above 0")
def embedding_forward(out, inp, wte, scale=1.0):
    """Write the vector of each token, times scale.

    out: (B, T, C), overwritten. inp: (B, T) int32, each in [0, Vp). wte:
    (Vp, C). out and wte both float32 or both float64 and C-contiguous.
    Raises TypeError or ValueError before it computes anything.

    Derived in chapter 5.5.
    """
    rows = out.reshape(inp.size, out.shape[2])
    number = wte.dtype.type(scale)
    noted(_embedding_forward, rows, inp.reshape(-1), wte, number)


@shapes("Vp C!, B T C, B T of Vp", COMPILED, scale="above 0")
def embedding_backward(dwte, dout, inp, scale=1.0):
    """Add dout's rows, times scale, to the rows that they came from.

    dwte: (Vp, C), added to; rows of absent tokens stay. dout: (B, T, C).
    inp: (B, T) int32, each in [0, Vp). One thread adds all rows in the
    order of the text. Raises as `embedding_forward` does.

    Derived in chapter 5.5.
    """
    rows = dout.reshape(inp.size, dout.shape[2])
    number = dwte.dtype.type(scale)
    noted(_embedding_backward, dwte, rows, inp.reshape(-1), number)
