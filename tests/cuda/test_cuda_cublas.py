"""cuBLASLt: the plans, what the library is told, on a GPU the results.

With no GPU the library's place is taken by `Library`, which keeps what it is
told and multiplies with NumPy at the addresses it is given: that proves what
we ask for, not what cuBLASLt does.
"""

import ctypes
import sys
from enum import IntEnum
from types import SimpleNamespace

import numpy as np
import pytest
from gpu import check_linear, check_linear_back, near, single

import llmnb.cuda.cublas as cublas
from llmnb.bench import gpu
from llmnb.bench.ladders import TINY
from llmnb.gpu.launch import simulated, to_device, to_host
from llmnb.reference import gelu_backward, gelu_forward, matmul_forward

SIZES = [(1, 1, 1), (1, 5, 3), (7, 1, 9), (3, 8, 4), (33, 17, 65)]
SEARCHES = []
ENDS = {
    "DEFAULT": 1, "BIAS": 4, "GELU_AUX_BIAS": 164, "DGELU_BGRAD": 208,
    "BGRADB": 512,
}  # fmt: skip


def by_columns(address, rows, cols, ld):
    count = ld * (cols - 1) + rows
    kind = ctypes.c_float * count
    flat = np.frombuffer(kind.from_address(address), np.float32)
    return np.lib.stride_tricks.as_strided(flat, (rows, cols), (4, 4 * ld))


class Library:
    """What of cublasLt our module calls, with descriptions as dicts."""

    names = "TRANSA TRANSB EPILOGUE BIAS_POINTER EPILOGUE_AUX_POINTER "
    names += "EPILOGUE_AUX_LD MAX_WORKSPACE_BYTES"
    names = names.split() + [f"MIN_ALIGNMENT_{x}_BYTES" for x in "ABCD"]
    MatmulDescAttribute = MatmulPreferenceAttribute = {x: x for x in names}
    Epilogue = IntEnum("Epilogue", ENDS)
    matmul_heuristic_result_dtype = np.dtype(
        [("algo", np.uint64, 8), ("state", np.int32)]
    )

    def create(self):
        return 77

    def matmul_desc_create(self, compute, scale):
        return {"compute": compute, "scale": scale, "EPILOGUE": 1}

    def matrix_layout_create(self, kind, rows, cols, ld):
        assert ld >= rows
        return rows, cols, ld

    def matmul_preference_create(self):
        return {}

    def matmul_preference_destroy(self, wish):
        SEARCHES.append(wish)

    def get_matmul_desc_attribute_dtype(self, name):
        return np.int64 if "POINTER" in name or "LD" in name else np.int32

    def get_matmul_preference_attribute_dtype(self, name):
        return np.uint64 if name == "MAX_WORKSPACE_BYTES" else np.uint32

    def matmul_desc_set_attribute(self, thing, name, place, size):
        kind = {4: ctypes.c_int32, 8: ctypes.c_int64}[size]
        thing[name] = kind.from_address(place).value

    matmul_preference_set_attribute = matmul_desc_set_attribute

    def matmul_algo_get_heuristic(
        self, handle, product, A, B, C, D, wish, wanted, found, count
    ):
        self.wanted(product, D)
        ctypes.c_int32.from_address(count).value = 1

    def wanted(self, product, D):
        """What the documentation wants of a description's epilogue."""
        ends = Library.Epilogue(product["EPILOGUE"]).name
        assert ends == "DEFAULT" or product["BIAS_POINTER"] % 4 == 0
        assert ends == "DEFAULT" or product["BIAS_POINTER"] > 0
        assert ("EPILOGUE_AUX_POINTER" in product) == ("GELU" in ends)
        if "GELU" in ends:
            ld = product["EPILOGUE_AUX_LD"]
            assert ld % 8 == 0 and ld >= D[0]
            assert product["EPILOGUE_AUX_POINTER"] % 16 == 0
        return ends

    def finish(self, product, result, right, D):
        """Do what the epilogue says; result: (m, n), right: (k, n)."""
        ends = self.wanted(product, D)
        if ends == "DEFAULT":
            return result
        size = len(right.T) if ends == "BGRADB" else D[0]
        vector = by_columns(product["BIAS_POINTER"], size, 1, size)
        if "GELU" in ends:
            place = product["EPILOGUE_AUX_POINTER"]
            aux = by_columns(place, *D[:2], product["EPILOGUE_AUX_LD"])
        if ends in ("BIAS", "GELU_AUX_BIAS"):
            result = result + vector
        if ends == "GELU_AUX_BIAS":
            aux[...], given = result, result
            gelu_forward(result := np.empty_like(given), given)
        if ends == "DGELU_BGRAD":
            slope = np.ones_like(result)
            gelu_backward(slope, result, np.ascontiguousarray(aux), add=False)
            result = slope
            vector[...] = result.sum(1, keepdims=True)
        if ends == "BGRADB":
            vector[...] = right.sum(0)[:, None]
        return result

    def matmul(
        self, handle, product, alpha, a, A, b, B, beta, c, C, d, D, *rest
    ):
        algorithm, workspace, size, stream = rest
        assert handle == 77 and workspace % 256 == 0 and stream == 0
        wish = SEARCHES[-1]
        for name, place in zip("ABCD", (a, b, c, d), strict=True):
            assert place % wish[f"MIN_ALIGNMENT_{name}_BYTES"] == 0
        assert wish["MAX_WORKSPACE_BYTES"] == size
        number = ctypes.c_float
        alpha, beta = (number.from_address(x).value for x in (alpha, beta))
        left, right = by_columns(a, *A), by_columns(b, *B)
        left = left.T if product["TRANSA"] else left
        right = right.T if product["TRANSB"] else right
        result = alpha * (left @ right)
        if beta:
            result += beta * by_columns(c, *C)
        by_columns(d, *D)[...] = self.finish(product, result, right, D)


