"""Layers on arrays drawn at random: one table, for every backend.

A row is a forward and a backward pass. What a layer says of its arguments
(llmnb.shapes) is what they are drawn from.
"""

import functools
import inspect
import re
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import strategies as st

from llmnb import reference
from llmnb.reference.rotary import rope_table

HEADS = {"B": 2, "T": 150, "group": 3, "NKV": 2, "hs": 40}
ROWS = {"B": 3, "T": 40, "C": 331}
ANY = {"a": 13, "b": 13, "c": 13}
FROM_ZERO = "more", "still", "first"  # sizes that may be 0
BOTH, OFFSETS = st.booleans(), st.sampled_from((0.0, 1.0))
# which flags say whether a gradient is added to
FLAGS = {"dinp": "add add_dinp", "dweight": "add_dweight"}
FLAGS["dbias"] = FLAGS["dweight"]
# windows of one key, about a block's size, and wider than the text
WINDOWS = st.integers(1, 9) | st.sampled_from([95, 96, 97, 130, 192, 1000])
RULE = {
    "window": WINDOWS | st.none(),
    "scale": st.sampled_from((None, 0.1)),
    "softcap": st.sampled_from((None, 2.0, 50.0)),
}


def _any(s):
    return s | {"...": tuple(s.values())}


def _heads(s):
    NH, NKV, hs = s["group"] * s["NKV"], s["NKV"], s["hs"]
    return s | {"NH": NH, "C": NH * hs, "QKV": (NH + 2 * NKV) * hs,
                "N": NH + NKV}  # fmt: skip


def _turning(s):
    hs = 2 * s["half"]
    width, rows = (s["heads"] + s["still"]) * hs, s["first"] + s["T"] + 1
    return s | {"hs": hs, "W": width, "R": rows}


def _apart(p):
    """No row near zero, where the norm is steep."""
    p["inp"] += np.sign(p["inp"])


def _table(p):
    rows, hs = p["table"].shape
    p["table"] = rope_table(rows, hs, 100.0).astype(p["x"].dtype)


def _logits(p):
    """Far from zero; what stands in the padding is never read."""
    p["logits"][...] = 4 * p["logits"] + 20
    p["logits"][..., p["V"] :] = 1e30


class Layer(NamedTuple):
    """A row of the table.

    most: the most of each size that is drawn; gpu: on the simulator, where
    a layer is drawn there. tol: in float32 and in float64, relative to the
    largest element of a result. large: sizes for several threads. derive:
    makes the other sizes. options: strategies by name. settle: makes drawn
    arguments ones that can be. absent: sets of arrays that may be None.
    spread: deviations of what is drawn. fresh: gradients that are never
    added to. turns: the gradient that is turned in place into another.
    edges: sizes that are tried too, each with options. even: sizes that
    vectors of four fit, for a GPU, and options.
    """

    name: str
    most: dict
    tol: tuple
    large: tuple
    derive: object = lambda s: s
    options: dict = {}
    settle: object = lambda p: None
    absent: tuple = ((),)
    spread: tuple = (1.0,)
    fresh: tuple = ()
    turns: str = ""
    edges: tuple = ()
    gpu: dict = {}
    even: tuple = ()

    @property
    def ways(self):
        return f"{self.name}_forward", f"{self.name}_backward"

    def written(self, way):
        rows = getattr(reference, way).arguments.arrays
        return [a.name for a in rows if a.written]

    def kept(self, name, p):
        """Whether what an array holds is read before it is written."""
        if name in self.written(self.ways[0]):
            return f"d{name}" == self.turns
        flags = FLAGS.get(name, "").split()
        return name not in self.fresh and all(p.get(x, True) for x in flags)

    def sized(self, *sizes):
        return dict(zip(self.most, sizes, strict=True))


def parameters(way):
    return inspect.signature(getattr(reference, way)).parameters


def problem(layer, dtype, sizes, spread=1.0, absent=(), **options):
    """The arguments of both passes by name; what must not be read is NaN."""
    s, rng, p = layer.derive(sizes), np.random.default_rng(0), {}
    for way in layer.ways:
        for a in getattr(reference, way).arguments.arrays:
            shape = s["..."] if a.open else ()
            for factor, size in a.sizes:
                base, mark = re.match(r"(\w*)(\W?)", size).groups()
                shape += (factor * s[base] + 2 * (mark == "+"),)
            x = rng.normal(scale=spread, size=shape).astype(dtype)
            if a.limit:
                x = rng.integers(0, s[a.limit[1]], shape, np.int32)
            p.setdefault(a.name, x)
        p |= {name: s[name] for name in parameters(way) if name in s}
    p |= options | dict.fromkeys(absent)
    layer.settle(p)
    for way in layer.ways:
        for name in layer.written(way):
            if p[name] is not None and not layer.kept(name, p):
                p[name][...] = np.nan
    return p


