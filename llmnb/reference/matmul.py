# Written by `make export` from notebooks/1_by_hand/07_matmul.py: edit that file.

"""The linear layer in NumPy, forward and backward."""

__all__ = ["matmul_backward", "matmul_forward"]


# imports
from llmnb.shapes import shapes


# the linear layer, forward
@shapes("B T OC!, B T C, OC C, OC?, B T OC?~")
def matmul_forward(out, inp, weight, bias, residual=None):
    """Map each row of inp to a row of out: out = inp @ weight.T + bias.

    out: (B, T, OC). inp: (B, T, C). weight: (OC, C). bias: (OC,) or None.
    residual: (B, T, OC), added to the result, or None. All of one float
    dtype; out is overwritten, and may be residual itself.

    Derived in chapter 1.7.
    """
    y = inp @ weight.T
    if bias is not None:
        y += bias
    if residual is not None:
        y += residual
    out[...] = y


# the linear layer, backward
@shapes("B T C!, OC C!?, OC!?, B T OC, B T C, OC C")
def matmul_backward(
    dinp, dweight, dbias, dout, inp, weight, add_dinp=True, add_dweight=True
):
    """Add the linear layer's gradients to dinp, dweight and dbias.

    dinp, inp: (B, T, C). dout: (B, T, OC). dweight, weight: (OC, C); the
    first may be None for a weight that does not learn. dbias: (OC,), or
    None for a layer without bias. All of one float dtype. add_dinp,
    add_dweight: False overwrites dinp, or dweight and dbias, instead of
    adding.

    Derived in chapter 1.7.
    """
    if not add_dinp:
        dinp.fill(0)
    for x in (dweight, dbias):
        if x is not None and not add_dweight:
            x.fill(0)
    OC, C = weight.shape
    rows, drows = inp.reshape(-1, C), dout.reshape(-1, OC)
    dinp += dout @ weight  # (1.7.2)
    if dweight is not None:
        dweight += drows.T @ rows  # (1.7.3)
    if dbias is not None:
        dbias += drows.sum(axis=0)  # (1.7.4)
