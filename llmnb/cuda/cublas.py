# Written by `make export` from notebooks/3_gpu/07_cublas.py: edit that file.

"""The linear layer on a GPU, by cuBLASLt."""

__all__ = [
    "Plan", "cublas_backward", "cublas_forward", "cublas_gelu_backward",
    "cublas_gelu_forward", "cublas_scratch", "cublas_weight_backward",
    "dinp_plan", "dweight_plan", "forward_plan", "no_cublas",
]


# imports of the library's product
import functools
import importlib.util
from typing import NamedTuple

import numpy as np

from llmnb.cuda.gelu import gelu_backward, gelu_forward
from llmnb.cuda.matmul import bias_gradient, matmul_scratch
from llmnb.gpu.launch import (
    DEVICE, address, empty, given_work, missing, stream_address,
)
from llmnb.shapes import shapes


# a plan
class Plan(NamedTuple):
    """A product of matrices that lie by columns: D = op(A) op(B) + beta C.

    op(A) is (m, k), op(B) is (k, n), D and C are (m, n). transa, transb:
    whether op transposes what is stored. lda, ldb, ldd: elements from one
    column to the next; C has D's. ends: the library's name for what is done
    to D before it is written, such as "BIAS", a vector added to each column.

    Derived in chapter 3.7.
    """

    transa: bool
    transb: bool
    m: int
    n: int
    k: int
    lda: int
    ldb: int
    ldd: int
    ends: str = "DEFAULT"  # nothing

    def stored(self):
        """Rows, columns and leading dimension of A, B and D as stored."""
        a = (self.k, self.m) if self.transa else (self.m, self.k)
        b = (self.n, self.k) if self.transb else (self.k, self.n)
        return (*a, self.lda), (*b, self.ldb), (self.m, self.n, self.ldd)


# the three plans
def forward_plan(rows, C, OC, bias):
    """out = inp weight^T: A is weight, B is inp, D is out.

    rows: of inp (rows, C) and out (rows, OC); weight is (OC, C).

    Derived in chapter 3.7.
    """
    ends = "BIAS" if bias else "DEFAULT"
    return Plan(
        True, False, m=OC, n=rows, k=C, lda=C, ldb=C, ldd=OC, ends=ends
    )


def dinp_plan(rows, C, OC):
    """dinp = dout weight: A is weight, B is dout, D is dinp.

    Derived in chapter 3.7.
    """
    return Plan(False, False, m=C, n=rows, k=OC, lda=C, ldb=OC, ldd=C)


def dweight_plan(rows, C, OC):
    """dweight = dout^T inp: A is inp, B is dout, D is dweight.

    Derived in chapter 3.7.
    """
    return Plan(False, True, m=C, n=OC, k=rows, lda=C, ldb=OC, ldd=C)


# places and numbers
WORKSPACE = 8 << 20  # floats: 32 MiB
ALIGNED = 256  # bytes: the most that is claimed of an address
NOUGHT, ONE = np.zeros(1, np.float32), np.ones(1, np.float32)


def _places(a, b, d, c=None, bias=None, aux=None):
    """The addresses of A, B, C, D and what an epilogue wants; else C is D."""
    arrays = a, b, d if c is None else c, d, bias, aux
    return [0 if x is None else address(x) for x in arrays]


def _alignments(places):
    """Of each, the largest power of two, up to 256, that divides it."""
    return tuple(min(x & -x or ALIGNED, ALIGNED) for x in places)


# set an attribute
def _lt():
    """The library's functions; imported only where they are needed."""
    from nvmath.bindings import cublasLt

    return cublasLt


def _set(what, thing, name, value):
    """Set an attribute of a description; what: "matmul_desc" or so."""
    lt = _lt()
    kind = "".join(word.title() for word in what.split("_"))
    attribute = getattr(lt, f"{kind}Attribute")[name]
    dtype = getattr(lt, f"get_{what}_attribute_dtype")(attribute)
    value = np.array([value], dtype)
    change = getattr(lt, f"{what}_set_attribute")
    change(thing, attribute, value.ctypes.data, value.nbytes)


# describe a plan
def _point(product, plan, bias, aux):
    """Tell a product the addresses of what its epilogue wants."""
    if plan.ends != "DEFAULT":
        _set("matmul_desc", product, "BIAS_POINTER", bias)
    if "GELU" in plan.ends:
        _set("matmul_desc", product, "EPILOGUE_AUX_POINTER", aux)


