# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llmnb:
#     modules:
#       cuda.cublas: "The linear layer on a GPU, by cuBLASLt."
# ---

# %% [markdown]
# # cuBLASLt: a library's products
#
# > NVIDIA's library picks a kernel for every shape and uses the tensor cores. It
# > reads matrices by columns: what to ask it for, and how to prove the request.
#
# *Reading time: 18 minutes. You need: the products of
# [chapter 3.6](06_matmul.ipynb).*

# %% [markdown]
# ## Where we are
#
# The fourth version of chapter 3.6 is as far as we go by hand. A
# library holds many kernels, for every generation of GPU, and picks one by
# the shape. NVIDIA's is cuBLASLt, and `nvmath.bindings` hands its functions
# to Python. llmnb uses it where it is installed (`pip install
# 'llmnb[cuda]'`), and does without where it is not. At the end of this
# chapter you can
#
# - have a product of matrices that lie by rows computed by a library that reads
#   them by columns, without a transpose in memory;
# - prove what you ask of a library on a machine that cannot run it;
# - say what TF32 rounds, and what a tensor core is;
# - say why one gradient stays with our own kernel;
# - count the passes over memory that more epilogues would save.
#
# This much is known of the first two functions of this chapter: the requests are
# proved here, and cuBLASLt 13.10 has accepted the descriptions, on a machine
# without a GPU. The search for a kernel needs a GPU, and neither it nor a
# product has ever run.

# %% [markdown]
# ## Setup

# %% setup
from llmnb import reference
from llmnb.book.verify import compare, verdict
from llmnb.gpu.launch import to_device, to_host

# %% imports of the library's product tags=["export"]
import functools
import importlib.util
from typing import NamedTuple

import numpy as np

from llmnb.cuda.gelu import gelu_backward, gelu_forward
from llmnb.cuda.matmul import bias_gradient, matmul_scratch
from llmnb.gpu.launch import (
    DEVICE,
    address,
    empty,
    given_work,
    missing,
    stream_address,
)
from llmnb.shapes import shapes

# %% random numbers
rng = np.random.default_rng(5)

# %% [markdown]
# ## By columns
#
# cuBLASLt expects matrices by columns: element $(i, j)$ at $i + j\,\mathit{ld}$,
# where $\mathit{ld}$, the *leading dimension*, is the distance between two
# columns. Ours lie by rows. But a matrix by rows and its transpose by
# columns are the same bytes, so we ask for the transpose of every product:
#
# $$ \begin{aligned}
#    y^\top &= W x^\top + b\,1^\top , \\
#    dx^\top &= W^\top dy^\top , \\
#    dW^\top &= x^\top dy .
#    \end{aligned} \tag{3.7.1} $$
#
# What the library reads by columns is $W^\top$, $x^\top$ and $dy^\top$, and
# a flag says that it should transpose one of them back. All of this can be
# written down before any GPU is asked: the flags, the three sizes, the
# three leading dimensions. We call that a *plan*. It calls the factors
# `A` and `B` and the result `D`, as the library does.


