"""Where kernels run: simulator or GPU, device arrays, names swapped."""

import importlib.util
import inspect
import os
from pathlib import Path

import numpy as np
import pytest
from processes import ROOT, output, python

from llmnb.bench.rungs_matmul import MATMUL_FORWARD
from llmnb.gpu import launch
from llmnb.gpu.launch import empty, kernel, missing, simulated, to_host
from llmnb.gpu.ptx import compile_kernel, no_compiler
from llmnb.gpu.simulator import cuda, load4, store4, watch
from llmnb.gpu.toolkit import gpus

compiles = pytest.mark.skipif(bool(no_compiler()), reason=no_compiler())
KINDS = (("float32", 1), ("float32", 1), ("int64", 0))


def floats(*shape):
    size = int(np.prod(shape))
    return np.arange(size, dtype=np.float32).reshape(shape)


def same(there, want):
    np.testing.assert_array_equal(to_host(there), want)


SAY = "from llmnb.gpu.launch import missing; print(missing())"


def test_the_environment_asks_for_the_simulator():
    said = output(SAY, LLMNB_CUDA="simulator")
    assert said == "LLMNB_CUDA asks for the simulator"


def test_numba_cuda_in_a_folder_on_the_path():
    """As `pip --target` puts it, where Python does not start with it."""
    found = importlib.util.find_spec("numba_cuda")
    if found is None:
        pytest.skip("numba-cuda is not installed")
    code = (
        "from llmnb.gpu.toolkit import numba_cuda; "
        "print(numba_cuda().__file__)"
    )
    folder = Path(found.submodule_search_locations[0])
    path = os.pathsep.join([str(ROOT), str(folder.parent)])
    done = python(code, options=["-S"], PYTHONPATH=path)
    assert folder in Path(done.stdout.strip()).parents, done.stderr


def test_without_numba_cuda():
    hide = (
        "import importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'numba_cuda' "
        "else real(n, *a)\n"
    )
    want = "numba-cuda is not installed: pip install 'llmnb[cuda]', or "
    want += "'llmnb[ptx]' where there is no GPU"
    code = "from llmnb.gpu.ptx import no_compiler; print(no_compiler())"
    assert output(hide + code) == want
    if not gpus():
        assert output(hide + SAY, LLMNB_CUDA="") == want


@compiles
def test_without_a_gpu():
    if not missing():
        pytest.skip("there is a GPU")
    said = output(SAY, LLMNB_CUDA="", CUDA_VISIBLE_DEVICES="")
    assert said == "numba-cuda finds no NVIDIA GPU with a driver"


def test_without_greenlet():
    code = (
        "import sys; sys.modules['greenlet'] = None\n"
        "from llmnb.gpu.simulator import simulate\n"
        "try:\n    simulate(lambda: None, 1, 1, ())\n"
        "except ImportError as error:\n"
        "    print(error, '|', error.__cause__, error.__suppress_context__)"
    )
    want = "the simulated GPU needs the package greenlet: pip install "
    assert output(code) == want + "'llmnb[simulator]' | None True"


def test_llmnb_cuda_is_imported_only_when_asked_for():
    code = (
        "import sys, llmnb\n"
        "assert 'llmnb.cuda' not in sys.modules\n"
        "import llmnb.cuda\n"
        "print({'numba', 'greenlet'} & set(sys.modules))"
    )
    assert output(code) == "set()"


# a device's arrays


def test_a_device_array_offers_what_numbas_offers():
    """Code that runs on the simulator must run on a GPU."""
    if no_compiler():
        pytest.skip(no_compiler())
    from numba.cuda.cudadrv.devicearray import DeviceNDArray

    # set by its constructor, which needs a GPU
    made = {"shape", "dtype", "ndim", "size", "strides"}
    public = {n for n in dir(simulated(floats(2))) if not n.startswith("_")}
    assert public <= set(dir(DeviceNDArray)) | made
    for name in ("copy_to_host", "copy_to_device", "is_c_contiguous", "view"):
        ours = inspect.signature(getattr(launch.DeviceArray, name))
        theirs = inspect.signature(getattr(DeviceNDArray, name))
        assert list(ours.parameters) == list(theirs.parameters), name
    for name in ("__len__", "__getitem__", "__array__"):
        assert hasattr(DeviceNDArray, name)
    kinds = [c for c in DeviceNDArray.__mro__[:-1] if "__init__" in vars(c)]
    source = "".join(inspect.getsource(c.__init__) for c in kinds)
    for name in made & set(vars(simulated(floats(2)))):
        assert f"self.{name} =" in source, name