@functools.cache
def problems(name, dtype, gpu=False, cap=10**9):
    """A strategy of problems of a row; gpu: small enough for a simulator."""
    layer = NAMED[name]
    sizes = {
        name: st.integers(name not in FROM_ZERO, min(n, cap))
        if isinstance(n, int)
        else n
        if cap > 9
        else st.integers(name not in FROM_ZERO, cap)
        for name, n in (layer.gpu if gpu else layer.most).items()
    }
    how = {"spread": st.sampled_from(layer.spread)}
    how |= {"absent": st.sampled_from(layer.absent)} | layer.options
    fixed = st.just(layer), st.just(dtype), st.fixed_dictionaries(sizes)
    return st.builds(problem, *fixed, **how)


def arguments(way, p):
    """A pass's arguments, in order, by name."""
    return {k: p.get(k, x.default) for k, x in parameters(way).items()}


def copied(p, dtype=None):
    """The same problem, in arrays of its own; floats in another dtype."""
    return {
        k: x if not isinstance(x, np.ndarray)
        else x.astype(dtype or x.dtype) if x.dtype.kind == "f" else x.copy()
        for k, x in p.items()
    }  # fmt: skip


def passed(layer, backend, p, ways=None, **how):
    """A copy of a problem, when its passes have run."""
    p = copied(p)
    for way in ways or layer.ways:
        getattr(backend, way)(**arguments(way, p), **how)
    return p


def results(layer, p):
    """What the passes have left, by name."""
    names = [name for way in layer.ways for name in layer.written(way)]
    return {name: p[name] for name in names if p[name] is not None}


def assert_near(got, want, tol):
    """Two dicts of arrays; tol: of each array's largest, or of 1 if less."""
    assert got.keys() == want.keys()
    for name, x in got.items():
        scale = max(1, np.abs(want[name]).max(initial=0))
        error = np.abs(x - want[name]).max(initial=0) / scale
        assert error <= tol, f"{name}: {error:.1e}"


_NORM = {"eps": st.sampled_from((1e-3, 0.1)), "offset": OFFSETS}
_SCALES = {"scale": st.sampled_from((1.0, 24.0, 7.3))}
_TURN = {"half": 20, "heads": 4, "still": 3, "first": 9}
_FEW = {"group": 2, "NKV": 2}
_SIZE = st.integers(1, 13) | st.sampled_from([37, 48, 49, 51, 97])

