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

import llmnb.cuda.cublas as cublas
from llmnb.bench import gpu
from llmnb.bench.ladders import TINY
from llmnb.gpu.launch import simulated, to_device, to_host
from llmnb.reference import (
    gelu_backward,
    gelu_forward,
    matmul_backward,
    matmul_forward,
)

SIZES = [(1, 1, 1), (1, 5, 3), (7, 1, 9), (3, 8, 4), (33, 17, 65)]
SEARCHES = []
ENDS = {
    "DEFAULT": 1,
    "BIAS": 4,
    "GELU_AUX_BIAS": 164,
    "DGELU_BGRAD": 208,
    "BGRADB": 512,
}


def by_columns(address, rows, cols, ld):
    count = ld * (cols - 1) + rows
    kind = ctypes.c_float * count
    flat = np.frombuffer(kind.from_address(address), np.float32)
    return np.lib.stride_tricks.as_strided(flat, (rows, cols), (4, 4 * ld))


class Library:
    """What of cublasLt our module calls, with descriptions as dicts."""

    names = [
        "TRANSA",
        "TRANSB",
        "EPILOGUE",
        "BIAS_POINTER",
        "EPILOGUE_AUX_POINTER",
        "EPILOGUE_AUX_LD",
        "MAX_WORKSPACE_BYTES",
    ]
    names += [f"MIN_ALIGNMENT_{x}_BYTES" for x in "ABCD"]
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
            place, ld = (
                product[f"EPILOGUE_AUX_{x}"] for x in ("POINTER", "LD")
            )
            aux = by_columns(place, *D[:2], ld)
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


