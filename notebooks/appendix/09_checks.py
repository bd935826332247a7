# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       checks: "Checks of arrays, tokens and room, whose errors name what is wrong."
#       shapes: "A line that declares the shapes of a function's arrays, and checks them."
# ---

# %% [markdown]
# # Checks: look before a layer runs
#
# > A line above each layer says what it takes; what does not fit is refused in
# > one sentence, before anything is written. And a model asks for memory only
# > where there is room.
#
# *Reading time: 25 minutes. You need: NumPy's shapes and dtypes.*

# %% [markdown]
# ## Where we are
#
# The layers of this book are plain functions on arrays, and a model is one
# block of memory. Both are fast because they ask no questions, so somebody has
# to ask them before. At the end of this chapter you can
#
# - read and write the line `@shapes("B T C!, ...")` above a layer;
# - say which mistakes it finds, and which it cannot;
# - say how much memory a process may really take.

# %% [markdown]
# ## Setup

# %% setup
import tempfile
from pathlib import Path


# %% [markdown]
# ## What a layer is given
#
# The fast layers are loops that the package numba compiles to machine code
# ([chapter 2.1](../2_cpu/01_compile.ipynb)), and such loops check nothing. A shape that
# does not fit would read or write some neighbour's bytes in the arena, and
# nobody would notice. An array that the system has mapped read-only ends the
# process without a word, and numba takes it for granted that every number
# begins at a multiple of its own size. So every layer checks its arguments
# before it starts, and says in a sentence what is wrong.
#
# First one array. It must be NumPy's own type: `np.matrix`, which always has
# two dimensions, and masked arrays are subclasses in which indexing means
# something else. And if it is to be written, it must be writable.

# %% imports of the checks tags=["export"] module="checks"
import numpy as np


# %% check an array tags=["export"] module="checks"
FLOATS = np.dtype(np.float32), np.dtype(np.float64)
INTS = np.dtype(np.int32), np.dtype(np.int64)


def check_fit(name, array, shape, kinds):
    """Raise unless `array` has this shape and this dtype.

    name: what the message calls it, such as "layernorm_forward: out".
    shape: None for any. kinds: a dtype, or a tuple of several that will do.
    """
    kinds = kinds if isinstance(kinds, tuple) else (np.dtype(kinds),)
    if not hasattr(array, "dtype") or array.dtype not in kinds:
        kind = getattr(array, "dtype", type(array).__name__)
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


# %% check tokens tags=["export"] module="checks"
def check_tokens(name, tokens, vocab_size):
    """Raise unless `tokens` are integers in [0, vocab_size).

    Raises TypeError (not integers) or ValueError, which names the first
    token that is out of range and where it stands.
    """
    if not np.issubdtype(getattr(tokens, "dtype", object), np.integer):
        kind = getattr(tokens, "dtype", type(tokens).__name__)
        raise TypeError(f"{name} must hold integers, got {kind}")
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        bad = (tokens < 0) | (tokens >= vocab_size)
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{name} must lie in [0, {vocab_size}), "
            f"got {tokens[where]} at {where}"
        )


# %% five complaints
good = np.zeros((2, 3), np.float32)
locked = good.copy()
locked.flags.writeable = False
for bad in ([1.0], np.matrix(good), good[:1], good.T.copy().T, locked):
    try:
        check_array("layer: out", bad, (2, 3), written=True)
    except (TypeError, ValueError) as error:
        print(error)

# %% and one about tokens
try:
    check_tokens("tokens", np.array([[3, 1], [4, -1]]), 5)
except ValueError as error:
    print(error)

# %% [markdown]
# A layer has up to nine arrays, and what must fit is how their shapes hang
# together: the $C$ of one is the $C$ of another. We say that where we say
# what the layer takes, in a line above it:
#
# ```python
# @shapes("B T C!, B T!, B T!, B T C, C, C")
# def layernorm_forward(out, mean, rstd, inp, weight, bias):
# ```
#
# $C$ is what most arrays say it is, and the odd one out is named. `!` marks
# what the layer writes. Such an array must be writable, and must not share
# memory with another argument: most layers read their inputs again after
# they have begun to write. Where an input may be the output, as the logits
# whose place their gradient takes, it is marked `~`. `?` marks what may be
# None, `of V` integers in $[0, V)$, `...` any number of sizes.
#
# The decorator reads the text once. A call then looks at each array before
# the layer runs, and nothing is written unless all of them fit. A training
# step makes the same calls again and again: what has once fitted, by type,
# dtype, shape and flags, is remembered. Only values and addresses are looked
# at each time.