@pytest.fixture
def place(monkeypatch):
    """Where arrays go: to a GPU with cuBLASLt, or beside a stand-in."""
    if not cublas.no_cublas():
        return to_device
    kinds = SimpleNamespace(COMPUTE_32F=68, COMPUTE_32F_FAST_TF32=77)
    bindings = SimpleNamespace(
        cublasLt=Library(), cublas=SimpleNamespace(ComputeType=kinds)
    )
    monkeypatch.setitem(sys.modules, "nvmath.bindings", bindings)
    monkeypatch.setattr(cublas, "no_cublas", lambda: "")
    monkeypatch.setattr(cublas, "WORKSPACE", 1 << 10)
    cublas._library.cache_clear()
    cublas._prepared.cache_clear()
    yield simulated
    cublas._library.cache_clear()
    cublas._prepared.cache_clear()


def zeros(place, *shapes):
    return [place(np.zeros(shape, np.float32)) for shape in shapes]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_forward(place, sizes, bias, residual):
    how = {"bias": bias, "residual": residual, "tol": 1e-5}
    for _ in range(2):  # the second uses what was kept
        layer = cublas.cublas_forward
        check_linear(layer, 1, *sizes, **how, places=[place])


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("add", [(True, True), (False, True), (False, False)])
def test_backward(place, sizes, add):
    how = {"add": add, "tol": 1e-5, "places": [place]}
    check_linear_back(cublas.cublas_backward, 1, *sizes, **how)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("rows, C, OC", [(7, 5, 8), (3, 8, 16), (33, 17, 64)])
def test_gelu_at_the_end_of_a_product_and_back(place, rows, C, OC, fused):
    """Forward and backward of a block's second half, and their sums."""
    x, w, b = single(1, rows, C), single(OC, C), single(OC)
    w2, dy, how = single(C, OC), single(1, rows, C), {"fused": fused}
    aux, want, grad = np.empty((3, 1, rows, OC))
    matmul_forward(aux, *(z.astype(float) for z in (x, w, b)))
    gelu_forward(want, aux)
    gelu_backward(grad, dy.astype(float) @ w2, aux, add=False)
    for _ in range(2):  # the second with what was kept, elsewhere
        shapes = aux.shape, aux.shape, aux.shape, OC
        out, kept, dx, db = (np.full(z, np.nan, np.float32) for z in shapes)
        out, kept, dx, db = map(place, (out, kept, dx, db))
        cublas.cublas_gelu_forward(out, kept, *map(place, (x, w, b)), **how)
        near(kept, aux, 1e-5)
        near(out, want, 1e-5)
        given = dx, db, place(dy), place(w2), kept
        cublas.cublas_gelu_backward(*given, **how)
        near(dx, grad, 1e-5)
        near(db, grad.sum((0, 1)), 1e-5)
    for add in (False, True):
        start = single(OC, C)
        dw = place(start if add else np.full_like(start, np.nan))
        db = place(np.full(OC, np.nan, np.float32))
        cublas.cublas_weight_backward(dw, db, dx, place(x), add, **how)
        near(dw, grad[0].T @ x[0] + start * add, 1e-5)
        near(db, grad.sum((0, 1)), 1e-5)


