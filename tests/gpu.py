"""What the tests of llmnb.cuda share.

A layer is run on the simulated GPU with every access checked, and on the
real one where there is one, and its results are compared with those of the
reference in float64. Each kernel that was launched is compiled for two
generations of GPU, with none at hand.
"""

import functools
import re
import struct

import numpy as np
import pytest
from layers import NAMED, arguments, passed, problem

from llmnb import cuda, reference
from llmnb.bench.ladders import Sizes, ladder_named
from llmnb.gpu import launch
from llmnb.gpu.launch import missing, simulated, to_device, to_host
from llmnb.gpu.ptx import compile_kernel, no_compiler
from llmnb.gpu.simulator import watch
from llmnb.reference.bfloat16 import from_bfloat16, to_bfloat16

SIMULATED = bool(missing())
PLACES = [simulated] if SIMULATED else [simulated, to_device]
GENERATIONS = [(8, 0), (9, 0)]
_rng = np.random.default_rng(0)


def single(*shape, seed=None):
    """Random numbers in float32; without a seed, others each time."""
    rng = _rng if seed is None else np.random.default_rng(seed)
    return rng.normal(size=shape).astype(np.float32)


def half(*shape, seed=None):
    """The same, rounded to bfloat16."""
    return to_bfloat16(single(*shape, seed=seed))


def there(arrays, place=simulated, **others):
    """Arguments by name on a device; others: who puts which elsewhere."""
    return {
        k: others.get(k, place)(v) if isinstance(v, np.ndarray) else v
        for k, v in arrays.items()
    }


def error(got, want):
    """The difference's norm, over that of what is right."""
    got = wide_half(got)
    assert np.isfinite(got).all()
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def between(array, place=simulated):
    """An array on a device that begins 4 bytes after a multiple of 16."""
    flat = np.concatenate([array.ravel()[:1], array.ravel()])
    return place(flat)[1:].reshape(*array.shape)


def draw(name, *sizes):
    """The arguments of a ladder's layer, for Sizes or a beginning of them."""
    rest = (1, 1, 1, 1, 1, 1)[len(sizes) :]
    return ladder_named(name).draw(Sizes(*sizes, *rest))


def check_ladder(name, arrays, version=0, tol=2e-6):
    """Run a version of a layer, by default the last, as check_layer does."""
    ladder = ladder_named(name)
    want = ladder.reference or getattr(reference, name)
    writes = ladder.results
    return check_layer(ladder.function(version), want, arrays, writes, tol)


def check_layer(layer, reference, arrays, writes, tol=2e-6, places=PLACES):
    """Run a layer and its reference on the same arguments and compare.

    arrays: the arguments in order, by name; floats are drawn as float32,
    None and numbers pass as they are. writes: names of those that the layer
    writes; give them as NaN where it must not read them. tol: relative to
    the largest element of each result. Returns what the first place's watch
    saw.
    """
    wide = {k: wide_half(v) for k, v in arrays.items()}
    reference(*wide.values())
    for place in places:
        given = there(arrays, place)
        with watch() as seen:
            layer(*given.values())
        if place is places[0]:
            first = seen
        for name in writes:
            near(given[name], wide[name], tol, name)
        for name in set(arrays) - set(writes):
            if isinstance(arrays[name], np.ndarray):
                same = to_host(given[name])
                np.testing.assert_array_equal(same, arrays[name], name)
    return first


def linear(
    back, layer, *sizes, bias=True, residual=False, add=(True, True), **how
):
    """check_layer for a version of the linear layer, or its pass back.

    sizes: B, T, C, OC; add: whether to dinp, and to dweight and dbias.
    """
    row = NAMED["matmul"]
    absent = ["bias", "dbias"] * (not bias) + ["residual"] * (not residual)
    flags = dict(zip(("add_dinp", "add_dweight"), add, strict=True))
    sizes = row.sized(*sizes)
    p = problem(row, np.float32, sizes, absent=absent, **flags)
    way, arrays = [*both(row, p)][back]
    writes = [x for x in row.written(way) if arrays[x] is not None]
    return check_layer(layer, getattr(reference, way), arrays, writes, **how)


check_linear = functools.partial(linear, False)
check_linear_back = functools.partial(linear, True)


def both(layer, p):
    """Each pass of tests/layers.py, and its arguments, by name."""
    first, second = layer.ways
    yield first, arguments(first, p)
    saved = passed(layer, reference, p, [first])
    yield second, arguments(second, saved)


def check_row(name, *sizes, tol=1e-5, **options):
    """check_layer for both passes of a row of tests/layers.py."""
    layer = NAMED[name]
    p = problem(layer, np.float32, layer.sized(*sizes), **options)
    return check_problem(layer, p, tol)


def check_problem(layer, p, tol=1e-5):
    return [
        check_layer(
            getattr(cuda, way), getattr(reference, way), arrays,
            layer.written(way), tol,
        )
        for way, arrays in both(layer, p)
    ]  # fmt: skip