# %% imports of the decorator tags=["export"] module="shapes"
import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from llmnb.checks import FLOATS, INTS, check_array, check_tokens


# %% check a number tags=["export"] module="shapes"
LIMITS = {
    "at least 0": lambda x: x >= 0,
    "at least 1": lambda x: x >= 1,
    "above 0": lambda x: x > 0,
    "in [0, 1)": lambda x: 0 <= x < 1,
}


def check_number(name, value, limit):
    """Raise TypeError or ValueError unless `value` is a number in a limit.

    limit: one of LIMITS; NaN is in none.
    """
    if not isinstance(value, (int, float, np.number)):
        kind = type(value).__name__
        raise TypeError(f"{name} must be a number, got {kind}")
    if not LIMITS[limit](value):
        raise ValueError(f"{name} must be {limit}, got {value}")


# %% one argument tags=["export"] module="shapes"
def _factor(word):
    """3 and "C" for "3C"."""
    digits = re.match(r"\d*", word)[0]
    return int(digits or 1), word[len(digits) :]


class Argument:
    """What one array of a layer must be; text: as `shapes` reads it."""

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


# %% where arrays are tags=["export"] module="shapes"
@dataclass(frozen=True)
class Memory:
    """How to look at the arrays of a backend.

    check: raises where one is not fit, as check_array; kind: all that
    decides this, as a key; share: whether two share memory. floats, ints:
    their dtypes. bounded: whether the range of integers is looked at.
    """

    check: Callable
    kind: Callable
    share: Callable
    floats: tuple
    ints: tuple
    bounded: bool


def host_kind(x):
    """All of a NumPy array that decides whether it fits."""
    if isinstance(x, np.ndarray):
        return type(x), x.dtype, x.shape, x.flags.num
    return type(x)


HOST = Memory(check_array, host_kind, np.may_share_memory, FLOATS, INTS, True)
COMPILED = replace(HOST, ints=INTS[:1])  # one type: each takes a compilation


# %% all arguments tags=["exporti"] module="shapes"
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


# %% the decorator of all layers tags=["export"] module="shapes"
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


# %% a layer that looks first
@shapes("N C!, N C, C")
def scale(out, inp, factors):
    """Multiply each row by the same factors."""
    out[...] = inp * factors


result, factors = np.zeros((2, 3), np.float32), np.ones(3, np.float32)
for args in (
    (result, good, factors[:2]),
    (locked, good, factors),
    (good, good, factors),
    (result, good, None),
):
    try:
        scale(*args)
    except (TypeError, ValueError) as error:
        print(error)

# %% [markdown]
# ## Ask before taking
#
# A system that promises pages may break its word. It hands out addresses
# freely, and when the pages behind them are written and there are none left,
# Linux does not raise an error: it kills the process that is largest. Since we
# know the sum beforehand, we can look first, and say in a sentence what is
# missing. Three things must be right about it:
#
# - What is free is more than what is unused. The system keeps files it has
#   read in memory as long as nobody wants it, and writes what sleeps to the
#   swap area. `MemAvailable` in `/proc/meminfo` counts the first, and the
#   second is added. (The cache of the file system ZFS is not counted there.)
# - A container or a scheduler gives a process less than the machine has, in a
#   *control group*: a folder with a limit and what is used of it, or several,
#   one inside the other. The smallest decides.
# - What would fit must not be refused. Parts of the arena are never written
#   when a model is only read: [chapter 1.17](../1_by_hand/17_model.ipynb) leaves them out.
#
# Other systems do not say what they have, and nothing is refused there.

# %% imports of the room tags=["export"] module="checks"
import math
from contextlib import suppress
from pathlib import Path

# %% what the system has tags=["export"] module="checks"
GROUP_FILES = {
    "memory.max": "memory.current",  # version 2 of control groups
    "memory.limit_in_bytes": "memory.usage_in_bytes",  # version 1
}


