# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       gpu.launch: "One way to launch a kernel, on a GPU or in the simulator."
#       gpu.ptx: "What the compiler makes of a kernel, without a GPU."
#       gpu.toolkit: "What of NVIDIA's software a machine has."
# ---

# %% [markdown]
# # Launch: one kernel, two machines
#
# > The same Python function runs in the simulator or is compiled for a GPU;
# > its machine code can be read where there is no GPU.
#
# *Reading time: 25 minutes. You need:
# [chapter A.5](05_simulator.ipynb) for the simulator,
# [chapter 3.2](../3_gpu/02_sectors.ipynb) for vectors of four.*

# %% [markdown]
# ## Where we are
#
# A kernel should be written once. Where there is a GPU, it is compiled and
# runs there; where there is none, it is simulated. This chapter builds what
# decides: arrays that lie on one of the two, the `Kernel` that is launched on
# them, the exchange of the simulator's names for numba's. Its second half
# compiles a kernel with no GPU at hand, and asks the compiler what it made. At
# its end you can
#
# - say why a simulated GPU's array must not be able to compute;
# - say how one function can mean the simulator's `cuda` here and numba's there;
# - read the PTX of a small kernel line by line;
# - say what registers, spills and float64 in machine code tell of a kernel.

# %% [markdown]
# ## Setup

# %% setup
import re

from llmnb.book.verify import compare

# %% [markdown]
# ## What a machine has
#
# A kernel reaches a GPU through many hands. The *driver* comes with the
# machine and talks to the GPU. numba-cuda translates Python for *libNVVM*,
# which writes PTX, an assembly language; *nvJitLink* makes machine code of
# that; *nvrtc* knows the generations of GPUs. The three are libraries of
# NVIDIA's toolkit, and any of them may be absent or of another age. Then we
# want its name, and not "no GPU".
#
# All of `llmnb` asks one function for numba-cuda. Its newest version looks for a
# function of NumPy that NumPy 2.5 no longer has, an old name of `vstack`, and
# without it compiles nothing. So the name is put back first. And numba has an old
# numba.cuda of its own, which numba-cuda takes the place of when Python starts,
# but not where it lies in a folder on the path: there we ask it to.

# %% imports of the toolkit tags=["export"] module="gpu.toolkit"
import ctypes
import functools
import importlib.util
import os
from contextlib import suppress

import numpy as np


# %% numba's CUDA tags=["export"] module="gpu.toolkit"
def numba_cuda():
    """The module numba.cuda, ready for NumPy 2.5, which dropped a name.

    Raises ImportError where numba-cuda is not installed.
    """
    if not hasattr(np, "row_stack"):
        np.row_stack = np.vstack
    with suppress(ImportError):  # where numba-cuda is on the path only
        importlib.import_module("_numba_cuda_redirector")
    from numba import cuda

    return cuda


# %% is there a GPU, whoever can use it tags=["export"] module="gpu.toolkit"
@functools.cache
def gpus():
    """How many NVIDIA GPUs the driver offers; 0 where there is no driver."""
    name = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError:
        return 0
    count = ctypes.c_int()
    refused = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    return 0 if refused else count.value


# %% what is absent tags=["export"] module="gpu.toolkit"
_PARTS = {"nvvm": "libNVVM", "nvJitLink": "nvJitLink", "nvrtc": "nvrtc"}


@functools.cache
def absent():
    """Which part of what compiles kernels is not here; empty if all are."""
    if importlib.util.find_spec("numba_cuda") is None:
        return (
            "numba-cuda is not installed: pip install 'llmnb[cuda]', or "
            "'llmnb[ptx]' where there is no GPU"
        )
    from cuda import pathfinder

    for name, said in _PARTS.items():
        try:
            pathfinder.load_nvidia_dynamic_lib(name)
        except Exception:  # not found, or of no use: each has its own class
            return (
                f"{said}, of NVIDIA's toolkit, is missing: "
                "pip install 'numba-cuda[cu13]'"
            )
    return ""


# %% [markdown]
# Whether a kernel runs on a GPU or on the simulator is asked once. Where there
# is a GPU that cannot be used the simulator takes its place with a warning,
# never without a word; a model there refuses to be made
# ([chapter 3.11](../3_gpu/11_step.ipynb)).