def _describe(plan, bias, aux, tf32):
    """A plan as the library knows it: a product and three matrices."""
    from nvmath.bindings import cublas

    lt, kind = _lt(), cublas.ComputeType
    kind = kind.COMPUTE_32F_FAST_TF32 if tf32 else kind.COMPUTE_32F
    product = lt.matmul_desc_create(kind, 0)  # 0 is float32
    _set("matmul_desc", product, "TRANSA", int(plan.transa))
    _set("matmul_desc", product, "TRANSB", int(plan.transb))
    _set("matmul_desc", product, "EPILOGUE", int(lt.Epilogue[plan.ends]))
    if "GELU" in plan.ends:
        _set("matmul_desc", product, "EPILOGUE_AUX_LD", plan.ldd)
    _point(product, plan, bias, aux)
    return product, *[lt.matrix_layout_create(0, *x) for x in plan.stored()]


# the library itself
@functools.cache
def _library():
    """The library's handle; made once, on the GPU that is current."""
    return _lt().create()


# choose a kernel
@functools.cache
def _prepared(plan, alignments, size, tf32):
    """A plan described, and the kernel that the library chose for it.

    size: bytes that the kernel may use for itself. Kept for every later
    call with operands that are aligned alike. Raises RuntimeError when the
    library knows no kernel.
    """
    lt = _lt()
    # the search looks at how the bias is aligned, so it needs an address
    product, A, B, D = _describe(plan, *alignments[4:], tf32)
    wish = lt.matmul_preference_create()
    _set("matmul_preference", wish, "MAX_WORKSPACE_BYTES", size)
    for name, bytes_ in zip("ABCD", alignments, strict=False):
        _set("matmul_preference", wish, f"MIN_ALIGNMENT_{name}_BYTES", bytes_)
    found = np.zeros(1, lt.matmul_heuristic_result_dtype)
    count = np.zeros(1, np.int32)
    lt.matmul_algo_get_heuristic(
        _library(), product, A, B, D, D, wish, 1,
        found.ctypes.data, count.ctypes.data,
    )  # fmt: skip
    lt.matmul_preference_destroy(wish)
    if not count[0] or found["state"][0]:
        raise RuntimeError(f"cuBLASLt has no kernel for {plan}")
    return product, A, B, D, found