LAYERS = (
    Layer(
        "encoder", {"B": 3, "T": 9, "C": 99, "Vp": 40}, (1e-5, 1e-12),
        ((4, 50, 131, 3),),
    ),
    Layer(
        "embedding", {"B": 3, "T": 9, "C": 40, "Vp": 9}, (5e-5, 5e-13),
        ((4, 50, 131, 3),), options=_SCALES,
        gpu={"B": 3, "T": 23, "C": 140, "Vp": 9},
        even=((3, 7, 36, 9), {"scale": 7.3}),
    ),
    Layer(
        "layernorm", ROWS, (2e-4, 1e-11), ((3, 37, 331),),
        edges=[((1, n, 3), {}) for n in (15, 16, 17, 1023, 1024, 1025, 1200)],
    ),
    Layer(
        "rmsnorm", ROWS, (2e-5, 1e-12), ((3, 37, 331),),
        options=_NORM | {"add": BOTH}, settle=_apart,
        edges=[((1, n, 3), {}) for n in (15, 16, 17, 1023, 1024, 1025, 1200)],
        gpu={"B": 2, "T": 9, "C": 140}, even=((3, 7, 36), {"eps": 1e-3}),
    ),
    Layer(
        "matmul", {"B": 3, "T": _SIZE, "C": _SIZE, "OC": _SIZE},
        (2e-5, 1e-12),
        # all cut by rows but dweight; by columns, dweight by rows; sums of
        # several blocks
        ((1, 1, 7, 5), (1, 300, 40, 41), (2, 10, 41, 600), (1, 100, 801, 49)),
        options={"add_dinp": BOTH, "add_dweight": BOTH},
        absent=(
            (), ("residual",), ("bias", "dbias"),
            ("bias", "dbias", "residual"), ("dweight", "dbias"), ("dweight",),
        ),
        # more columns than a panel, more rows than a block
        edges=[((1, 50, *x), {}) for x in ((768, 5), (5, 1537), (1600, 64))],
    ),
    Layer(
        "attention", HEADS, (2e-6, 1e-13),
        ((1, 37, 1, 1, 17), (2, 130, 3, 1, 16)), _heads, {"add": BOTH},
        edges=[
            *(((1, T, 1, 1, 9), {})
              for T in (31, 32, 33, 63, 64, 65, 128, 129, 257)),
            ((2, 200, 1, 1, 140), {"add": False}),
        ],
    ),
    Layer(
        "local_attention", HEADS | {"T": 300}, (6e-6, 1e-13),
        ((2, 130, 2, 2, 16),), _heads, RULE | {"add": BOTH},
        edges=[
            ((1, 210, 2, 1, 256), {"window": n, "softcap": 20.0, "spread": 3})
            for n in (1, 64, 96, 97, 300)
        ],
        gpu={"B": 1, "T": 40, "hs": st.sampled_from((2, 5, 8, 12))} | _FEW,
        even=((1, 7, 2, 1, 8), {"window": 4, "scale": None, "softcap": 3.0}),
    ),
    Layer(
        "headnorm", HEADS | {"T": 40}, (2e-5, 1e-12), ((3, 37, 3, 2, 40),),
        _heads, _NORM, _apart, turns="dinp",
        edges=[((1, n, 2, 1, 3), {}) for n in (15, 16, 17, 1025)],
        gpu=HEADS | _FEW | {"T": 9, "hs": 70},
        even=((3, 7, 2, 1, 8), {"eps": 1e-3}),
    ),
    Layer(
        "rotary", {"B": 3, "T": 70} | _TURN, (1e-6, 1e-14),
        ((1, 37, 2, 4, 2, 0),), _turning, settle=_table, turns="dx",
        gpu={"B": 2, "T": 9} | _TURN, even=((1, 3, 8, 2, 1, 1), {}),
    ),
    Layer(
        "gelu", ANY, (1e-6, 1e-12), ((1, 1, 1), (1, 1, 4097), (1, 5, 9999)),
        _any, {"add": BOTH}, spread=(0.1, 1.0, 10.0),
    ),
    Layer("residual", ANY, (1e-7, 1e-15), ((3, 37, 331),), _any),
    *(
        Layer(
            name, {"B": 4, "T": 19, "H": 150}, (1e-6, 1e-13),
            ((1, 1, 1), (1, 1, 7), (2, 37, 331)),
            spread=(0.1, 1.0, 10.0), fresh=("dinp",),
            gpu={"B": 2, "T": 5, "H": 41}, even=((1, 3, 8), {}),
        )
        for name in ("swiglu", "geglu")
    ),
    Layer(
        "crossentropy_softmax",
        {"B": 3, "T": 9, "V": st.sampled_from([1, 2, 3, 7, 31, 257, 331]),
         "more": st.sampled_from([0, 1, 53])},
        (1e-5, 1e-12), ((3, 37, 331, 53),),
        lambda s: s | {"Vp": s["V"] + s["more"]}, settle=_logits,
        fresh=("dlogits",),
    ),
)  # fmt: skip
NAMED = {x.name: x for x in LAYERS}


def draw(name, *sizes, dtype=np.float64, **options):
    """A row's problem of these sizes, in the order of its row."""
    layer = NAMED[name]
    return problem(layer, dtype, layer.sized(*sizes), **options)


# passes whose first array may be another of theirs, and which
IN_PLACE = [
    pytest.param(layer, way, a.name, id=f"{way}-{a.name}")
    for layer in LAYERS
    for way in layer.ways
    for a in getattr(reference, way).arguments.arrays[1:]
    if a.same
]


def in_place(layer, way, dtype):
    """A problem for one of them, in which nothing is added to."""
    sizes = {k: n if isinstance(n, int) else 3 for k, n in layer.most.items()}
    p = problem(layer, dtype, sizes, **dict.fromkeys(layer.options, False))
    if way == layer.ways[1]:
        p = passed(layer, reference, p, layer.ways[:1])
    return p