@pytest.mark.parametrize("name", gpu.ENDS)
def test_make_gpu_times_both_ways(place, monkeypatch, name):
    """And says who wins; an epilogue that is wrong is not timed."""

    def times(clock, runs, budget):
        return {k: [1.0 + ("apart" in k)] for k in runs}

    monkeypatch.setattr(gpu, "no_cublas", lambda: "")
    monkeypatch.setattr(gpu, "to_device", place)
    monkeypatch.setattr(gpu, "in_turns", times)
    what, contest = (name, TINY, lambda: None, True), {}
    found = gpu._end_rows(*what, contest)
    assert contest["wins"] == ["fp32", "tf32"]
    assert all(x["seconds"] for x in found.values()) and len(found) == 4
    monkeypatch.setattr(Library, "finish", lambda *given: given[2])
    found = gpu._end_rows(*what, contest)
    assert contest["wins"] == []
    assert found["tf32 fused"] == {"unmeasured": "wrong: not what apart is"}


def test_rows_of_aux_are_eights(place):
    x, w, w2, b = zeros(place, (1, 2, 4), (12, 4), (4, 12), 12)
    out, aux = zeros(place, (1, 2, 12), (1, 2, 12))
    with pytest.raises(ValueError, match="rows of aux .* got 12"):
        cublas.cublas_gelu_forward(out, aux, x, w, b)
    with pytest.raises(ValueError, match="rows of aux .* got 12"):
        cublas.cublas_gelu_backward(out, b, x, w2, aux)


def test_a_description_is_made_once(place):
    x, w, out = zeros(place, (1, 4, 4), (4, 4), (1, 4, 4))
    for how, made in (({}, 1), ({}, 1), ({"tf32": True}, 2)):
        cublas.cublas_forward(out, x, w, None, **how)
        assert cublas._prepared.cache_info().misses == made


def test_without_a_gpu_it_says_so():
    reason = cublas.no_cublas()
    if not reason:
        pytest.skip("there is a GPU with cuBLASLt")
    x, w, out = zeros(simulated, (1, 2, 3), (2, 3), (1, 2, 2))
    with pytest.raises(RuntimeError, match="cublas_forward: .*" + reason[:9]):
        cublas.cublas_forward(out, x, w, None)


def test_work_must_hold_the_sums_of_the_bias(place):
    x, w, dx, dw, db = zeros(place, *2 * ((1, 130, 2), (3, 2)), 3)
    dy = place(np.ones((1, 130, 3), np.float32))
    for work in (np.zeros(8, np.float32), np.zeros((2, 9), np.float32)):
        with pytest.raises(ValueError, match="cublas_backward: work must"):
            cublas.cublas_backward(dx, dw, db, dy, x, w, work=place(work))
    with pytest.raises(TypeError, match="cublas_forward: work must be float"):
        cublas.cublas_forward(dy, x, w, None, work=place(np.zeros(9)))
    cublas.cublas_backward(dx, dw, db, dy, x, w, work=place(np.zeros(9, "f")))
    np.testing.assert_array_equal(to_host(db), 130)


PLANS = [
    cublas.forward_plan(7, 5, 3, True),
    cublas.forward_plan(7, 5, 3, False),
    cublas.dinp_plan(7, 5, 3),
    cublas.dweight_plan(7, 5, 3),
    cublas.forward_plan(7, 5, 8, True)._replace(ends="GELU_AUX_BIAS"),
    cublas.dinp_plan(7, 8, 5)._replace(ends="DGELU_BGRAD"),
    cublas.dweight_plan(7, 5, 3)._replace(ends="BGRADB"),
]


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("plan", PLANS)
def test_the_real_library_takes_the_descriptions(plan, tf32):
    """It needs no GPU for that, only a driver that it can load."""
    try:
        from nvmath.bindings import cublasLt as lt

        lt.get_version()
    except Exception as error:
        pytest.skip(f"no cuBLASLt here: {error}")

    def told(kind, kinds, thing, names):
        values = []
        for name in names.split():
            key, ask = kinds[name], f"{kind}_attribute_dtype"
            value = np.zeros(1, getattr(lt, f"get_{ask}")(key))
            size, get = np.zeros(1, np.uint64), f"{kind}_get_attribute"
            place = value.ctypes.data, value.nbytes, size.ctypes.data
            getattr(lt, get)(thing, key, *place)
            values.append(value.item())
        return tuple(values)

    product, *matrices = cublas._describe(plan, 256, 512, tf32)
    names = "TRANSA TRANSB COMPUTE_TYPE EPILOGUE"
    got = told("matmul_desc", lt.MatmulDescAttribute, product, names)
    assert got == (*plan[:2], 77 if tf32 else 68, ENDS[plan.ends])
    if "GELU" in plan.ends:
        names = "BIAS_POINTER EPILOGUE_AUX_POINTER EPILOGUE_AUX_LD"
        got = told("matmul_desc", lt.MatmulDescAttribute, product, names)
        assert got == (256, 512, 8)
    for matrix, sizes in zip(matrices, plan.stored(), strict=True):
        kinds, names = lt.MatrixLayoutAttribute, "TYPE ORDER ROWS COLS LD"
        assert told("matrix_layout", kinds, matrix, names) == (0, 0, *sizes)