# carry it out
def _enqueue(plan, places, beta, work, tf32):
    """Enqueue D = op(A) op(B) + beta C on the current stream."""
    start = -(-address(work) // ALIGNED) * ALIGNED
    size = max(0, address(work) + work.nbytes - start)
    kept = _prepared(plan, _alignments(places), size, tf32)
    (product, A, B, D, found), (a, b, c, d, *more) = kept, places
    _point(product, plan, *more)
    beta = ONE if beta else NOUGHT
    _lt().matmul(
        _library(), product, ONE.ctypes.data, a, A, b, B,
        beta.ctypes.data, c, D, d, D,
        found.ctypes.data, start, size, stream_address(),
    )  # fmt: skip


# can it be had
@functools.cache
def no_cublas():
    """Why cuBLASLt cannot multiply here; empty where it can.

    Derived in chapter 3.7.
    """
    if missing():
        return missing()
    if importlib.util.find_spec("nvmath") is None:
        return "nvmath-python is not installed: pip install 'llmnb[cuda]'"
    try:
        _library()
    except Exception as error:  # no library to load, or one that refuses
        return f"cuBLASLt does not start: {error}"
    return ""


def cublas_scratch():
    """How many floats of scratch memory cuBLASLt should be given.

    Derived in chapter 3.7.
    """
    return WORKSPACE


# the linear layer, forward, by cuBLASLt
@shapes("... OC!, ... C, OC C, OC?, ... OC?~, W!?", DEVICE)
def cublas_forward(
    out, inp, weight, bias, residual=None, work=None, tf32=False
):
    """The linear layer by cuBLASLt; otherwise as cuda.matmul_forward.

    work: float32, 1-D, of `cublas_scratch()` elements or as many as there
    are, allocated when None. tf32: let the library round the factors to 10
    bits after the point and use tensor cores. Needs a GPU: raises
    RuntimeError with `no_cublas()` otherwise, and where the library has no
    kernel for the shape.

    Derived in chapter 3.7.
    """
    rows, work = _begun("cublas_forward", inp, work)
    OC, C = weight.shape
    plan = forward_plan(rows, C, OC, bias is not None)
    places = _places(weight, inp, out, residual, bias)
    _enqueue(plan, places, residual is not None, work, tf32)


# check the arrays
def _begun(name, array, work, columns=0):
    """How many rows an array has, and work, or a new one.

    columns: of as many it must hold the sums. Raises RuntimeError where the
    library cannot be had.
    """
    if no_cublas():
        raise RuntimeError(f"{name}: {no_cublas()}")
    rows = array.size // array.shape[-1]
    sums = matmul_scratch(rows, columns)
    if work is None:
        work = empty(max(WORKSPACE, sums), like=array)
    return rows, given_work(name, work, sums, array)


# the linear layer, backward, by cuBLASLt
@shapes("... C!, OC C!, OC!?, ... OC, ... C, OC C", DEVICE, work="W!?")
def cublas_backward(
    dinp, dweight, dbias, dout, inp, weight,
    add_dinp=True, add_dweight=True, *, work=None, tf32=False,
):  # fmt: skip
    """The linear layer's gradients by cuBLASLt; as cuda.matmul_backward.

    work, tf32, what is raised: as for `cublas_forward`. dbias is summed by
    llmnb's own kernel, in a fixed order; with it, work must also hold
    matmul_scratch(B * T, OC) elements.

    Derived in chapter 3.7.
    """
    (OC, C), name = weight.shape, "cublas_backward"
    rows, work = _begun(name, inp, work, 0 if dbias is None else OC)
    places = _places(weight, dout, dinp)
    _enqueue(dinp_plan(rows, C, OC), places, add_dinp, work, tf32)
    places = _places(inp, dout, dweight)
    _enqueue(dweight_plan(rows, C, OC), places, add_dweight, work, tf32)
    if dbias is not None:
        bias_gradient(dbias, dout, add_dweight, work)


# products with more at their ends
@shapes("... OC!, ... OC!, ... C, OC C, OC", DEVICE, work="W!?")
def cublas_gelu_forward(
    out, aux, inp, weight, bias, *, work=None, tf32=False, fused=False
):
    """out = GELU(aux), where aux = inp weight^T + bias, by cuBLASLt.

    fused: with an epilogue; else two kernels. work, tf32, what is raised: as
    for `cublas_forward`; ValueError, too, where OC is no multiple of 8.

    Derived in chapter 3.7.
    """
    rows, work = _begun("cublas_gelu_forward", inp, work)
    OC, C = _eights(weight, 0)
    plan = forward_plan(rows, C, OC, True)
    if fused:
        plan = plan._replace(ends="GELU_AUX_BIAS")
    d = out if fused else aux
    places = _places(weight, inp, d, bias=bias, aux=aux)
    _enqueue(plan, places, False, work, tf32)
    if not fused:
        gelu_forward(out, aux)


@shapes("... C!, C!, ... OC, OC C, ... C", DEVICE, work="W!?")
def cublas_gelu_backward(
    dinp, dbias, dout, weight, aux, *, work=None, tf32=False, fused=False
):
    """dinp = (dout weight) times GELU's slope at aux; dbias: its rows' sum.

    The rest as for `cublas_gelu_forward`, where C is no multiple of 8, and
    for `cublas_backward`.

    Derived in chapter 3.7.
    """
    OC, C = _eights(weight, 1)
    rows, work = _begun("cublas_gelu_backward", dout, work, C)
    plan = dinp_plan(rows, C, OC)
    if fused:
        plan = plan._replace(ends="DGELU_BGRAD")
    places = _places(weight, dout, dinp, bias=dbias, aux=aux)
    _enqueue(plan, places, False, work, tf32)
    if not fused:
        gelu_backward(dinp, dinp, aux, add=False)
        bias_gradient(dbias, dinp, False, work)


@shapes("OC C!, OC!, ... OC, ... C", DEVICE, work="W!?")
def cublas_weight_backward(
    dweight, dbias, dout, inp, add=True, *, work=None, tf32=False, fused=False
):
    """Add dout^T inp to dweight; dbias: the sum of the rows of dout.

    add: False overwrites dweight; dbias always is. The rest as for
    `cublas_backward`, and fused as for `cublas_gelu_forward`.

    Derived in chapter 3.7.
    """
    OC, C = dweight.shape
    rows, work = _begun("cublas_weight_backward", inp, work, OC)
    plan = dweight_plan(rows, C, OC)
    if fused:
        plan = plan._replace(ends="BGRADB")
    places = _places(inp, dout, dweight, bias=dbias)
    _enqueue(plan, places, add, work, tf32)
    if not fused:
        bias_gradient(dbias, dout, False, work)


# what an aux must be
def _eights(weight, axis):
    """The weight's shape, where that axis, aux's columns, goes by eights."""
    if weight.shape[axis] % 8:
        raise ValueError(
            "cuBLASLt: rows of aux must hold a multiple of 8 numbers, "
            f"got {weight.shape[axis]}"
        )
    return weight.shape