# %% imports of the launch tags=["export"]
import functools
import os
import types
import warnings
from contextlib import contextmanager

import numpy as np

from llmnb.checks import FLOATS, INTS, check_fit
from llmnb.gpu.ptx import no_compiler
from llmnb.gpu.simulator import (
    cuda,
    load4,
    placed,
    record,
    simulate,
    store4,
)
from llmnb.gpu.toolkit import absent, gpus, numba_cuda
from llmnb.shapes import Memory


# %% is there a GPU tags=["export"]
@functools.cache
def missing():
    """Why kernels run on the simulator; empty where they run on a GPU.

    LLMNB_CUDA=simulator chooses the simulator even where there is a GPU.
    Warns where there is one that cannot be used.
    """
    if os.environ.get("LLMNB_CUDA") == "simulator":
        return "LLMNB_CUDA asks for the simulator"
    if not gpus():
        return absent() or "numba-cuda finds no NVIDIA GPU with a driver"
    why = no_compiler() or numba_cuda().cuda_error() or ""
    if why:
        warnings.warn(f"there is a GPU, but {why}", stacklevel=2)
    return why


# %% what runs here tags=["nbval-ignore-output"]
print(missing() or "a GPU")

# %% [markdown]
# ## Arrays on the device

# %% [markdown]
# A GPU, the *device*, has a memory of its own, and arrays must be copied
# there from Python's, the *host*. numba's arrays on a device know their
# shape and can be copied back, cut and reshaped; they cannot compute. A
# simulated device should offer no more, or else a program would run on the
# simulator and fail on the GPU. So a `DeviceArray` hides a NumPy array.

# %% arrays on the device tags=["export"]
ALIGN = 256  # bytes: every allocation on a GPU begins at a multiple


class DeviceArray:
    """A simulated GPU's array: only kernels and copies reach its elements.

    It answers to what llmnb uses of numba's device arrays, and to no more,
    so that code written for it runs on a GPU. array: C-contiguous.
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


# %% [markdown]
# An allocation on a GPU begins at a multiple of 256 bytes, and so does a
# simulated one.


# %% to the device and back tags=["export"]
def simulated(array):
    """A copy of a NumPy array on the simulated GPU, wherever this runs."""
    return DeviceArray(placed(np.asarray(array), ALIGN))


def to_device(array):
    """A copy of a NumPy array on the GPU, or else on the simulated one."""
    if missing():
        return simulated(array)
    return numba_cuda().to_device(np.ascontiguousarray(array))


def to_host(array):
    """A copy of a device's array as a NumPy array.

    Waits for the kernels that were launched before.
    """
    return array.copy_to_host()


# %% [markdown]
# New memory holds what was left there. On the simulator that is NaN, so that
# a result that was never written is seen.


# %% new memory tags=["export"]
def empty(shape, dtype=np.float32, like=None):
    """An array on the device that nobody has written to yet.

    like: a device's array; the new one is where that is. On the simulator
    it is full of NaN, or of a senseless integer.
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
    """
    if work is None:
        return empty(floats, like=like)
    if work.size < floats:
        raise ValueError(
            f"{name}: work must hold {floats} floats, got {work.size}"
        )
    return work


# %% there and back
there = to_device(np.arange(6.0).reshape(2, 3))
print(there.shape, there.nbytes, to_host(there[1]))

# %% [markdown]
# A kernel checks nothing: on a GPU, an element beyond the end of an array
# is somebody else's. So each layer looks at its arguments before it launches,
# by the decorator `shapes` of [chapter A.9](09_checks.ipynb), with the checks
# of the next cells in the place of NumPy's.


# %% check an array tags=["export"]
def check_device(name, array, shape=None, kinds=np.float32, written=False):
    """Raise unless `array` is a device's, of this shape and dtype.

    name, shape, kinds: as for llmnb.checks.check_array; every device's array
    may be written. Raises TypeError (not on a device, wrong dtype) or
    ValueError (wrong shape, not C-contiguous, not aligned).
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


# %% a message
try:
    check_device("encoder_forward: out", there, (2, 3))
except TypeError as error:
    print(error)

# %% [markdown]
# Layers also ask whether two arrays share memory, and whether a vector of
# four can begin where an array begins.


