# Written by `make export` from notebooks/05_matmul.py: edit that file.

"""Multiply by a weight matrix and differentiate it.

The linear layer is one matrix product forward and two backward; nearly all of
GPT-2's arithmetic happens in these three.
"""

__all__ = [
    "matmul_backward",
    "matmul_forward",
]


# the linear layer, forward
def matmul_forward(out, inp, weight, bias):
    """Map each row of inp to a row of out: out = inp @ weight.T + bias.

    out: (B, T, OC). inp: (B, T, C). weight: (OC, C). bias: (OC,) or None.
    All of one float dtype; out is overwritten.

    Derived in chapter 5.
    """
    out[...] = inp @ weight.T
    if bias is not None:
        out += bias


# the linear layer, backward
def matmul_backward(dinp, dweight, dbias, dout, inp, weight):
    """Add the linear layer's gradients to dinp, dweight and dbias.

    dinp, inp: (B, T, C). dout: (B, T, OC). dweight, weight: (OC, C).
    dbias: (OC,), or None for a layer without bias. All of one float dtype;
    the first three are added to in place.

    Derived in chapter 5.
    """
    OC, C = weight.shape
    rows, drows = inp.reshape(-1, C), dout.reshape(-1, OC)
    dinp += dout @ weight
    dweight += drows.T @ rows
    if dbias is not None:
        dbias += drows.sum(axis=0)
