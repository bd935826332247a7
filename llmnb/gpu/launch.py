# Written by `make export` from notebooks/appendix/06_launch.py: edit that file.

"""One way to launch a kernel, on a GPU or in the simulator."""

__all__ = [
    "ALIGN", "DEVICE", "DeviceArray", "Kernel", "address", "aligned",
    "check_device", "device", "device_kind", "empty", "given_work", "kernel",
    "missing", "overlap", "simulated", "stream", "stream_address",
    "to_device", "to_host",
]


# imports of the launch
import functools
import os
import types
import warnings
from contextlib import contextmanager

import numpy as np

from llmnb.checks import FLOATS, INTS, check_fit
from llmnb.gpu.ptx import no_compiler
from llmnb.gpu.simulator import cuda, load4, placed, record, simulate, store4
from llmnb.gpu.toolkit import absent, gpus, numba_cuda
from llmnb.shapes import Memory


# is there a GPU
@functools.cache
def missing():
    """Why kernels run on the simulator; empty where they run on a GPU.

    LLMNB_CUDA=simulator chooses the simulator even where there is a GPU.
    Warns where there is one that cannot be used.

    Derived in chapter A.6.
    """
    if os.environ.get("LLMNB_CUDA") == "simulator":
        return "LLMNB_CUDA asks for the simulator"
    if not gpus():
        return absent() or "numba-cuda finds no NVIDIA GPU with a driver"
    why = no_compiler() or numba_cuda().cuda_error() or ""
    if why:
        warnings.warn(f"there is a GPU, but {why}", stacklevel=2)
    return why


# arrays on the device
ALIGN = 256  # bytes: every allocation on a GPU begins at a multiple


class DeviceArray:
    """A simulated GPU's array: only kernels and copies reach its elements.

    It answers to what llmnb uses of numba's device arrays, and to no more,
    so that code written for it runs on a GPU. array: C-contiguous.

    Derived in chapter A.6.
    """

    def __init__(self, array):
        self._array, self.shape, self.ndim = array, array.shape, array.ndim
        self.dtype, self.size = array.dtype, array.size
        self.nbytes = array.nbytes

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        part = self._array[index]
        return DeviceArray(part) if isinstance(part, np.ndarray) else part

    def __array__(self, dtype=None, copy=None):
        return np.array(self._array, dtype)

    def is_c_contiguous(self):
        """Whether the elements lie one after the other."""
        return self._array.flags.c_contiguous

    def view(self, dtype):
        """The same bytes as elements of another type."""
        return DeviceArray(self._array.view(dtype))

    def reshape(self, *shape):
        """The same elements in another shape."""
        return DeviceArray(self._array.reshape(*shape))

    def copy_to_host(self, ary=None, stream=0):
        """A NumPy array of the elements; ary, if given, receives them."""
        if ary is None:
            return self._array.copy()
        check_fit("copy_to_host: ary", ary, self.shape, self.dtype)
        ary[...] = self._array
        return ary

    def copy_to_device(self, ary, stream=0):
        """Overwrite the elements with those of `ary`, of the same dtype."""
        ary = np.asarray(ary)
        check_fit("copy_to_device: ary", ary, self.shape, self.dtype)
        self._array[...] = ary


# to the device and back
def simulated(array):
    """A copy of a NumPy array on the simulated GPU, wherever this runs.

    Derived in chapter A.6.
    """
    return DeviceArray(placed(np.asarray(array), ALIGN))


def to_device(array):
    """A copy of a NumPy array on the GPU, or else on the simulated one.

    Derived in chapter A.6.
    """
    if missing():
        return simulated(array)
    return numba_cuda().to_device(np.ascontiguousarray(array))


def to_host(array):
    """A copy of a device's array as a NumPy array.

    Waits for the kernels that were launched before.

    Derived in chapter A.6.
    """
    return array.copy_to_host()


# new memory
def empty(shape, dtype=np.float32, like=None):
    """An array on the device that nobody has written to yet.

    like: a device's array; the new one is where that is. On the simulator
    it is full of NaN, or of a senseless integer.

    Derived in chapter A.6.
    """
    if isinstance(like, DeviceArray) or (like is None and missing()):
        dtype = np.dtype(dtype)
        poison = np.nan if dtype.kind == "f" else np.iinfo(dtype).max - 77
        return simulated(np.full(shape, poison, dtype))
    return numba_cuda().device_array(shape, dtype)