# %% where an array lies tags=["export"]
def address(array):
    """Where the first element of a device's array lies in its memory."""
    if isinstance(array, DeviceArray):
        return array._array.ctypes.data
    return array.__cuda_array_interface__["data"][0]


def overlap(a, b):
    """Whether two arrays on devices share memory; both contiguous."""
    i, j = address(a), address(b)
    return i < j + b.nbytes and j < i + a.nbytes


# %% how layers look at them tags=["export"]
def device_kind(x):
    """All of a device's array that decides whether it fits."""
    if not hasattr(x, "copy_to_host"):
        return type(x)
    return x.dtype, x.shape, x.is_c_contiguous(), address(x) % ALIGN


DEVICE = Memory(
    check_device, device_kind, overlap, FLOATS[:1], INTS[:1], bounded=False
)


def aligned(*arrays):
    """Whether `load4` and `store4` can begin where these arrays begin."""
    return all(address(array) % 16 == 0 for array in arrays)


# %% [markdown]
# ## The same function, compiled
#
# A kernel finds `cuda`, `load4` and `store4` among the globals of its
# module: the simulator's. numba looks up global names in a dictionary that
# the function carries. So we make a second function of the same code with
# another dictionary, in which the three are numba's own.
#
# Vectors of four numba does not have. Its *intrinsics* let us write them in
# LLVM's language, as [chapter A.4](04_kernels.ipynb) did for
# its team of threads: point to the
# element, call it a pointer to four floats, and load, with the promise that
# the address is a multiple of 16.


# %% vectors of four on a GPU tags=["exporti"]
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


# %% what stands for a name on a GPU tags=["exporti"]
@functools.cache
def _real_names():
    """numba's own objects for the simulator's, by id."""
    load, store = _real_vectors()
    return {id(cuda): numba_cuda(), id(load4): load, id(store4): store}


# %% [markdown]
# A function that a kernel calls is treated alike, and so are the values that
# a kernel has closed over: a function that makes kernels, of different tile
# sizes say, compiles a size in as a constant.


# %% the same function for numba tags=["exporti"]
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


# %% [markdown]
# ## A launch

# %% [markdown]
# A `Kernel` is launched as numba's are, `kernel[grid, block](arguments)`.
# Where the arrays are decides which machine runs it. A launch on a GPU
# returns at once, while the GPU works; a *stream* is the queue in which it
# is put, and its launches run one after the other. A Python float is
# refused, because numba would pass it as a float64. The driver refuses a grid
# of 0 blocks, which is what layers ask for where an array has no elements. Then
# there is nothing to compute, and nothing is launched.

# %% the stream tags=["exporti"]
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


# %% a launch tags=["export"]
class Kernel:
    """A function that every thread of a grid runs.

    `kernel[grid, block](arguments)` launches it: on a device's arrays it runs
    there, in the current stream; on those of the simulated GPU it is
    simulated. A call returns nothing, and does nothing where there are no
    blocks, or no threads in one. Raises TypeError for a Python float, which
    would be computed with in float64, and ValueError for a grid with more
    than 65,535 blocks along another axis than the first.
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


# %% [markdown]
# Two decorators: `kernel` for what is launched, `device` for what kernels
# call.


# %% decorators tags=["export"]
def kernel(function=None, **options):
    """Make a Kernel of a function.

    options: numba's `launch_bounds`, the largest number of threads a block
    will have; `fastmath`, on unless False: a product and a sum become one
    instruction, exp and division are approximate; `lto`, off unless True:
    the assembler optimises once more, and forgets parts of fastmath.
    """
    options = {"fastmath": True, "lto": False} | options
    if function is None:
        return functools.partial(kernel, **options)
    return Kernel(function, **options)


def device(function):
    """Let kernels call a function; it is compiled along with them."""
    function.on_device = True
    return function


# %% [markdown]
# A training step is launched on a stream of its own. What is launched inside
# `with stream(handle)` goes there, and libraries that launch kernels
# themselves ask for its address.


# %% streams tags=["export"]
@contextmanager
def stream(handle):
    """Launch on this stream of numba's what is launched inside."""
    before, _current.stream = _current.stream, handle
    try:
        yield handle
    finally:
        _current.stream = before


