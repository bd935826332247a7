"""What layers are given: every public layer looks before it writes.

The cases are made from what each layer says it takes, so that a new layer is
tested as soon as a backend exports it.
"""

import inspect
import math
import re
import types
from itertools import combinations

import numpy as np
import pytest
from gpu import halved, there

from llmnb import cpu, cuda, reference
from llmnb.checks import check_fit, check_tokens
from llmnb.cpu import gelu
from llmnb.gpu.launch import DeviceArray
from llmnb.shapes import LIMITS, shapes

# modules that layers are made with, and have no layer
TOOLS = "jit tile microkernel bfloat16 panels peak math launch simulator warp "
TOOLS += "elementwise ptx clock fragments toolkit nccl"
TOOLS = {*TOOLS.split(), "graph", "model"}
# what other modules have for them: it takes no arrays, makes views of them, or
# is a part of a layer that has looked; the page's two passes take dicts of
# arrays, and are no layers
OTHERS = {
    reference: "backward count_heads forward masked_scores rope_frequencies "
    "rope_table split_heads split_qkv",
    cpu: "cache_shapes panels_shape piece_length ring_size shrink squares",
    cuda: "adamw_scratch attention_scratch attention_scratch_bf16 "
    "clip_scratch cublas_scratch dinp_plan dweight_plan encoder_scratch "
    "forward_plan headnorm_scratch into_buckets layernorm_scratch "
    "layernorm_scratch_bf16 matmul_scratch rmsnorm_scratch round_bf16 "
    "rmsnorm_scratch_bf16 widen_bf16",
}
SIZES = {"B": 2, "T": 3, "NH": 2, "V": 5, "": 1}
# rows in bfloat16 go by eights
SIZES |= {"C": 8, "Vp": 16, "QKV": 24, "OC": 32, "H": 40, "hs": 48, "W": 56}


def public(backend):
    found = {name: getattr(backend, name) for name in backend.__all__}
    return {
        name: f
        for name, f in found.items()
        if isinstance(f, types.FunctionType)
        if f.__module__.split(".")[-1] not in TOOLS
    }


LAYERS = [
    pytest.param(backend, layer, id=f"{backend.__name__[6:]}-{name}")
    for backend in OTHERS
    for name, layer in public(backend).items()
    if hasattr(layer, "arguments")
]
ALL = pytest.mark.parametrize(("backend", "layer"), LAYERS)


@pytest.mark.parametrize("backend", OTHERS)
def test_every_public_function_with_arrays_says_what_it_takes(backend):
    found = public(backend)
    silent = {n for n, f in found.items() if not hasattr(f, "arguments")}
    assert silent == set(OTHERS[backend].split())


def size(factor, name):
    base, mark = re.match(r"(\w*)(\W?)", name).groups()
    return factor * SIZES.setdefault(base, 3 + len(SIZES)) + (mark == "+")


def host_arguments(layer):
    """Arguments that fit, by name; every array is NumPy's."""
    rng, given = np.random.default_rng(0), {}
    for a in layer.arguments.arrays:
        shape = (2, 8) if a.open else ()
        shape += tuple(size(*x) for x in a.sizes)
        given[a.name] = rng.random(shape, dtype=np.float32)
        if a.limit:
            given[a.name] = np.zeros(shape, np.int32)
    for name, limit in layer.arguments.numbers.items():
        given[name] = 1 if limit == "at least 1" else 0.5
    given |= dict.fromkeys(layer.arguments.below, 1)
    for name, p in inspect.signature(layer).parameters.items():
        if p.default is p.empty:
            given.setdefault(name, 0)
    return halved(layer, given)


def placed(backend, given):
    """The same arguments where the backend wants its arrays."""
    return there(given) if backend is cuda else dict(given)


def unaligned(x):
    block = np.zeros(x.nbytes + 1, np.uint8)[1:]
    view = block.view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


def read_only(x):
    view = x.view()
    view.flags.writeable = False
    return view


def refused(backend, layer, given, message):
    """Call a layer with arguments that do not fit; nothing is written."""
    arrays = [x for x in given.values() if hasattr(x, "nbytes")]
    arrays = [getattr(x, "_array", x) for x in arrays]
    before = [x.tobytes() for x in arrays]
    start = re.escape(f"{layer.__name__}: ")
    with pytest.raises((TypeError, ValueError), match=f"^{start}{message}"):
        layer(**given)
    assert [x.tobytes() for x in arrays] == before


