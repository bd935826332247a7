# Written by `make export` from notebooks/5_modern/11_inbackward.py: edit that file.

"""A weight that learns with its gradient, in NumPy."""

__all__ = ["matmul_learn"]


# imports of the weight that learns
import numpy as np

from llmnb.checks import check_array
from llmnb.reference.adamw import learn
from llmnb.shapes import shapes


# are these rows
def check_aside(weight, aside, few):
    """Raise unless `aside` numbers rows of `few`, or is None."""
    if aside is not None:
        (OC, C), name = weight.shape, "matmul_learn: "
        own, rows = (np.dtype(np.int32),), 0 if few is None else len(few)
        check_array(f"{name}aside", aside, (OC,), own)
        check_array(f"{name}few", few, (rows, C), (weight.dtype,), True)
        if not -1 <= aside.min() <= aside.max() < len(few):
            raise ValueError(
                f"{name}aside must lie in [-1, {len(few)}), the rows "
                f"of few, got {aside.min()} to {aside.max()}"
            )


# a weight that learns
@shapes("OC C!, OC C!, OC C!, OC!, B T OC, B T C, 7")
def matmul_learn(
    weight, m, v, squares, dout, inp, factors, aside=None, few=None
):
    """Take AdamW's step with a linear layer's gradient, dout.T @ inp.

    weight, m, v: (OC, C), change in place; m and v are AdamW's averages.
    dout: (B, T, OC). inp: (B, T, C). squares: (OC,), overwritten with the sum
    of the squares of each row of the gradient. factors: (7,), the Factors of
    the step. All of one float dtype. aside: (OC,) of int32, or None: row i, if
    aside[i] is not -1, does not learn; its gradient goes to few[aside[i]], a
    row of (R, C), and its sum of squares is 0. Raises TypeError or ValueError
    before it computes anything.

    Derived in chapter 5.11.
    """
    check_aside(weight, aside, few)
    OC, C = weight.shape
    grads = dout.reshape(-1, OC).T @ inp.reshape(-1, C)
    learns = slice(None)
    if aside is not None:
        few[aside[aside >= 0]] = grads[aside >= 0]
        grads[aside >= 0] = 0
        learns = aside < 0
    squares[:] = np.sum(grads * grads, axis=1)
    new = weight[learns], m[learns], v[learns]
    learn(new[0], grads[learns], *new[1:], factors)
    weight[learns], m[learns], v[learns] = new