# %% the stream's address tags=["export"]
def stream_address():
    """The current stream as libraries take it; 0 is the default one."""
    return int(getattr(_current.stream, "handle", 0))


# %% a kernel, launched
@kernel
def add_one(out, inp, n):
    i = cuda.grid(1)
    if i < n:
        out[i] = inp[i] + np.float32(1)


inp = to_device(np.arange(300, dtype=np.float32))
out = empty(300)
add_one[3, 128](out, inp, 300)
compare("add one", to_host(out), np.arange(300) + 1, tol=1e-7)
try:
    add_one[3, 128](out, inp, 300.0)
except TypeError as error:
    print(error)

# %% [markdown]
# Cells that print counts use `simulated(array)` in place of `to_device`.
# So they print the same where there is a GPU.

# %% [markdown]
# ## What the compiler makes of it
#
# numba translates a kernel to *PTX*, an assembly language for a GPU that
# does not exist, and NVIDIA's assembler turns that into a *cubin*, the machine
# code of one that does. Neither needs a GPU. From the PTX and the words of the
# assembler we learn how many registers a thread takes, whether some of them
# had to be *spilled* to memory, whether anything computes in float64, and
# whether our vectors are vectors.
#
# All this is worth something only if it is the program that will run. numba
# can have the assembler optimise the whole once more, *link-time
# optimisation*; it does so unless told otherwise, and what comes out has other
# registers and less of fastmath in it. So `kernel` says `lto=False`, and
# what follows asks the object that a launch would make.
#
# PTX is text, and can be run without a GPU as well. `tests/ptx.py` reads it and
# does each instruction in NumPy for the threads that are there, as the manual
# of the instructions says. With it the tests run every layer of the model, and
# steps of a GPT-2 and of a Llama, from the code that a GPU would be given: not
# from the Python that the simulator knows.

# %% imports of the compiler tags=["export"] module="gpu.ptx"
import functools
import re
import types
from contextlib import contextmanager
from typing import NamedTuple

from llmnb.gpu.toolkit import absent, numba_cuda


# %% what a compiled kernel is like tags=["export"] module="gpu.ptx"
class Compiled(NamedTuple):
    """A kernel compiled for a GPU that need not be there.

    ptx: the text for GPUs of that generation. cubin: the machine code, bytes.
    registers: a thread's; spilled: bytes of them kept in memory for want of
    room; stack: bytes of a thread's arrays that are in memory; shared: bytes
    of a block's memory, with what the system takes. float64, vector_loads,
    vector_stores: how many instructions compute in double precision, or
    move 16 bytes at once from global or shared memory.
    """

    ptx: str
    cubin: bytes
    registers: int
    spilled: int
    stack: int
    shared: int
    float64: int
    vector_loads: int
    vector_stores: int


# %% is there a compiler tags=["export"] module="gpu.ptx"
@functools.cache
def no_compiler():
    """Why kernels cannot be compiled here; empty where they can.

    The smallest kernel is compiled once, to see that the parts go together.
    """
    return absent() or _apart()


def _apart():
    """Why the parts of the toolkit do not go together; empty if they do."""
    try:
        ptx, _ = numba_cuda().compile_ptx(lambda: None, (), cc=(8, 0))
        _link(ptx, (8, 0))
    except RuntimeError as error:
        if "version" not in str(error):
            raise
        return (
            "libNVVM and nvJitLink are of different CUDA toolkits, and must "
            f"be of one ({str(error).splitlines()[-1]})"
        )
    return ""


# %% translate and assemble tags=["export"] module="gpu.ptx"
def compile_kernel(kernel, kinds, cc=(9, 0)):
    """Compile a Kernel as a launch would, but with no GPU.

    kinds: (dtype name, number of dimensions) of each argument, as
    `Seen.launches` holds them; a number has none. cc: the generation, (8, 0)
    for an A100, (9, 0) for an H100. Returns a Compiled. Raises
    ModuleNotFoundError without numba-cuda, numba's errors for what it
    cannot compile, and RuntimeError for what the assembler refuses.
    """
    # from an H100 on, code is made for one generation and no later one
    cc = (*cc, "a" if cc >= (9, 0) else "")
    with _pretend(cc):
        ptx = _translated(kernel, kinds).get_asm_str(cc)
    return assemble(ptx, cc)