def test_there_and_back():
    a = floats(3, 4)[:, ::2]
    for there in (simulated(a), launch.to_device(a)):
        same(there, a)
        sizes = there.ndim, there.size, there.nbytes, len(there)
        assert (there.shape, *sizes) == ((3, 2), 2, 6, 24, 3)
        assert there.is_c_contiguous()
        assert np.array_equal(np.asarray(there), a)
    here, there = np.empty((3, 2), np.float32), simulated(a)
    assert there.copy_to_host(here) is here
    assert np.array_equal(here, a)
    there.copy_to_device(here * 2)
    same(there, a * 2)
    there.copy_to_device(simulated(a))
    a[0] = 99  # copies are copies, both ways
    to_host(there)[1] = 99
    same(there, floats(3, 4)[:, ::2])
    assert isinstance(there[1, 1], np.float32)  # one element is a number


def test_copies_neither_convert_nor_broadcast():
    """As numba's do not."""
    there = simulated(floats(3, 2))
    for way in (there.copy_to_device, there.copy_to_host):
        with pytest.raises(TypeError, match="ary must be float32, got float6"):
            way(np.zeros((3, 2)))
        for shape in ((2,), (1, 2), (2, 3), (4, 3, 2)):
            with pytest.raises(ValueError, match="ary must have shape"):
                way(np.zeros(shape, np.float32))
    same(there, floats(3, 2))


def test_views_share_memory():
    there = simulated(floats(4, 6))
    row, flat = there[1], there.reshape(24)
    row.copy_to_device(np.full(6, 7, np.float32))
    assert (to_host(flat)[6:12] == 7).all()
    assert to_host(there.reshape(2, 12)).shape == (2, 12)
    assert to_host(there[1:3]).shape == (2, 6)
    assert not there[:, 1:].is_c_contiguous()
    assert to_host(there.view(np.int32)).dtype == np.int32


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_every_allocation_is_aligned(size):
    a = [simulated(floats(size)) for _ in range(3)]
    a.append(empty(size, like=a[0]))
    assert all(launch.address(x) % launch.ALIGN == 0 for x in a)
    assert launch.aligned(*a)
    there = simulated(floats(9))
    assert launch.aligned(there[4:]) and not launch.aligned(there, there[1:])


@pytest.mark.parametrize(
    "array, error, text",
    [
        (floats(2, 3), TypeError, "be a device's array, got ndarray"),
        (None, TypeError, "be a device's array, got NoneType"),
        (simulated(np.ones((2, 3))), TypeError, "be float32, got float64"),
        (simulated(floats(3, 2)), ValueError, r"shape \(2, 3\), got \(3, 2\)"),
        (simulated(floats(2, 6))[:, ::2], ValueError, "be C-contiguous"),
    ],
)
def test_check_device(array, error, text):
    launch.check_device("x: a", simulated(floats(2, 3)), (2, 3))
    launch.check_device("x: a", simulated(np.arange(2)), (2,), np.int64)
    with pytest.raises(error, match=f"x: a must .*{text}"):
        launch.check_device("x: a", array, (2, 3))


# kernels


@launch.device
def twice(x):
    return x + x


@kernel
def double(out, inp, n):
    i = cuda.grid(1)
    if i < n:
        out[i] = twice(inp[i])


@kernel(launch_bounds=64, fastmath=False)
def copy4(out, inp, n):
    i = cuda.grid(1) * 4
    if i < n:
        x, y, z, w = load4(inp, i)
        store4(out, i, x, y, z, w)


def test_a_launch():
    inp = simulated(floats(52))
    out = empty(52, like=inp)
    assert double[2, 32](out, inp, 52) is None
    same(out, 2 * floats(52))
    copy4[1, 32](out, inp, 52)
    same(out, floats(52))
    assert double.__name__ == "double"
    assert double.options == {"fastmath": True, "lto": False}
    options = {"launch_bounds": 64, "fastmath": False, "lto": False}
    assert copy4.options == options