def free_memory(root="/"):
    """Bytes that this process can still take; None where nobody knows.

    root: where proc/ and sys/ are. Only Linux says it. Pages that the
    system can get back count as free, and so does swap.
    """
    root = Path(root)
    try:
        system = _numbers(root / "proc/meminfo")
        free, swap = (system[x] << 10 for x in ("MemAvailable", "SwapFree"))
    except (OSError, KeyError):
        return None
    with suppress(OSError):
        cache = _numbers(root / "proc/spl/kstat/zfs/arcstats", 2)
        free += max(0, cache.get("size", 0) - cache.get("c_min", 0))
    return min([free + swap, *(_room(x, swap) for x in _groups(root))])


def _numbers(path, column=1):
    """The numbers in a column of a table, by what stands in the first."""
    rows = [row.split() for row in path.read_text().splitlines()]
    rows = [row for row in rows if row[column:] and row[column].isdigit()]
    return {row[0].rstrip(":"): int(row[column]) for row in rows}


# %% what a control group gives tags=["exporti"] module="checks"
def _groups(root):
    """The folders of the control groups around this process."""
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            kinds, path = line.split(":", 2)[1:]
            if kinds and "memory" not in kinds.split(","):
                continue
            mount, place = root / "sys/fs/cgroup" / kinds, Path(path[1:])
            yield from (mount / x for x in (place, *place.parents))


def _room(folder, swap):
    """What is left of a group's limit; infinite where there is none."""
    for most, used in GROUP_FILES.items():
        with suppress(OSError, ValueError):  # no such file, or "max"
            left = _difference(folder, most, used)
            stat = _numbers(folder / "memory.stat")
            for kind in ("active_file", "inactive_file"):
                left += stat.get(f"total_{kind}", stat.get(kind, 0))
            with suppress(OSError, ValueError):
                own = _difference(
                    folder, "memory.swap.max", "memory.swap.current"
                )
                swap = min(swap, own)
            return left + swap
    return math.inf


def _difference(folder, a, b):
    return int((folder / a).read_text()) - int((folder / b).read_text())


# %% look before taking tags=["export"] module="checks"
SMALLER = "a smaller batch_size, seq_len or model takes less"


def check_room(nbytes, remedy=SMALLER):
    """Raise MemoryError when this machine has less than nbytes to give.

    remedy: what the message proposes.
    """
    free = free_memory()
    if free is not None and nbytes > free:
        raise MemoryError(
            f"needs {nbytes / 1e9:,.1f} GB, this machine has "
            f"{free / 1e9:,.1f} GB free: {remedy}"
        )


# %% a machine of 8 GB, and a container of 2 GB on it
with tempfile.TemporaryDirectory() as place:
    for name, text in {
        "proc/meminfo": "MemAvailable: 8000000 kB\nSwapFree: 0 kB",
        "proc/self/cgroup": "0::/box",
        "sys/fs/cgroup/box/memory.max": "2000000000",
        "sys/fs/cgroup/box/memory.current": "1500000000",
        "sys/fs/cgroup/box/memory.stat": "inactive_file 700000000",
    }.items():
        path = Path(place, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    print(f"{free_memory(place):,} bytes")

# %% [markdown]
# Half a gigabyte of the two is left, and 0.7 more are copies of files.

# %% [markdown]
# ## Take away
#
# - What a layer takes is said once, in a line, where the layer is defined.
# - A check that has passed is remembered; only values and addresses are looked
#   at each time.
# - Free memory is what the smallest of the limits leaves, not what is unused.

# %% [markdown]
# ## Exercises
#
# **1** (★★). Write the line above a layer `outer(out, a, b)` that writes
# $a_i b_j$ into `out`. Which mistake does it find if `a` has 2 numbers and `b` 3,
# and when can it not find it?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# `"N M!, N, M"`. Exchange `a` and `b`, and the sizes are at odds with those of
# `out`. Where both have the same number of elements, all shapes fit: a line
# of shapes knows sizes, and not meanings.
# :::


# %% exercise 1, a solution tags=["hide-cell"]
@shapes("N M!, N, M")
def outer(out, a, b):
    out[...] = a[:, None] * b


# %% exercise 1, checked tags=["hide-cell"]
def exchanged(a, b):
    """What is said when the two are given in the other order."""
    try:
        outer(np.empty((len(a), len(b)), np.float32), b, a)
    except ValueError as error:
        return str(error)
    return "nothing"


two, three = np.ones(2, np.float32), np.ones(3, np.float32)
print("2 and 3:", exchanged(two, three))
print("3 and 3:", exchanged(2 * three, three))

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("A.9")