@functools.cache
def _translated(kernel, kinds):
    """numba's library of a kernel, from which it makes code for any GPU."""
    numba_cuda()
    from numba.core import types as nb
    from numba.cuda.dispatcher import _Kernel

    scalars = [(getattr(nb, name), ndim) for name, ndim in kinds]
    arguments = tuple(nb.Array(x, n, "C") if n else x for x, n in scalars)
    made = kernel.compiled()
    return _Kernel(made.py_func, arguments, **made.targetoptions).library


def assemble(ptx, cc):
    """Assemble PTX for a generation of GPU; returns a Compiled."""
    cubin, log = _link(ptx, cc)
    wide = re.findall(r"(ld|st)\.(?:global|shared)\S*\.v4", ptx)
    return Compiled(
        ptx,
        cubin,
        registers=_number(r"Used (\d+) registers", log),
        spilled=_number(r"(\d+) bytes spill stores", log),
        stack=_number(r"(\d+) bytes stack frame", log),
        shared=_number(r"(\d+) bytes smem", log),
        float64=len(re.findall(r"\.f64\b", ptx)),
        vector_loads=wide.count("ld"),
        vector_stores=wide.count("st"),
    )


# %% [markdown]
# numba asks the GPU of what generation it is, even when it is told. So we
# answer in its place.


# %% no GPU to ask tags=["exporti"] module="gpu.ptx"
@contextmanager
def _pretend(cc):
    """Answer numba, which asks the GPU of what generation it is."""
    from numba.cuda import codegen, dispatcher

    gpu = types.SimpleNamespace(compute_capability=cc[:2])
    here = types.SimpleNamespace(device=gpu)
    asked = dispatcher.get_current_device, codegen.devices
    dispatcher.get_current_device = lambda: gpu
    codegen.devices = types.SimpleNamespace(get_context=lambda: here)
    try:
        yield
    finally:
        dispatcher.get_current_device, codegen.devices = asked


# %% assemble tags=["exporti"] module="gpu.ptx"
def _number(pattern, log):
    """The largest number that a pattern finds; 0 where it finds none."""
    return max(map(int, re.findall(pattern, log)), default=0)


def _link(ptx, cc):
    """Assemble PTX: the cubin, and what the assembler says of it."""
    from cuda.bindings import nvjitlink

    arch = "-arch=sm_" + "".join(map(str, cc))
    handle = nvjitlink.create(2, [arch, "-verbose"])
    try:
        text = ptx.encode()
        kind = nvjitlink.InputType.PTX
        nvjitlink.add_data(handle, kind, text, len(text), "kernel.ptx")
        nvjitlink.complete(handle)
        cubin = bytearray(nvjitlink.get_linked_cubin_size(handle))
        nvjitlink.get_linked_cubin(handle, cubin)
        log = bytearray(nvjitlink.get_info_log_size(handle))
        nvjitlink.get_info_log(handle, log)
    except Exception as error:
        log = bytearray(nvjitlink.get_error_log_size(handle))
        nvjitlink.get_error_log(handle, log)
        raise RuntimeError(log.decode(errors="replace").strip()) from error
    finally:
        nvjitlink.destroy(handle)
    return bytes(cubin), log.decode(errors="replace")


# %% [markdown]
# Here is `add_one` for an H100. (Where numba-cuda is not to be had, as on
# macOS, the cell says so, and the table after it has the lines.)

# %% the PTX of a small kernel tags=["nbval-ignore-output"]
kinds = ("float32", 1), ("float32", 1), ("int64", 0)
if no_compiler():
    print(no_compiler())
else:
    made = compile_kernel(add_one, kinds)
    body = made.ptx[made.ptx.index("\n{") :]
    print(re.sub(r"_Z\w+_param", "param", body))
    print(made.registers, "registers,", made.spilled, "bytes spilled")