def given_work(name, work, floats, like):
    """A layer's scratch memory: `work` if it is given, or a new array.

    floats: how many it must hold at least. like: as for `empty`. Raises
    ValueError, which begins with the layer's name, where it holds fewer.

    Derived in chapter A.6.
    """
    if work is None:
        return empty(floats, like=like)
    if work.size < floats:
        raise ValueError(
            f"{name}: work must hold {floats} floats, got {work.size}"
        )
    return work


# check an array
def check_device(name, array, shape=None, kinds=np.float32, written=False):
    """Raise unless `array` is a device's, of this shape and dtype.

    name, shape, kinds: as for llmnb.checks.check_array; every device's array
    may be written. Raises TypeError (not on a device, wrong dtype) or
    ValueError (wrong shape, not C-contiguous, not aligned).

    Derived in chapter A.6.
    """
    if not hasattr(array, "copy_to_host"):
        kind = type(array).__name__
        raise TypeError(f"{name} must be a device's array, got {kind}")
    check_fit(name, array, shape, kinds)
    if not array.is_c_contiguous():
        raise ValueError(f"{name} must be C-contiguous")
    size = array.dtype.itemsize
    if address(array) % size:
        raise ValueError(f"{name} must begin at a multiple of {size} bytes")


# where an array lies
def address(array):
    """Where the first element of a device's array lies in its memory.

    Derived in chapter A.6.
    """
    if isinstance(array, DeviceArray):
        return array._array.ctypes.data
    return array.__cuda_array_interface__["data"][0]


def overlap(a, b):
    """Whether two arrays on devices share memory; both contiguous.

    Derived in chapter A.6.
    """
    i, j = address(a), address(b)
    return i < j + b.nbytes and j < i + a.nbytes


# how layers look at them
def device_kind(x):
    """All of a device's array that decides whether it fits.

    Derived in chapter A.6.
    """
    if not hasattr(x, "copy_to_host"):
        return type(x)
    return x.dtype, x.shape, x.is_c_contiguous(), address(x) % ALIGN


DEVICE = Memory(
    check_device, device_kind, overlap, FLOATS[:1], INTS[:1], bounded=False
)


def aligned(*arrays):
    """Whether `load4` and `store4` can begin where these arrays begin.

    Derived in chapter A.6.
    """
    return all(address(array) % 16 == 0 for array in arrays)


# vectors of four on a GPU
@functools.cache
def _real_vectors():
    """`load4` and `store4` as numba's intrinsics."""
    from llvmlite import ir
    from numba.core import types as nb
    from numba.cuda.extending import intrinsic

    four, number = ir.VectorType(ir.FloatType(), 4), ir.IntType(32)

    def place(context, builder, signature, args):
        array = context.make_array(signature.args[0])
        data = array(context, builder, args[0]).data
        return builder.bitcast(builder.gep(data, [args[1]]), four.as_pointer())

    @intrinsic
    def load(typing, array, i):
        def generate(context, builder, signature, args):
            pointer = place(context, builder, signature, args)
            vector = builder.load(pointer, align=16)
            parts = [
                builder.extract_element(vector, number(k)) for k in range(4)
            ]
            kind = signature.return_type
            return context.make_tuple(builder, kind, parts)

        return nb.UniTuple(nb.float32, 4)(array, nb.intp), generate

    @intrinsic
    def store(typing, array, i, a, b, c, d):
        def generate(context, builder, signature, args):
            vector = four(ir.Undefined)
            for k in range(4):
                vector = builder.insert_element(vector, args[2 + k], number(k))
            pointer = place(context, builder, signature, args)
            builder.store(vector, pointer, align=16)
            return context.get_dummy_value()

        f = nb.float32
        return nb.void(array, nb.intp, f, f, f, f), generate

    return load, store


# what stands for a name on a GPU
@functools.cache
def _real_names():
    """numba's own objects for the simulator's, by id."""
    load, store = _real_vectors()
    return {id(cuda): numba_cuda(), id(load4): load, id(store4): store}


