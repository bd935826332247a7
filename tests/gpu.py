"""What the tests of llmnb.cuda share.

A layer is run on the simulated GPU with every access checked, and on the
real one where there is one, and its results are compared with those of the
reference in float64. Each kernel that was launched is compiled for two
generations of GPU, with none at hand.
"""

import functools
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
from llmnb.reference.bfloat16 import from_bfloat16

PLACES = [simulated] if missing() else [simulated, to_device]
GENERATIONS = [(8, 0), (9, 0)]


def there(arrays, place=simulated, **others):
    """Arguments by name on a device; others: who puts which elsewhere."""
    return {
        k: others.get(k, place)(v) if isinstance(v, np.ndarray) else v
        for k, v in arrays.items()
    }


def stay_in_arena(model, monkeypatch):
    """Let no array of a simulated GPU be made outside a model's memory."""
    block = model.memory._block._array
    made = launch.DeviceArray.__init__

    def watched(self, array):
        inside = not array.size or np.shares_memory(array, block)
        assert inside, "an array of its own"
        made(self, array)

    monkeypatch.setattr(launch.DeviceArray, "__init__", watched)


def check_gradients(half, whole, batch):
    """Those in bfloat16 are those in float32, but for rounding."""
    for made in (half, whole):
        made.forward(*batch)
        made.backward()
    for name, want in whole.grads.items():
        got = np.asarray(half.grads[name])
        assert got.dtype == np.float32
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert error < 2e-2, name


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


def check_layer(layer, reference, arrays, writes, tol=2e-6, **options):
    """Run a layer and its reference on the same arguments and compare.

    arrays: the arguments in order, by name; floats are drawn as float32,
    None and numbers pass as they are. writes: names of those that the layer
    writes; give them as NaN where it must not read them. tol: relative to
    the largest element of each result. Returns what the simulator saw.
    """
    wide = {k: _wide(v) for k, v in arrays.items()}
    reference(*wide.values())
    for place in PLACES:
        given = there(arrays, place)
        with watch() as seen:
            layer(*given.values(), **options)
        if place is simulated:
            simulation = seen
        for name in writes:
            _close(name, to_host(given[name]), wide[name], tol)
        for name in set(arrays) - set(writes):
            if isinstance(arrays[name], np.ndarray):
                same = to_host(given[name])
                np.testing.assert_array_equal(same, arrays[name], name)
    return simulation


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


def _wide(x):
    if not isinstance(x, np.ndarray):
        return x
    return x.astype(np.float64 if x.dtype.kind == "f" else x.dtype)


def _close(name, got, want, tol):
    assert np.isfinite(got).all(), f"{name} holds what was never written"
    scale = max(1.0, np.abs(want).max(initial=0))
    error = np.abs(got - want).max(initial=0) / scale
    assert error < tol, f"{name}: {error:.1e} from the reference"


ROUNDING = 2**-8  # of one number to bfloat16, the most
NORM = 2e-3  # of a result's norm, the most that its error may have


def wide_half(x):
    """An array of the device's or the host's in float64; tokens stay."""
    x = to_host(x) if hasattr(x, "copy_to_host") else x
    x = from_bfloat16(x) if x.dtype == np.uint16 else x
    return x.astype(np.float64) if x.dtype.kind == "f" else x


def check_half(name, arrays, writes, exact=(), **options):
    """A layer in bfloat16 against the reference, races looked for.

    arrays: in order; writes: indices of those written; exact: of those in
    float32, which one rounding of an input has not touched.
    """
    want = [wide_half(x) if isinstance(x, np.ndarray) else x for x in arrays]
    getattr(reference, name)(*want, **options)
    there = [simulated(x) if isinstance(x, np.ndarray) else x for x in arrays]
    with watch() as seen:
        getattr(cuda, f"{name}_bf16")(*there, **options)
    for i in writes:
        got = wide_half(there[i])
        assert np.isfinite(got).all()
        scale = 1e-5 if i in exact else ROUNDING
        most = scale * np.abs(want[i]) + 1e-6
        assert (np.abs(got - want[i]) <= most).all(), (name, i)
        error = np.linalg.norm(got - want[i]) / np.linalg.norm(want[i])
        assert error < NORM, (name, i)
    check_machine_code(seen)


compiled = functools.cache(compile_kernel)


def check_machine_code(seen, stack=0):
    """Compile what was launched; no float64, no spills, no stack.

    Returns the Compiled of each kernel for the last generation, by name.
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
            assert made.stack <= stack, f"{name} keeps arrays in memory"
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