def test_a_python_float_is_refused():
    inp = simulated(floats(4))
    with pytest.raises(TypeError, match=r"double: pass np.float32\(...\)"):
        double[1, 32](inp, inp, 4.0)
    double[1, 32](inp, inp, np.int32(4))


@pytest.mark.parametrize(
    "size", [(0, 32), ((3, 0), 32), (2, 0), ((2, 2), (8, 0)), (np.int64(0), 1)]
)
def test_a_launch_of_no_threads_does_nothing(size):
    """Of layers on empty arrays; a driver refuses it."""
    out = simulated(floats(4))
    with watch() as seen:
        double[size](out, out, 4)
    same(out, floats(4))
    assert not seen.launches and not seen.threads
    with pytest.raises(ValueError, match="a grid has 1 block or more"):
        double[-1, 32](out, out, 4)


def test_a_grid_that_no_gpu_takes_is_refused():
    """By the simulator too, which could simulate it."""
    inp = simulated(floats(4))
    with pytest.raises(ValueError, match=r"double: grid \(1, 65536\) has mo"):
        double[(1, 65536), 32](inp, inp, 4)
    shape = 1, 8 * 65536, 1
    rows, out = (simulated(np.zeros(shape, np.float32)) for _ in range(2))
    weight = simulated(np.zeros((1, 1), np.float32))
    with pytest.raises(ValueError, match="grid .1, 65536. has more than 65"):
        MATMUL_FORWARD[0](out, rows, weight, None)


def factory(factor):
    @kernel
    def scale(out, inp, n):
        i = cuda.grid(1)
        if i < n:
            out[i] = twice(inp[i]) * factor

    return scale


def test_streams_nest():
    now = launch._current
    assert now.stream == 0
    with launch.stream("a"):
        with launch.stream("b"):
            assert now.stream == "b"
        assert now.stream == "a"
    assert now.stream == 0


# compiled


@compiles
@pytest.mark.parametrize("cc", [(8, 0), (9, 0)])
def test_names_are_swapped(cc):
    made = compile_kernel(copy4, KINDS, cc)
    assert (made.vector_loads, made.vector_stores) == (1, 1)
    assert ".maxntid" in made.ptx
    only = "a" if cc == (9, 0) else ""  # as it is launched
    assert f".target sm_{cc[0]}{cc[1]}{only}\n" in made.ptx
    assert made.cubin.startswith(b"\x7fELF")
    assert (made.spilled, made.stack, made.float64) == (0, 0, 0)
    assert made.registers > 4
    made = compile_kernel(double, KINDS, cc)
    assert made.vector_loads == made.float64 == 0
    assert ".maxntid" not in made.ptx
    assert "call" not in made.ptx  # the device function is inlined
    # the function itself still means the simulator's
    assert double.function.__globals__["cuda"] is cuda


@compiles
def test_constants_of_a_factory_are_compiled_in():
    inp = simulated(floats(4))
    for factor in (1, 3):
        out = empty(4, like=inp)
        factory(np.float32(factor))[1, 32](out, inp, 4)
        same(out, 2 * factor * floats(4))
    ptx = [compile_kernel(factory(np.float32(x)), KINDS).ptx for x in (3, 5)]
    for text, bits in zip(ptx, ("40400000", "40A00000"), strict=True):
        assert f"0f{bits}" in text


@compiles
def test_what_is_wrong_with_a_kernel_is_seen():
    @kernel
    def careless(out, inp, n):
        i = cuda.grid(1)
        if i < n:
            out[i] = inp[i] * 0.1 + 0.3

    assert compile_kernel(careless, KINDS).float64 > 0

    @kernel
    def indexed(out, inp, n):
        mine = cuda.local.array(64, np.float32)
        for i in range(n):
            mine[i] = inp[i]
        out[0] = mine[n // 2]

    assert compile_kernel(indexed, KINDS).stack >= 256
    assert compile_kernel(double, KINDS).stack == 0

    @kernel
    def share(out, inp, n):
        tile = cuda.shared.array(256, np.float32)
        i = cuda.threadIdx.x
        tile[i] = inp[i]
        cuda.syncthreads()
        out[i] = tile[n - i]

    assert compile_kernel(share, KINDS).shared >= 1024