# %% a plan tags=["export"]
class Plan(NamedTuple):
    """A product of matrices that lie by columns: D = op(A) op(B) + beta C.

    op(A) is (m, k), op(B) is (k, n), D and C are (m, n). transa, transb:
    whether op transposes what is stored. lda, ldb, ldd: elements from one
    column to the next; C has D's. ends: the library's name for what is done
    to D before it is written, such as "BIAS", a vector added to each column.
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


# %% the three plans tags=["export"]
def forward_plan(rows, C, OC, bias):
    """out = inp weight^T: A is weight, B is inp, D is out.

    rows: of inp (rows, C) and out (rows, OC); weight is (OC, C).
    """
    ends = "BIAS" if bias else "DEFAULT"
    return Plan(
        True, False, m=OC, n=rows, k=C, lda=C, ldb=C, ldd=OC, ends=ends
    )


def dinp_plan(rows, C, OC):
    """dinp = dout weight: A is weight, B is dout, D is dinp."""
    return Plan(False, False, m=C, n=rows, k=OC, lda=C, ldb=OC, ldd=C)


def dweight_plan(rows, C, OC):
    """dweight = dout^T inp: A is inp, B is dout, D is dweight."""
    return Plan(False, True, m=C, n=OC, k=rows, lda=C, ldb=OC, ldd=C)


# %% [markdown]
# A plan is only numbers, so NumPy can carry it out on the same bytes: view
# each flat array by columns, transpose where the flag says so, multiply.
# This is how a plan is proved on a machine that has no GPU.


# %% a plan in NumPy
def carry_out(plan, a, b, d, beta=0, c=None, bias=None):
    def by_columns(x, rows, cols, ld):
        steps = x.itemsize, ld * x.itemsize
        flat = x.reshape(-1)
        return np.lib.stride_tricks.as_strided(flat, (rows, cols), steps)

    A, B, D = map(by_columns, (a, b, d), *zip(*plan.stored(), strict=True))
    product = (A.T if plan.transa else A) @ (B.T if plan.transb else B)
    if beta:
        c = d if c is None else c
        product += beta * by_columns(c, *plan.stored()[2])
    if plan.ends == "BIAS":
        product += bias[:, None]
    D[...] = product


# %% the three plans, proved
rows, C, OC = 7, 5, 3
x, W = rng.normal(size=(rows, C)), rng.normal(size=(OC, C))
dy, b = rng.normal(size=(rows, OC)), rng.normal(size=OC)
before = rng.normal(size=(rows, OC))
y, dx, dW = np.empty_like(dy), np.empty_like(x), np.empty_like(W)
plan = forward_plan(rows, C, OC, bias=True)
carry_out(plan, W, x, y, beta=1, c=before, bias=b)
compare("forward", y, x @ W.T + b + before, tol=1e-12)
carry_out(dinp_plan(rows, C, OC), W, dy, dx)
compare("dinp", dx, dy @ W, tol=1e-12)
carry_out(dweight_plan(rows, C, OC), x, dy, dW)
compare("dweight", dW, dy.T @ x, tol=1e-12)

# %% [markdown]
# ## What the library is told
#
# The bias is added on the way to memory, by what the library calls an
# *epilogue*. A residual costs no pass either: it is the $C$ of
# $D = AB + \beta C$, with $\beta = 1$, and $C = D$ adds a gradient to what
# is there. The bias gradient has an epilogue as well, but it overwrites,
# and we must be able to add; it stays our own kernel of fixed order.
#
# To carry a plan out, the library wants three descriptions of matrices and
# one of the product, then a search among its kernels. All this is done once
# for each plan and kept. The kernel that is found may want memory of its
# own, a *workspace*. We offer 32 MiB, which the cuBLAS documentation, under
# `cublasSetWorkspace`, recommends for an H100's generation.


# %% places and numbers tags=["exporti"]
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


# %% set an attribute tags=["exporti"]
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


# %% [markdown]
# One word of the description allows *TF32*: the library may then round each
# factor to 10 bits behind the point instead of 23, and multiply on the
# *tensor cores*, units of a GPU for products of small matrices: one instruction
# of a warp multiplies two tiles and adds the result to a third. It is the bargain
# of [chapter 2.6](../2_cpu/06_bfloat16.ipynb) with three bits more: the range of
# float32, fewer bits of each factor, and all of them in the sums.


# %% describe a plan tags=["exporti"]
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


# %% the library itself tags=["exporti"]
@functools.cache
def _library():
    """The library's handle; made once, on the GPU that is current."""
    return _lt().create()


# %% [markdown]
# A library may want addresses to be multiples of 16 bytes or more, and promises
# a faster kernel where they are. So how well the operands are aligned is part
# of what is looked up.


# %% choose a kernel tags=["exporti"]
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


# %% carry it out tags=["exporti"]
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


# %% can it be had tags=["export"]
@functools.cache
def no_cublas():
    """Why cuBLASLt cannot multiply here; empty where it can."""
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
    """How many floats of scratch memory cuBLASLt should be given."""
    return WORKSPACE


# %% [markdown]
# ## The layer
#
# The two functions take what `matmul_forward` and `matmul_backward` take.