def draw(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("rows, C, OC", SIZES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_forward(place, rows, C, OC, bias, residual):
    rng = np.random.default_rng(rows)
    x, w = draw(rng, 1, rows, C), draw(rng, OC, C)
    b = draw(rng, OC) if bias else None
    r = draw(rng, 1, rows, OC) if residual else None
    want = np.empty((1, rows, OC), np.float32)
    matmul_forward(want, x, w, b, r)
    for repeat in range(2):  # the second uses what was kept
        out = place(np.full_like(want, np.nan))
        there = [None if z is None else place(z) for z in (x, w, b, r)]
        cublas.cublas_forward(out, *there)
        error = np.abs(to_host(out) - want).max()
        assert error < 1e-5 * np.abs(want).max() + 1e-6, repeat


@pytest.mark.parametrize("rows, C, OC", SIZES)
@pytest.mark.parametrize("add", [(True, True), (False, True), (False, False)])
def test_backward(place, rows, C, OC, add):
    rng = np.random.default_rng(rows + C)
    x, w = draw(rng, 1, rows, C), draw(rng, OC, C)
    dy, dx = draw(rng, 1, rows, OC), draw(rng, 1, rows, C)
    dw, db = draw(rng, OC, C), draw(rng, OC)
    want = [z.astype(np.float64) for z in (dx, dw, db)]
    exact = [z.astype(np.float64) for z in (dy, x, w)]
    matmul_backward(*want, *exact, *add)
    if not add[0]:
        dx[...] = np.nan
    if not add[1]:
        dw[...], db[...] = np.nan, np.nan
    got = [place(z) for z in (dx, dw, db)]
    cublas.cublas_backward(*got, *[place(z) for z in (dy, x, w)], *add)
    for a, b in zip(got, want, strict=True):
        scale = max(1, np.abs(b).max())
        assert np.abs(to_host(a) - b).max() < 1e-5 * scale


def near(got, want):
    got = to_host(got)
    assert np.isfinite(got).all()
    assert np.abs(got - want).max() < 1e-5 * max(1, np.abs(want).max())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("rows, C, OC", [(7, 5, 8), (3, 8, 16), (33, 17, 64)])
def test_gelu_at_the_end_of_a_product_and_back(place, rows, C, OC, fused):
    """Forward and backward of a block's second half, and their sums."""
    rng = np.random.default_rng(rows)
    x, w, b = draw(rng, 1, rows, C), draw(rng, OC, C), draw(rng, OC)
    w2, dy = draw(rng, C, OC), draw(rng, 1, rows, C)
    aux = np.empty((1, rows, OC))
    matmul_forward(aux, *(z.astype(float) for z in (x, w, b)))
    want = np.empty_like(aux)
    gelu_forward(want, aux)
    grad = np.empty_like(aux)
    gelu_backward(grad, dy.astype(float) @ w2, aux, add=False)
    for _ in range(2):  # the second with what was kept, elsewhere
        out, kept, dx, db = (
            place(np.full(z, np.nan, np.float32))
            for z in (aux.shape, aux.shape, aux.shape, OC)
        )
        how = {"fused": fused}
        cublas.cublas_gelu_forward(out, kept, *map(place, (x, w, b)), **how)
        near(kept, aux)
        near(out, want)
        given = dx, db, place(dy), place(w2), kept
        cublas.cublas_gelu_backward(*given, **how)
        near(dx, grad)
        near(db, grad.sum((0, 1)))
    for add in (False, True):
        start = draw(rng, OC, C)
        dw = place(start if add else np.full_like(start, np.nan))
        db = place(np.full(OC, np.nan, np.float32))
        cublas.cublas_weight_backward(dw, db, dx, place(x), add, **how)
        near(dw, grad[0].T @ x[0] + start * add)
        near(db, grad.sum((0, 1)))


@pytest.mark.parametrize("name", gpu.ENDS)
def test_make_gpu_times_both_ways(place, monkeypatch, name):
    """And says who wins; an epilogue that is wrong is not timed."""

    def times(clock, runs, budget):
        return {k: [1.0 + ("apart" in k)] for k in runs}

    monkeypatch.setattr(gpu, "no_cublas", lambda: "")
    monkeypatch.setattr(gpu, "to_device", place)
    monkeypatch.setattr(gpu, "in_turns", times)
    what, contest = (name, TINY, None, True), {}
    found = gpu._end_rows(*what, contest)
    assert contest["wins"] == ["fp32", "tf32"]
    assert all(x["seconds"] for x in found.values()) and len(found) == 4
    monkeypatch.setattr(Library, "finish", lambda *given: given[2])
    found = gpu._end_rows(*what, contest)
    assert contest["wins"] == []
    assert found["tf32 fused"] == {"unmeasured": "wrong: not what apart is"}


def test_rows_of_aux_are_eights(place):
    x, w = (place(np.zeros(s, np.float32)) for s in ((1, 2, 4), (12, 4)))
    b, out, aux = (
        place(np.zeros(s, np.float32)) for s in (12, (1, 2, 12), (1, 2, 12))
    )
    with pytest.raises(ValueError, match="rows of aux .* got 12"):
        cublas.cublas_gelu_forward(out, aux, x, w, b)
    with pytest.raises(ValueError, match="rows of aux .* got 12"):
        cublas.cublas_gelu_backward(
            out, b, x, place(np.zeros((4, 12), "f")), aux
        )


def test_a_description_is_made_once(place):
    rng = np.random.default_rng(0)
    x, w, out = (place(draw(rng, 1, 4, 4)) for _ in range(3))
    for _ in range(3):
        cublas.cublas_forward(out, x, w.reshape(4, 4), None)
    assert cublas._prepared.cache_info().misses == 1
    cublas.cublas_forward(out, x, w.reshape(4, 4), None, tf32=True)
    assert cublas._prepared.cache_info().misses == 2


def test_without_a_gpu_it_says_so():
    reason = cublas.no_cublas()
    if not reason:
        pytest.skip("there is a GPU with cuBLASLt")
    x = simulated(np.zeros((1, 2, 3), np.float32))
    w, out = (simulated(np.zeros(s, np.float32)) for s in ((2, 3), (1, 2, 2)))
    with pytest.raises(RuntimeError, match="cublas_forward: .*" + reason[:9]):
        cublas.cublas_forward(out, x, w, None)


def test_work_must_hold_the_sums_of_the_bias(place):
    x = place(np.zeros((1, 130, 2), np.float32))
    dy = place(np.ones((1, 130, 3), np.float32))
    w = place(np.zeros((3, 2), np.float32))
    db, dx, dw = (
        place(np.zeros(s, np.float32)) for s in (3, (1, 130, 2), (3, 2))
    )
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
    assert got == (
        plan.transa,
        plan.transb,
        77 if tf32 else 68,
        ENDS[plan.ends],
    )
    if "GELU" in plan.ends:
        names = "BIAS_POINTER EPILOGUE_AUX_POINTER EPILOGUE_AUX_LD"
        got = told("matmul_desc", lt.MatmulDescAttribute, product, names)
        assert got == (256, 512, 8)
    for matrix, sizes in zip(matrices, plan.stored(), strict=True):
        kinds, names = lt.MatrixLayoutAttribute, "TYPE ORDER ROWS COLS LD"
        assert told("matrix_layout", kinds, matrix, names) == (0, 0, *sizes)
