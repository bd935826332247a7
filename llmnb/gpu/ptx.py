# Written by `make export` from notebooks/appendix/06_launch.py: edit that file.

"""What the compiler makes of a kernel, without a GPU."""

__all__ = ["Compiled", "assemble", "compile_kernel", "no_compiler"]


# imports of the compiler
import importlib.util
import re
import types
from contextlib import contextmanager
from typing import NamedTuple


# what a compiled kernel is like
class Compiled(NamedTuple):
    """A kernel compiled for a GPU that need not be there.

    ptx: the text for any GPU of that generation or a later one. registers:
    a thread's; spilled: bytes of them kept in memory for want of room;
    stack: bytes of a thread's arrays that are in memory; shared: bytes of a
    block's memory, with what the system takes. float64, vector_loads,
    vector_stores: how many instructions compute in double precision, or
    move 16 bytes at once from global or shared memory.

    Derived in chapter A.6.
    """

    ptx: str
    registers: int
    spilled: int
    stack: int
    shared: int
    float64: int
    vector_loads: int
    vector_stores: int


# is there a compiler
def no_compiler():
    """Why kernels cannot be compiled here; empty where they can.

    Derived in chapter A.6.
    """
    if importlib.util.find_spec("numba_cuda") is None:
        return "numba-cuda is not installed: pip install 'llmnb[ptx]'"
    return ""


# translate and assemble
def compile_kernel(kernel, kinds, cc=(9, 0)):
    """Compile a Kernel to PTX and on to machine code, with no GPU.

    kinds: (dtype name, number of dimensions) of each argument, as
    `Seen.launches` holds them; a number has none. cc: the generation, (8, 0)
    for an A100, (9, 0) for an H100. Returns a Compiled. Raises
    ModuleNotFoundError without numba-cuda, numba's errors for what it
    cannot compile, and RuntimeError for what the assembler refuses.

    Derived in chapter A.6.
    """
    from numba import cuda as real
    from numba.core import types as nb

    scalars = [(getattr(nb, name), ndim) for name, ndim in kinds]
    signature = nb.void(*[nb.Array(x, n, "C") if n else x for x, n in scalars])
    function = kernel.compiled().py_func
    with _pretend(cc):
        ptx, _ = real.compile_ptx(function, signature, cc=cc, **kernel.options)
    return assemble(ptx, cc)


def assemble(ptx, cc):
    """Assemble PTX for a generation of GPU; returns a Compiled.

    Derived in chapter A.6.
    """
    log = _link(ptx, cc)
    wide = re.findall(r"(ld|st)\.(?:global|shared)\S*\.v4", ptx)
    return Compiled(
        ptx,
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
    from numba.cuda import dispatcher

    asked = dispatcher.get_current_device
    answer = types.SimpleNamespace(compute_capability=cc)
    dispatcher.get_current_device = lambda: answer
    try:
        yield
    finally:
        dispatcher.get_current_device = asked


# assemble
def _number(pattern, log):
    """The largest number that a pattern finds; 0 where it finds none."""
    return max(map(int, re.findall(pattern, log)), default=0)


def _link(ptx, cc):
    """Assemble PTX to a cubin; return what the assembler says of it."""
    from cuda.bindings import nvjitlink

    arch = f"-arch=sm_{cc[0]}{cc[1]}"
    handle = nvjitlink.create(3, [arch, "-O3", "-verbose"])
    try:
        text = ptx.encode()
        kind = nvjitlink.InputType.PTX
        nvjitlink.add_data(handle, kind, text, len(text), "kernel.ptx")
        nvjitlink.complete(handle)
        log = bytearray(nvjitlink.get_info_log_size(handle))
        nvjitlink.get_info_log(handle, log)
    except Exception as error:
        log = bytearray(nvjitlink.get_error_log_size(handle))
        nvjitlink.get_error_log(handle, log)
        raise RuntimeError(log.decode(errors="replace").strip()) from error
    finally:
        nvjitlink.destroy(handle)
    return log.decode(errors="replace")