# the same function for numba
def _real_function(function):
    """A copy of a function in which names mean what they do on a GPU."""
    names, codes = set(), [function.__code__]
    for code in codes:
        names.update(code.co_names)
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    known = function.__globals__
    swapped = {n: _real(known[n]) for n in names & set(known)}
    cells = [x.cell_contents for x in function.__closure__ or ()]
    return types.FunctionType(
        function.__code__,
        known | swapped,
        function.__name__,
        function.__defaults__,
        tuple(types.CellType(_real(x)) for x in cells) or None,
    )


@functools.cache
def _real_device(function):
    from numba.cuda.extending import register_jitable

    return register_jitable(_real_function(function))


def _real(value):
    if hasattr(value, "on_gpu"):  # a function that is one instruction there
        return value.on_gpu()
    if getattr(value, "on_device", False):
        return _real_device(value)
    return _real_names().get(id(value), value)


# the stream
_current = types.SimpleNamespace(stream=0)


def _kinds(args):
    """(dtype, ndim) of each argument of a launch; ndim 0 is a number."""
    return tuple(
        ("int64" if isinstance(x, int) else x.dtype.name, np.ndim(x))
        for x in args
    )


def _none(size):
    """Whether a grid or a block of this size holds nothing."""
    return 0 in size if isinstance(size, tuple) else size == 0


# a launch
class Kernel:
    """A function that every thread of a grid runs.

    `kernel[grid, block](arguments)` launches it: on a device's arrays it runs
    there, in the current stream; on those of the simulated GPU it is
    simulated. A call returns nothing, and does nothing where there are no
    blocks, or no threads in one. Raises TypeError for a Python float, which
    would be computed with in float64, and ValueError for a grid with more
    than 65,535 blocks along another axis than the first.

    Derived in chapter A.6.
    """

    def __init__(self, function, **options):
        self.function, self.options, self._made = function, options, None
        functools.update_wrapper(self, function)

    def __getitem__(self, size):
        grid, block = size
        return functools.partial(self._launch, grid, block)

    def _launch(self, grid, block, *args):
        for x in args:
            if isinstance(x, float) and not isinstance(x, np.floating):
                raise TypeError(
                    f"{self.__name__}: pass np.float32(...), not a float"
                )
        if isinstance(grid, tuple) and max(grid[1:], default=1) > 65535:
            raise ValueError(
                f"{self.__name__}: grid {grid} has more than 65,535 blocks "
                "along an axis that is not the first"
            )
        if _none(grid) or _none(block):
            return
        record((self, grid, block, _kinds(args)))
        if any(isinstance(x, DeviceArray) for x in args):
            plain = [getattr(x, "_array", x) for x in args]
            simulate(self.function, grid, block, plain)
        else:
            self.compiled()[grid, block, _current.stream](*args)

    def compiled(self):
        """numba's kernel, compiled when first launched; needs numba-cuda."""
        if self._made is None:
            jit = numba_cuda().jit
            from numba.cuda.core import config

            # a small grid is no mistake here, and no reason for a warning
            config.CUDA_LOW_OCCUPANCY_WARNINGS = 0
            self._made = jit(_real_function(self.function), **self.options)
        return self._made


# decorators
def kernel(function=None, **options):
    """Make a Kernel of a function.

    options: numba's `launch_bounds`, the largest number of threads a block
    will have; `fastmath`, on unless False: a product and a sum become one
    instruction, exp and division are approximate; `lto`, off unless True:
    the assembler optimises once more, and forgets parts of fastmath.

    Derived in chapter A.6.
    """
    options = {"fastmath": True, "lto": False} | options
    if function is None:
        return functools.partial(kernel, **options)
    return Kernel(function, **options)


def device(function):
    """Let kernels call a function; it is compiled along with them.

    Derived in chapter A.6.
    """
    function.on_device = True
    return function


# streams
@contextmanager
def stream(handle):
    """Launch on this stream of numba's what is launched inside.

    Derived in chapter A.6.
    """
    before, _current.stream = _current.stream, handle
    try:
        yield handle
    finally:
        _current.stream = before


# the stream's address
def stream_address():
    """The current stream as libraries take it; 0 is the default one.

    Derived in chapter A.6.
    """
    return int(getattr(_current.stream, "handle", 0))