def unwatched(name, *sizes, **options):
    """What both passes of a row leave with nothing watched; what is right."""
    layer, found, want = NAMED[name], [], []
    p = problem(layer, np.float32, layer.sized(*sizes), **options)
    for way, arrays in both(layer, p):
        given = there(arrays)
        getattr(cuda, way)(*given.values())
        getattr(reference, way)(**arrays)
        found += [to_host(given[x]) for x in layer.written(way)]
        want += [arrays[x] for x in layer.written(way)]
    return found, want


def launched(name, *sizes, ways="fb", **options):
    """What passes of a row launch, f and b, with nothing run."""
    layer = NAMED[name]
    p = problem(layer, np.float32, layer.sized(*sizes), **options)
    with pytest.MonkeyPatch.context() as patch, watch() as seen:
        patch.setattr(launch, "simulate", lambda *args: None)
        for way, arrays in both(layer, p):
            if way.removeprefix(f"{name}_")[0] in ways:
                getattr(cuda, way)(*there(arrays).values())
    return seen


def near(got, want, tol, name="a result"):
    """A device's array; tol: relative to the largest element, or to 1."""
    got = to_host(got)
    assert np.isfinite(got).all(), f"{name} holds what was never written"
    scale = max(1.0, np.abs(want).max(initial=0))
    error = np.abs(got - want).max(initial=0) / scale
    assert error < tol, f"{name}: {error:.1e} from the reference"


ROUNDING = 2**-8  # of one number to bfloat16, the most
NORM = 2e-3  # of a result's norm, the most that its error may have


def wide_half(x):
    """An array of the device's or the host's in float64; all else stays."""
    if not hasattr(x, "nbytes"):
        return x
    x = to_host(x) if hasattr(x, "copy_to_host") else x
    x = from_bfloat16(x) if x.dtype == np.uint16 else x
    return x.astype(np.float64) if x.dtype.kind == "f" else x


def halved(layer, given):
    """The same arguments, with what is wanted in bfloat16 as that: uint16."""
    while True:
        try:
            layer.arguments.look(there(given))
        except TypeError as error:
            name = re.search(r": (\w+) must be uint16, got flo", str(error))
            if not name:
                return given
            given = given | {name[1]: to_bfloat16(given[name[1]])}
        else:
            return given


def check_half(layer, p):
    """Passes in bfloat16, those that there are, against the reference.

    p: a problem of a row of tests/layers.py; races are looked for. What is
    written in float32 no rounding has touched.
    """
    for way, arrays in both(layer, p):
        run = getattr(cuda, f"{way}_bf16", None)
        if run is None:
            continue
        arrays = halved(run, arrays)
        want = {k: wide_half(x) for k, x in arrays.items()}
        getattr(reference, way)(**want)
        given = there(arrays)
        with watch() as seen:
            run(*given.values())
        for name in layer.written(way):
            x, right = given[name], want[name]
            assert error(x, right) < NORM, (way, name)
            scale = 1e-5 if x.dtype == np.float32 else ROUNDING
            most = scale * np.abs(right) + 1e-6
            assert (np.abs(wide_half(x) - right) <= most).all(), (way, name)
        check_machine_code(seen)


compiled = functools.cache(compile_kernel)


def check_machine_code(seen, registers=255):
    """Compile what was launched; no float64, no spills, no stack, no calls.

    Nor the GPU's own tangent, which is right to three digits. registers: the
    most. Returns the Compiled of each kernel for the last generation, by name.
    """
    if no_compiler():
        pytest.skip(no_compiler())
    found = {}
    for kernel, _, _, kinds in seen.launches:
        for cc in GENERATIONS:
            made = compiled(kernel, kinds, cc)
            name = kernel.__name__
            assert made.float64 == 0, f"{name} computes in float64"
            assert made.spilled == 0, f"{name} spills registers"
            assert made.stack == 0, f"{name} keeps arrays in memory"
            assert made.registers <= registers, name
            assert not re.search(r"\bcall\b|tanh\.approx", made.ptx), name
            found[name] = made
    return found


# the lowest 12 bits of an instruction of sm_80 to sm_90, as nvdisasm names it
OPCODES = {"HMMA": 0x23C, "LDSM": 0x83B, "LDGSTS": 0xFAE}


def tensor_instructions(seen, prefix):
    """How many of OPCODES each kernel has whose name begins with prefix.

    One dict by name for each kernel and generation, read from machine code.
    """
    if no_compiler():
        pytest.skip(no_compiler())
    chosen = {(x[0], x[3]): x for x in seen.launches}.values()
    for kernel, _, _, kinds in chosen:
        if not kernel.__name__.startswith(prefix):
            continue
        for cc in GENERATIONS:
            codes = opcodes(compiled(kernel, kinds, cc).cubin)
            yield {k: codes.count(v) for k, v in OPCODES.items()}


def opcodes(elf):
    """The codes of all instructions, of 16 bytes each."""
    (start,) = struct.unpack_from("<Q", elf, 0x28)
    size, count = struct.unpack_from("<HH", elf, 0x3A)
    found = []
    for n in range(count):
        row = struct.unpack_from("<IIQQQQ", elf, start + n * size)
        _, _, flags, _, offset, length = row
        if flags & 4:  # it can be run
            places = range(offset, offset + length, 16)
            found += [
                struct.unpack_from("<H", elf, i)[0] & 0xFFF for i in places
            ]
    return found