# %% the linear layer, forward, by cuBLASLt tags=["export"]
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
    """
    rows, work = _begun("cublas_forward", inp, work)
    OC, C = weight.shape
    plan = forward_plan(rows, C, OC, bias is not None)
    places = _places(weight, inp, out, residual, bias)
    _enqueue(plan, places, residual is not None, work, tf32)


# %% check the arrays tags=["exporti"]
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


# %% the linear layer, backward, by cuBLASLt tags=["export"]
@shapes("... C!, OC C!, OC!?, ... OC, ... C, OC C", DEVICE, work="W!?")
def cublas_backward(
    dinp, dweight, dbias, dout, inp, weight,
    add_dinp=True, add_dweight=True, *, work=None, tf32=False,
):  # fmt: skip
    """The linear layer's gradients by cuBLASLt; as cuda.matmul_backward.

    work, tf32, what is raised: as for `cublas_forward`. dbias is summed by
    llmnb's own kernel, in a fixed order; with it, work must also hold
    matmul_scratch(B * T, OC) elements.
    """
    (OC, C), name = weight.shape, "cublas_backward"
    rows, work = _begun(name, inp, work, 0 if dbias is None else OC)
    places = _places(weight, dout, dinp)
    _enqueue(dinp_plan(rows, C, OC), places, add_dinp, work, tf32)
    places = _places(inp, dout, dweight)
    _enqueue(dweight_plan(rows, C, OC), places, add_dweight, work, tf32)
    if dbias is not None:
        bias_gradient(dbias, dout, add_dweight, work)


# %% [markdown]
# Where there is a GPU with cuBLASLt, this cell compares its products with
# NumPy's. Elsewhere it says what is missing:

# %% the library against NumPy tags=["nbval-ignore-output"]
B, T, C, OC = 1, 9, 8, 68
inp, weight, bias, dout = (
    rng.normal(size=shape).astype(np.float32)
    for shape in ((B, T, C), (OC, C), (OC,), (B, T, OC))
)
want = [np.zeros_like(z) for z in (dout, inp, weight, bias)]
reference.matmul_forward(want[0], inp, weight, bias)
reference.matmul_backward(*want[1:], dout, inp, weight)
if no_cublas():
    print(no_cublas())
else:
    x, w, b, dy = map(to_device, (inp, weight, bias, dout))
    y, dx, dw, db = (empty(z.shape) for z in want)
    cublas_forward(y, x, w, b)
    cublas_backward(dx, dw, db, dy, x, w, False, False)
    names = "out", "dinp", "dweight", "dbias"
    for name, got, right in zip(names, (y, dx, dw, db), want, strict=True):
        compare(f"cuBLASLt, {name}", to_host(got), right, tol=1e-5)

# %% [markdown]
# ## More at the end of a product
#
# Three more epilogues go with a block's feedforward half, and with biases:
#
# | the library's name | what is done to a product | what leaves besides |
# |---|---|---|
# | `GELU_AUX_BIAS` | the bias is added, then GELU | `aux`: GELU's input |
# | `DGELU_BGRAD` | times GELU's slope at `aux` | dbias: the sum of its rows |
# | `BGRADB` | nothing | dbias: the sum of the rows of `dout` |
#
# What does that save? Apart, the first product writes its output, and GELU
# reads that and writes its own: three passes over a matrix, of which two
# remain. Backward the second product writes a gradient, GELU reads it and its
# input and writes another, and a kernel sums that for the bias: five passes,
# of which two remain. `BGRADB` saves the pass over `dout`. At B = 16 and T =
# 1,024, for the 12 layers of GPT-2 124M in float32:

# %% passes saved
rows, C, passes = 16 * 1024, 768, {}
passes["GELU_AUX_BIAS"] = 1 * 4 * C
passes["DGELU_BGRAD"] = 3 * 4 * C
passes["BGRADB"] = C + C + 3 * C  # both projections, and queries to values
for name, columns in passes.items():
    moved = 12 * rows * columns * 4
    print(f"{name:13} {moved / 1e9:4.1f} GB, {moved / 3.35e9:4.2f} ms")

# %% [markdown]
# The last column is a prediction for an H100, which moves 3.35 TB a second:
# together 3.8 ms. An epilogue can also lose: the library may have its
# best kernel without it, and not with it.
#
# Each is one field of the plan. `aux` lies as D does, and the library wants
# its leading dimension to be a multiple of 8. Which GELU is meant? We expect
# the tanh form of chapter 1.9, and a comparison decides it where there is a
# GPU. The sums overwrite, in float32 and in an order that is the library's;
# so micro-batches must add them up themselves.


# %% products with more at their ends tags=["export"]
@shapes("... OC!, ... OC!, ... C, OC C, OC", DEVICE, work="W!?")
def cublas_gelu_forward(
    out, aux, inp, weight, bias, *, work=None, tf32=False, fused=False
):
    """out = GELU(aux), where aux = inp weight^T + bias, by cuBLASLt.

    fused: with an epilogue; else two kernels. work, tf32, what is raised: as
    for `cublas_forward`; ValueError, too, where OC is no multiple of 8.
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


# %% what an aux must be tags=["exporti"]
def _eights(weight, axis):
    """The weight's shape, where that axis, aux's columns, goes by eights."""
    if weight.shape[axis] % 8:
        raise ValueError(
            "cuBLASLt: rows of aux must hold a multiple of 8 numbers, "
            f"got {weight.shape[axis]}"
        )
    return weight.shape


