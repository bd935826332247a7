# Written by `make export` from notebooks/02_memory.py: edit that file.

"""Lay out one block of memory.

One allocation holds every tensor of the model as a named view, so the
footprint is known before training begins and never grows.
"""

__all__ = [
    "check_array",
    "check_float",
    "check_tokens",
]


# imports of the checks
import numpy as np


# check an array
def check_array(name, array, shape, dtype):
    """Raise unless `array` is a C-contiguous ndarray of this shape and dtype.

    name: what the message calls it, such as "layernorm_forward: out".
    Raises TypeError (not an array, wrong dtype) or ValueError (wrong shape,
    not contiguous).

    Derived in chapter 2.
    """
    if not isinstance(array, np.ndarray):
        kind = type(array).__name__
        raise TypeError(f"{name} must be a NumPy array, got {kind}")
    if array.dtype != dtype:
        want = np.dtype(dtype)
        raise TypeError(f"{name} must be {want}, got {array.dtype}")
    if array.shape != tuple(shape):
        raise ValueError(
            f"{name} must have shape {tuple(shape)}, got {array.shape}"
        )
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} must be C-contiguous")


# check a dtype
def check_float(name, array):
    """Raise TypeError unless `array` is a float32 or float64 ndarray.

    Derived in chapter 2.
    """
    kind = getattr(array, "dtype", type(array).__name__)
    if kind not in (np.float32, np.float64):
        raise TypeError(f"{name} must be float32 or float64, got {kind}")


# check tokens
def check_tokens(name, tokens, vocab_size):
    """Raise unless `tokens` are integers in [0, vocab_size).

    Raises TypeError (not integers) or ValueError, which names the first
    token that is out of range and where it stands.

    Derived in chapter 2.
    """
    kind = getattr(tokens, "dtype", type(tokens).__name__)
    if not np.issubdtype(kind, np.integer):
        raise TypeError(f"{name} must hold integers, got {kind}")
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        bad = (tokens < 0) | (tokens >= vocab_size)
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{name} must lie in [0, {vocab_size}), "
            f"got {tokens[where]} at {where}"
        )
