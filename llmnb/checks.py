# Written by `make export` from notebooks/1_by_hand/13_memory.py: edit that file.

"""Checks of arrays and tokens, whose errors name what is wrong."""

__all__ = [
    "FLOATS",
    "INTS",
    "check_array",
    "check_fit",
    "check_tokens",
]


# imports of the checks
import numpy as np


# check an array
FLOATS = np.dtype(np.float32), np.dtype(np.float64)
INTS = np.dtype(np.int32), np.dtype(np.int64)


def check_fit(name, array, shape, kinds):
    """Raise unless `array` has this shape and this dtype.

    name: what the message calls it, such as "layernorm_forward: out".
    shape: None for any. kinds: a dtype, or a tuple of several that will do.

    Derived in chapter 1.13.
    """
    kinds = kinds if isinstance(kinds, tuple) else (np.dtype(kinds),)
    kind = getattr(array, "dtype", type(array).__name__)
    if kind not in kinds:
        want = " or ".join(map(str, kinds))
        raise TypeError(f"{name} must be {want}, got {kind}")
    if shape is not None and array.shape != shape:
        want = str(tuple(shape)).replace("'", "")
        raise ValueError(f"{name} must have shape {want}, got {array.shape}")


def check_array(name, array, shape=None, kinds=FLOATS, written=False):
    """Raise unless a layer can work on `array`, and write it if `written`.

    It must be a NumPy array itself, not of a subclass but np.memmap, with
    this shape and dtype, C-contiguous and aligned. name, shape, kinds: as
    for check_fit. Raises TypeError (not an array, wrong dtype) or
    ValueError (all else).

    Derived in chapter 1.13.
    """
    if type(array) not in (np.ndarray, np.memmap):
        kind = type(array).__name__
        kind += ", a subclass of it" * isinstance(array, np.ndarray)
        raise TypeError(f"{name} must be a NumPy array, got {kind}")
    check_fit(name, array, shape, kinds)
    flags = array.flags
    if not flags.c_contiguous:
        raise ValueError(f"{name} must be C-contiguous")
    if not flags.aligned:
        size = array.itemsize
        raise ValueError(f"{name} must begin at a multiple of {size} bytes")
    if written and not flags.writeable:
        raise ValueError(f"{name} must be writeable, got a read-only array")


# check tokens
def check_tokens(name, tokens, vocab_size):
    """Raise unless `tokens` are integers in [0, vocab_size).

    Raises TypeError (not integers) or ValueError, which names the first
    token that is out of range and where it stands.

    Derived in chapter 1.13.
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