# %% [markdown]
# The plans can again be carried out in NumPy. Where the library has columns,
# our arrays have rows, so a sum over the columns of D is one over our rows:


# %% the ends, proved
def finish(plan, b, d, vector, aux):
    """What is done at a product's end; d, aux: (n, m), b: (k, n), rows."""
    if plan.ends == "GELU_AUX_BIAS":
        aux[...] = d + vector
        reference.gelu_forward(d, aux)
    if plan.ends == "DGELU_BGRAD":
        reference.gelu_backward(d, d.copy(), aux, add=False)
        vector[...] = d.sum(axis=0)
    if plan.ends == "BGRADB":
        vector[...] = b.sum(axis=0)


rows, C, OC = 7, 5, 8
x, W, b = (rng.normal(size=s) for s in ((rows, C), (OC, C), OC))
y, aux, want = (np.empty((rows, OC)) for _ in range(3))
plan = forward_plan(rows, C, OC, True)._replace(ends="GELU_AUX_BIAS")
carry_out(plan, W, x, y)
finish(plan, x, y, b, aux)
reference.gelu_forward(want, x @ W.T + b)
compare("GELU_AUX_BIAS", y, want, tol=1e-12)
W2, dy = rng.normal(size=(C, OC)), rng.normal(size=(rows, C))
dx, db = np.empty((rows, OC)), np.empty(OC)
plan = dinp_plan(rows, OC, C)._replace(ends="DGELU_BGRAD")
carry_out(plan, W2, dy, dx)
finish(plan, dy, dx, db, aux)
reference.gelu_backward(want, dy @ W2, aux, add=False)
compare("DGELU_BGRAD, dinp", dx, want, tol=1e-12)
compare("DGELU_BGRAD, dbias", db, want.sum(axis=0), tol=1e-12)
dW, db = np.empty((OC, C)), np.empty(OC)
plan = dweight_plan(rows, C, OC)._replace(ends="BGRADB")
carry_out(plan, x, dx, dW)
finish(plan, dx, dW, db, aux)
compare("BGRADB", db, dx.sum(axis=0), tol=1e-12)

# %% [markdown]
# None of the three has run, and `fused` is False unless it is asked for. `make
# gpu` times each function in turns with and without
# ([chapter A.17](../appendix/17_gpu.ipynb)); a model takes an epilogue when a
# GPU has shown that it wins, and so far no model calls these functions.
#
# ## Take away
#
# - A matrix by rows is its transpose by columns: the same bytes.
# - A request that is only numbers can be proved in NumPy before a library
#   sees it.
# - Bias and residual cost no pass; a sum that must add, in one order, stays
#   with us.
# - GELU, its slope and the sums of biases can be had at the end of a product;
#   what they save is passes over memory.
# - TF32 rounds factors, not sums.

# %% [markdown]
# ## Design note
#
# cuBLASLt can also be asked to write rows: it knows an order of rows for its
# matrices. Not every kernel and epilogue of it does, and the transpose costs
# nothing, so we ask for what every version of the library is best at. A product
# written for one model may beat a library on the shapes of that model; ours is
# kept as the version that a reader can follow, and that needs no library.

# %% [markdown]
# ## Exercises
#
# **1** (★★). An output of the forward pass is to be written into the columns
# 2 to 4 of a wider array with 8 columns. Which number of the plan changes, and
# to what? Carry it out in NumPy.
#
# :::{admonition} Solution to exercise 1
# :class: dropdown
# Only the leading dimension of D: `ldd` is 8, the distance from one row of the
# wide array, which the library takes for a column, to the next. D begins two
# numbers further on.
# :::


# %% exercise 1, a wider array tags=["hide-cell"]
def into_columns(plan, width):
    return plan._replace(ldd=width)


# %% exercise 1, checked
rows, C, OC = 7, 5, 3
x, W = rng.normal(size=(rows, C)), rng.normal(size=(OC, C))
wide = np.zeros((rows, 8))
plan = into_columns(forward_plan(rows, C, OC, bias=False), 8)
carry_out(plan, W, x, wide.reshape(-1)[2:])
compare("columns 2 to 4", wide[:, 2:5], x @ W.T, tol=1e-12)
verdict("the others", not np.delete(wide, (2, 3, 4), axis=1).any(), "stay")

# %% [markdown]
# ## Further reading
#
# - NVIDIA, [cuBLAS](https://docs.nvidia.com/cuda/cublas/): the section on the
#   cuBLASLt API, what a description may say and what an epilogue does.

# %% [markdown]
# ## What llmnb gained

# %% what llmnb gained
from llmnb.book.index import gained

gained("3.7")
