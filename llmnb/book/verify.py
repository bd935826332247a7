# Written by `make export` from notebooks/appendix/11_proofs.py: edit that file.

"""Proof helpers: comparisons, numerical gradients, verdicts."""

__all__ = ["compare", "numerical_gradient", "verdict"]


# imports of the proofs
import numpy as np


# a verdict
def verdict(name, ok, claim):
    """Print "name  claim  ok", or "FAIL" and raise AssertionError.

    `ok` is the truth of the claim; both texts are printed as they are.

    Derived in chapter A.11.
    """
    print(f"{name:<16} {claim:<28} {'ok' if ok else 'FAIL'}")
    if not ok:
        raise AssertionError(f"{name}: not {claim}")


# compare two arrays
def compare(name, got, want, tol=1e-5):
    """Print a verdict on two arrays: is their largest difference below tol?

    The difference is taken relative to the largest element of `want` where
    that exceeds 1. Shapes that differ and NaN count as failure, which prints
    FAIL with the difference and raises AssertionError.

    Derived in chapter A.11.
    """
    # no integers, whose differences may wrap around
    got, want = 1.0 * np.asarray(got), 1.0 * np.asarray(want)
    claim = f"max|diff| < {tol:.0e}"
    if got.shape != want.shape:
        verdict(name, False, f"shape {want.shape}, got {got.shape}")
    scale = max(1.0, np.abs(want).max(initial=0.0))
    error = np.abs(got - want).max(initial=0.0) / scale
    ok = bool(error < tol)
    verdict(name, ok, claim if ok else f"{claim}, got {error:.1e}")


# central differences
def numerical_gradient(f, x, h=1e-5):
    """Central differences of a scalar function in every element of x.

    f takes no argument and reads x, a float64 array, which is changed in
    place element by element and restored. Returns an array like x. Raises
    TypeError for another dtype: in float32 the differences drown in rounding.

    Derived in chapter A.11.
    """
    if x.dtype != np.float64:
        raise TypeError(
            f"numerical_gradient: x must be float64, got {x.dtype}"
        )
    grad = np.empty_like(x)
    for i in np.ndindex(x.shape):
        old = x[i]
        x[i] = old + h
        above = f()
        x[i] = old - h
        below = f()
        x[i] = old
        grad[i] = (above - below) / (2 * h)
    return grad
