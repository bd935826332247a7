# Written by `make export` from notebooks/appendix/09_checks.py: edit that file.

"""A line that declares the shapes of a function's arrays, and checks them."""

__all__ = [
    "Argument", "COMPILED", "HOST", "LIMITS", "Memory", "check_number",
    "host_kind", "shapes",
]


# imports of the decorator
import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from llmnb.checks import FLOATS, INTS, check_array, check_tokens


# check a number
LIMITS = {
    "at least 0": lambda x: x >= 0,
    "at least 1": lambda x: x >= 1,
    "above 0": lambda x: x > 0,
    "in [0, 1)": lambda x: 0 <= x < 1,
}


def check_number(name, value, limit):
    """Raise TypeError or ValueError unless `value` is a number in a limit.

    limit: one of LIMITS; NaN is in none.

    Derived in chapter A.9.
    """
    if not isinstance(value, (int, float, np.number)):
        kind = type(value).__name__
        raise TypeError(f"{name} must be a number, got {kind}")
    if not LIMITS[limit](value):
        raise ValueError(f"{name} must be {limit}, got {value}")


# one argument
def _factor(word):
    """3 and "C" for "3C"."""
    digits = re.match(r"\d*", word)[0]
    return int(digits or 1), word[len(digits) :]


class Argument:
    """What one array of a layer must be; text: as `shapes` reads it.

    Derived in chapter A.9.
    """

    def __init__(self, place, layer, name, text):
        body, _, limit = text.partition(" of ")
        sizes = body.rstrip("!?~")
        marks = body[len(sizes) :]
        self.place, self.name, self.label = place, name, f"{layer}: {name}"
        self.written, self.optional = "!" in marks, "?" in marks
        self.same, self.open = "~" in marks, sizes.startswith("...")
        self.sizes = [_factor(x) for x in sizes.split() if x != "..."]
        self.names = tuple(re.sub(r"[+|]\w*", "", sizes).split())
        self.limit = _factor(limit) if limit else None

    def found(self, shape):
        """Pairs of a name and the size that it has in an array's shape.

        None where the shape cannot be meant: it has another number of
        sizes, or a multiple of 3 is not one.
        """
        more = len(shape) - len(self.sizes)
        if more < 0 or (more > 0 and not self.open):
            return None
        pairs = [("...", shape[:more])] if self.open else []
        for (factor, name), n in zip(self.sizes, shape[more:], strict=True):
            if n % factor:
                return None
            pairs.append((name, n // factor))
        return pairs

    def wanted(self, shape, sizes):
        """The shape that an array must have which has this one."""
        if self.found(shape) is None:
            return self.names
        first = sizes.get("...", ()) if self.open else ()
        return first + tuple(
            factor * sizes[name] for factor, name in self.sizes
        )


# where arrays are
@dataclass(frozen=True)
class Memory:
    """How to look at the arrays of a backend.

    check: raises where one is not fit, as check_array; kind: all that
    decides this, as a key; share: whether two share memory. floats, ints:
    their dtypes. bounded: whether the range of integers is looked at.

    Derived in chapter A.9.
    """

    check: Callable
    kind: Callable
    share: Callable
    floats: tuple
    ints: tuple
    bounded: bool


def host_kind(x):
    """All of a NumPy array that decides whether it fits.

    Derived in chapter A.9.
    """
    if isinstance(x, np.ndarray):
        return type(x), x.dtype, x.shape, x.flags.num
    return type(x)


HOST = Memory(check_array, host_kind, np.may_share_memory, FLOATS, INTS, True)
COMPILED = replace(HOST, ints=INTS[:1])  # one type: each takes a compilation


# all arguments
class _Arguments:
    """What a layer may be called with; texts: by name, as `shapes` reads."""

    def __init__(self, layer, texts, memory):
        self.layer, self.memory, self.fitted = layer, memory, {}
        self.numbers = {k: t for k, t in texts.items() if t in LIMITS}
        self.below = {k: t[5:] for k, t in texts.items() if t[:5] == "1 to "}
        others = {k for k, t in texts.items() if t == "-"}
        others.update(self.numbers, self.below)
        self.names = [k for k in texts if k not in others]
        self.arrays = [
            Argument(i, layer, k, texts[k]) for i, k in enumerate(self.names)
        ]
        self.whole = [a for a in self.arrays if a.limit and memory.bounded]

    def look(self, given):
        """Raise unless these arguments, by name, are fit for the layer."""
        arrays = [given.get(name) for name in self.names]
        kind = self.memory.kind
        kinds = tuple([kind(x) for x in arrays])
        found = self.fitted.get(kinds)
        if found is None:
            found = self.fitted[kinds] = self._fit(arrays)
        sizes, pairs = found
        for name, limit in self.numbers.items():
            if name in given:
                check_number(f"{self.layer}: {name}", given[name], limit)
        for name, size in self.below.items():
            if name in given:
                self._limit(name, given[name], sizes[size])
        for a in self.whole:
            factor, name = a.limit
            limit = factor * sizes.get(name, given.get(name))
            check_tokens(a.label, arrays[a.place], limit)
        share = self.memory.share
        for i, j in pairs:
            if share(arrays[i], arrays[j]):
                self._same(i, arrays[i], j, arrays[j])

    def _fit(self, arrays):
        """The sizes that the arrays agree on; pairs that may not overlap."""
        memory = self.memory
        there = [a for a in self.arrays if arrays[a.place] is not None]
        sizes, kinds = self._sizes(there, arrays), self._floats(there, arrays)
        for a in self.arrays[::-1]:
            array = arrays[a.place]
            if array is None and a.optional:
                continue
            shape = a.wanted(getattr(array, "shape", ()), sizes)
            kind = getattr(array, "dtype", None)
            want = kinds if kind in memory.floats else memory.floats
            want = memory.ints if a.limit else want
            memory.check(a.label, array, shape, want, a.written)
        for a in there:
            self._relate(a, arrays[a.place].shape, sizes)
        pairs = [
            (a.place, b.place)
            for a, b in combinations(there, 2)
            if a.written or b.written
        ]
        return sizes, pairs

    def _floats(self, there, arrays):
        """The float dtype that most of the arrays have."""
        all = [arrays[a.place] for a in there[::-1] if not a.limit]
        all = [x.dtype for x in all if hasattr(x, "dtype")]
        return max(all, key=all.count, default=None)

    def _sizes(self, there, arrays):
        """The sizes, by name: what most of the arrays have.

        Where they are at odds, the one with the most sizes is right, and of
        two alike the last, which is an input.
        """
        seen = {}
        for a in sorted(there, key=lambda a: (-len(a.sizes), -a.place)):
            shape = getattr(arrays[a.place], "shape", ())
            for name, n in a.found(shape) or ():
                seen.setdefault(name, []).append(n)
        most = {name: max(all, key=all.count) for name, all in seen.items()}
        return most | {"": 1}

    def _relate(self, a, shape, sizes):
        """Raise unless a size "T+" is at least T, and "NH|C" divides C."""
        for _, size in a.sizes:
            name, mark, other = re.match(r"(\w*)(\W?)(\w*)", size).groups()
            n, of = sizes[size], sizes.get(other or name)
            if mark == "+" and n < of:
                raise ValueError(
                    f"{self.layer}: {name} must be at most {n}, the number "
                    f"of rows of {a.name}, got {of}"
                )
            if mark == "|" and (n == 0 or of % n):
                names = ", ".join(a.names)
                raise ValueError(
                    f"{a.label} must have shape ({names}), where {name} "
                    f"divides {other} = {of}, got {shape}"
                )

    def _limit(self, name, value, limit):
        whole = isinstance(value, (int, np.integer))
        if not whole or not 1 <= value <= limit:
            raise ValueError(
                f"{self.layer}: {name} must lie in [1, {limit}], got {value}"
            )

    def _same(self, i, x, j, y):
        """Raise unless the two may be, and are, the same array."""
        begin = x.reshape(-1)[:1], y.reshape(-1)[:1]
        if i > 0 or not self.arrays[j].same or not self.memory.share(*begin):
            raise ValueError(
                f"{self.layer}: {self.names[i]} and {self.names[j]} must "
                "not share memory"
            )


# the decorator of all layers
def shapes(spec, memory=HOST, **named):
    """Let a layer look at its arguments before it runs.

    spec: a text for each of the first arguments, with commas between them;
    named: texts for others. A text has the sizes of an array, such as
    "B T 3C", "T+ C" for at least T rows, "B NH|C T" for an NH that divides
    C, or "..." for any. Marks follow: ! for an array that is written; ? for
    one that may be None; ~ for one that may be the first argument itself,
    where otherwise what is written shares no memory. All arrays are of one
    float dtype; those that end in "of V" hold integers in [0, V), V a size
    or another argument. For a number the text is one of LIMITS or, if it is
    a whole one, "1 to Vp"; for what is not looked at it is "-".

    memory: where the arrays are. The layer raises TypeError or ValueError,
    which names it and the argument, before it has written anything.

    Derived in chapter A.9.
    """

    def decorate(layer):
        names = list(inspect.signature(layer).parameters)
        texts = dict(zip(names, spec.split(", "), strict=False)) | named
        arguments = _Arguments(layer.__qualname__, texts, memory)

        @functools.wraps(layer)
        def call(*args, **options):
            arguments.look(dict(zip(names, args, strict=False)) | options)
            return layer(*args, **options)

        call.arguments = arguments
        return call

    return decorate