# %% [markdown]
# Line by line, as numba-cuda 0.30 wrote it for us:
#
# | PTX | what it does |
# |---|---|
# | `.reg .f32 %f<3>` | names for float32 values, as many as it likes |
# | `ld.param.u64 %rd6, [param_14]` | the arguments: an array is seven numbers, its address and size among them; the last one is `n` |
# | `mov.u32 %r1, %tid.x` | `threadIdx.x`; `%ntid.x` and `%ctaid.x` are `blockDim.x` and `blockIdx.x` |
# | `mul.wide.s32 %rd8, %r2, %r3` | $bD$ of (3.1.1), in 64 bits |
# | `add.s64 %rd1, %rd8, %rd7` | plus $t$: the place $i$ |
# | `setp.ge.s64 %p1, %rd1, %rd6` | is $i \ge n$? |
# | `@%p1 bra $L__BB0_2` | those lanes go to the end |
# | `shr.s64`, `and.b64`, `add.s64` | add the array's length to a negative $i$, as Python does |
# | `shl.b64 %rd13, %rd12, 2` | times four bytes |
# | `ld.global.f32 %f1, [%rd14]` | read `inp[i]` |
# | `add.ftz.f32 %f2, %f1, 0f3F800000` | add 1, whose bits are 3F800000 |
# | `st.global.f32 [%rd19], %f2` | write `out[i]` |
#
# One load, one addition, one store, and the rest finds the place: that is
# the price of a thread for each element, and one reason to give a thread
# four of them. And Python's rule for negative indices costs two or three
# instructions for each access (both share the shift here). `load4` has no
# such rule.


# %% vectors are vectors tags=["nbval-ignore-output"]
@kernel
def copy1(out, inp):
    i = cuda.grid(1)
    out[i] = inp[i]


@kernel
def copy4(out, inp):
    i = cuda.grid(1) * 4
    a, b, c, d = load4(inp, i)
    store4(out, i, a, b, c, d)


kinds = ("float32", 1), ("float32", 1)
for body in (copy1, copy4):
    if no_compiler():
        print(no_compiler())
        break
    made = compile_kernel(body, kinds)
    print(f"{body.__name__} {made.vector_loads} load, ", end="")
    print(f"{made.vector_stores} store of 16 bytes")

# %% [markdown]
# ## Take away
#
# - One function serves two machines: its code is the same, and the dictionary
#   of its global names says whose `cuda` it means.
# - A simulated array offers what a real one offers and no more, or programs
#   would run here and fail there.
# - PTX and the assembler's words need no GPU. A kernel that computes in
#   float64, spills or has lost its vectors is seen in a test.

# %% [markdown]
# ## Design note
#
# A kernel could name its machine, `simulator.cuda` or numba's, and be
# generated twice. One function with exchanged names means that what is tested
# is what runs. The price is a trick: a copy of a function object with other
# globals, which must follow closures and called functions as well.

# %% [markdown]
# ## Exercises
#
# **1** (★★). Write `add_one` once more, with vectors of four. How many requests
# of warps do the two kernels make for 300 numbers?
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# 300 threads are 10 warps, the last of them in part, and each warp makes a
# request to read and one to write: 20. With vectors 75 threads are enough, in 3
# warps: 6 requests. That 300 is a multiple of four we have used.
# :::


# %% exercise 1, a solution tags=["hide-cell"]
@kernel
def add_one4(out, inp, n):
    i = cuda.grid(1) * 4
    if i < n:
        a, b, c, d = load4(inp, i)
        one = np.float32(1)
        store4(out, i, a + one, b + one, c + one, d + one)


# %% exercise 1, checked tags=["hide-cell"]
from llmnb.book.verify import verdict
from llmnb.gpu.simulator import watch

numbers = np.arange(300, dtype=np.float32)
for each, blocks, requests in ((add_one, 3, 20), (add_one4, 1, 6)):
    inp, out = simulated(numbers), simulated(np.empty_like(numbers))
    with watch() as seen:
        each[blocks, 128](out, inp, 300)
    compare(each.__name__, to_host(out), numbers + 1, tol=1e-7)
    verdict("requests", seen.requests == requests, str(requests))

# %% [markdown]
# ## Further reading
#
# - [PTX ISA](https://docs.nvidia.com/cuda/parallel-thread-execution/), NVIDIA:
#   the meaning of every line of the table.
# - [numba-cuda](https://nvidia.github.io/numba-cuda/): the functions that
#   `cuda` offers to kernels, and how they are compiled.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("A.6")