def spoilers(backend, row):
    """Pairs of a function that makes an array unfit, and what is said."""
    own = "a device's array" if backend is cuda else "a NumPy array"
    ours = DeviceArray if backend is cuda else lambda x: x
    yield lambda x: None, f"must be {own}, got NoneType"
    yield lambda x: x.tolist(), f"must be {own}, got list"
    square = (lambda x: np.matrix(x.reshape(len(x), -1))), "got matrix"
    yield square[0], f"must be {own}, {square[1]}"
    yield np.ma.masked_array, f"must be {own}, got MaskedArray"
    yield lambda x: ours(x.astype(object)), r"must be \w+.*, got object"
    yield lambda x: ours(x.astype(np.float16)), r"must be \w+.*, got float16"
    swap = (lambda x: ours(x.astype(x.dtype.newbyteorder()))), r"got [<>]\w\d"
    yield swap[0], rf"must be \w+.*, {swap[1]}"
    yield (
        lambda x: ours(unaligned(x)),
        r"must begin at a multiple of \d+ bytes",
    )
    if row.written and backend is not cuda:
        yield read_only, "must be writeable"
    if row.written and backend is cuda:
        yield read_only, "must be a device's array, got ndarray"


@pytest.mark.filterwarnings("ignore:the matrix subclass")
@ALL
def test_arrays_that_do_not_fit_are_named(backend, layer):
    good = host_arguments(layer)
    layer.arguments.look(placed(backend, good))
    for row in layer.arguments.arrays:
        for spoil, message in spoilers(backend, row):
            given = placed(backend, good)
            given[row.name] = spoil(good[row.name])
            if row.optional and given[row.name] is None:
                layer.arguments.look(given)
            else:
                refused(backend, layer, given, f"{row.name} {message}")


def tied(layer):
    """Pairs of an array and an axis whose size another place fixes."""
    rows = layer.arguments.arrays
    places = [x for row in rows for x in row.sizes]
    for row in rows:
        for axis, (_, name) in enumerate(row.sizes):
            again = sum(other == name for _, other in places) > 1
            if name.isalpha() and again or name == "":
                yield row, axis


@ALL
def test_shapes_that_do_not_fit_are_refused(backend, layer):
    """One more along an axis, one axis more, float64, every other number."""
    good = host_arguments(layer)
    for row, axis in tied(layer):
        x, given = good[row.name], placed(backend, good)
        axis -= len(row.sizes)
        more = np.repeat(x, 2, axis).take(range(x.shape[axis] + 1), axis)
        given[row.name] = placed(backend, {"x": more})["x"]
        refused(backend, layer, given, r".* must ")
    for row in layer.arguments.arrays:
        x, given = good[row.name], placed(backend, good)
        if not row.open:
            given[row.name] = placed(backend, {"x": x[None]})["x"]
            refused(backend, layer, given, f"{row.name} must have shape")
        floats = [a for a in layer.arguments.arrays if not a.limit]
        if not row.limit and (backend is cuda or len(floats) > 1):
            double = placed(backend, {"x": x.astype(np.float64)})["x"]
            twice = placed(backend, good) | {row.name: double}
            refused(backend, layer, twice, r"\w+ must be (float|uint16)")
        if backend is cpu and x.ndim and x.shape[-1] > 1:
            given[row.name] = np.repeat(x, 2, -1)[..., ::2]
            refused(backend, layer, given, f"{row.name} must be C-contiguous")


@ALL
def test_what_is_written_shares_no_memory(backend, layer):
    """Unless it is marked as what may be the first argument itself."""
    good, rows = host_arguments(layer), layer.arguments.arrays
    ours = DeviceArray if backend is cuda else lambda x: x
    for a, b in combinations(rows, 2):
        x, y = good[a.name], good[b.name]
        block = np.zeros(max(x.nbytes, y.nbytes) + 8, np.uint8)
        # these begin at multiples of 16 bytes, which such small ones lack
        for shift in (0,) if layer.__name__.endswith("bf16") else (0, 4):
            given, at = placed(backend, good), block[shift:]
            given[a.name] = ours(block[: x.nbytes].view(x.dtype))
            given[b.name] = ours(at[: y.nbytes].view(y.dtype))
            given[a.name] = given[a.name].reshape(*x.shape)
            given[b.name] = given[b.name].reshape(*y.shape)
            same = a is rows[0] and b.same and shift == 0
            if same or not (a.written or b.written):
                layer.arguments.look(given)
                continue
            names = f"{a.name} and {b.name} must not share memory"
            refused(backend, layer, given, names)


