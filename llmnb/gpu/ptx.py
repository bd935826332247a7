# Written by `make export` from notebooks/appendix/06_launch.py: edit that file.

"""What the compiler makes of a kernel, without a GPU."""

__all__ = ["Compiled", "assemble", "compile_kernel", "no_compiler"]


# imports of the compiler
import functools
import re
import types
from contextlib import contextmanager
from typing import NamedTuple

from llmnb.gpu.toolkit import absent, numba_cuda


# what a compiled kernel is like
class Compiled(NamedTuple):
    """A kernel compiled for a GPU that need not be there.

    ptx: the text for GPUs of that generation. cubin: the machine code, bytes.
    registers: a thread's; spilled: bytes of them kept in memory for want of
    room; stack: bytes of a thread's arrays that are in memory; shared: bytes
    of a block's memory, with what the system takes. float64, vector_loads,
    vector_stores: how many instructions compute in double precision, or
    move 16 bytes at once from global or shared memory.

    Derived in chapter A.6.
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


# is there a compiler
@functools.cache
def no_compiler():
    """Why kernels cannot be compiled here; empty where they can.

    The smallest kernel is compiled once, to see that the parts go together.

    Derived in chapter A.6.
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


# translate and assemble
def compile_kernel(kernel, kinds, cc=(9, 0)):
    """Compile a Kernel as a launch would, but with no GPU.

    kinds: (dtype name, number of dimensions) of each argument, as
    `Seen.launches` holds them; a number has none. cc: the generation, (8, 0)
    for an A100, (9, 0) for an H100. Returns a Compiled. Raises
    ModuleNotFoundError without numba-cuda, numba's errors for what it
    cannot compile, and RuntimeError for what the assembler refuses.

    Derived in chapter A.6.
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
    """Assemble PTX for a generation of GPU; returns a Compiled.

    Derived in chapter A.6.
    """
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


# no GPU to ask
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


# assemble
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