@ALL
def test_numbers_out_of_range_are_named(backend, layer):
    given = placed(backend, host_arguments(layer))
    for name in layer.arguments.numbers:
        for value in (None, "1", math.nan, -1.0):
            refused(backend, layer, given | {name: value}, f"{name} must be ")
    for name in layer.arguments.below:
        for value in (None, 1.0, 0, -1, 10**9):
            refused(backend, layer, given | {name: value}, f"{name} must lie")


@pytest.mark.parametrize("backend", [reference, cpu])
def test_tokens_out_of_range_are_named(backend):
    for layer in public(backend).values():
        rows = getattr(layer, "arguments", None)
        for row in rows.arrays if rows else ():
            if row.limit:
                given = host_arguments(layer)
                for value in (-1, 10**6):
                    given[row.name][-1, -1] = value
                    message = rf"{row.name} must lie in .*, got {value} at"
                    refused(backend, layer, given, message)


def test_a_memmap_is_an_array_unless_it_is_read_only(tmp_path):
    """What has fitted is remembered, and a read-only one is another kind."""
    x = np.linspace(-2, 2, 12, dtype=np.float32)
    x.tofile(tmp_path / "out.bin")
    want = np.empty_like(x)
    cpu.gelu_forward(want, x)
    for mode in ("r+", "c", "w+", "r"):
        out = np.memmap(tmp_path / "out.bin", np.float32, mode, shape=12)
        if mode == "r":
            refused(cpu, cpu.gelu_forward, {"out": out, "inp": x}, "out must")
        else:
            cpu.gelu_forward(out, x)
            assert np.array_equal(out, want)


def test_what_is_only_read_may_be_read_only():
    """And no kernel is compiled another time for it."""
    x = np.linspace(-2, 2, 12, dtype=np.float64)
    out = np.empty_like(x)
    cpu.gelu_forward(out, read_only(x))
    want, out[:] = out.copy(), 0
    cpu.gelu_forward(out, x)
    assert np.array_equal(out, want)
    made = gelu._gelu_forward.routines.values()
    assert not any("readonly" in str(routine._sig) for routine in made)


@shapes("B C!, B+ 2C, B NH|C, ...?, 1 to C, above 0", last="K")
def layer(out, table, heads, any=None, number=1, rate=1, last=None):
    """A layer with one of each mark."""
    out[...] = 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, ""),
        ({"table": (4, 8)}, ""),
        ({"table": (4, 7)}, r"table must have shape \(B, 2C\), got \(4, 7\)"),
        ({"table": (4, 6)}, r"out must have shape \(2, 3\), got \(2, 4\)"),
        ({"table": (1, 8)}, "B must be at most 1, .* rows of table, got 2"),
        ({"out": (3, 4)}, r"out must have shape \(2, 4\), got \(3, 4\)"),
        ({"heads": (2, 3)}, r"heads must have .*, where NH divides C"),
        ({"heads": (2, 0)}, r"heads must have .*, where NH divides C"),
        ({"last": (1, 1)}, r"last must have shape \(K,\), got \(1, 1\)"),
        ({"any": ()}, ""),
    ],
)
def test_each_mark(change, message):
    wanted = {"out": (2, 4), "table": (4, 8), "heads": (2, 2), "last": (5,)}
    arrays = {n: np.zeros(s) for n, s in (wanted | change).items()}
    if message:
        refused(cpu, layer, arrays, message)
    else:
        layer(**arrays)
        assert arrays["out"].all()


def test_a_missing_argument_is_named():
    with pytest.raises(TypeError, match="layer: heads must be a NumPy array"):
        layer(np.zeros((2, 4)), np.zeros((4, 8)), last=np.zeros(5))


@pytest.mark.parametrize("thing", [3, 1.5, [1], (1,), None, "1", {1}])
def test_what_is_no_array_is_named(thing):
    """Python's int and float are the names of dtypes, too."""
    kind = type(thing).__name__
    with pytest.raises(TypeError, match=f"x must hold integers, got {kind}$"):
        check_tokens("x", thing, 5)
    for want in np.int64, np.float64:
        with pytest.raises(TypeError, match=f"x must be .*64, got {kind}$"):
            check_fit("x", thing, (1,), want)


def test_no_limit_admits_nan():
    assert not any(inside(math.nan) for inside in LIMITS.values())
