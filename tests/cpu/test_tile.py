"""The inner loop: every tile shape, masked features, bfloat16, assembly.

The tile of this machine is what all other tests use. Here the other shapes
run in processes of their own, because a shape is chosen at import.
"""

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numba
import numpy as np
import pytest
from layers import NAMED, assert_near, copied, draw, passed, results
from processes import python
from tiles import AVX2, ON_X86, OURS, SHAPES, chosen

from llmnb import cpu, reference
from llmnb.cpu import bfloat16, matmul, tile

TESTS = Path(__file__).parents[1]
OTHERS = [shape for shape in SHAPES if shape != OURS]
# what each shape has to pass: the comparisons with the reference
CHOSEN = [
    "reference/test_layers.py::test_cpu_equals_reference[float32-matmul]",
    "reference/test_layers.py::test_cpu_equals_reference[float64-matmul]",
    "reference/test_layers.py::test_at_the_edges[matmul]",
    "reference/test_layers.py::test_threads_change_no_bit[matmul]",
    "reference/test_layers.py::test_cpu_equals_reference[float32-attention]",
    "reference/test_learning.py::test_it_is_a_product_and_an_update"
    "[cpu-float32-70-90-769]",
]
AT_A_SHAPE = """
import sys
import pytest
from llmnb.cpu import tile
assert sys.argv[1] == f"{tile.ROWS}x{tile.VECTORS}x{tile.LANES}"
options = ["-q", "-p", "no:cacheprovider", "-o", "addopts="]
sys.exit(pytest.main(options + sys.argv[2:]))
"""
x86_only = pytest.mark.skipif(not ON_X86, reason="features of x86")


# a program in a new process with nothing set but what is asked
alone = partial(python, cwd=TESTS, without=("LLMNB_", "NUMBA_CPU_"))


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """The processes of the next test, two or more at a time.

    Nearly all of their time goes into compiling, which takes one core.
    """
    cache = str(tmp_path_factory.mktemp("kernels"))
    with ThreadPoolExecutor(max(2, (os.cpu_count() or 2) // 2)) as pool:
        runs = {
            shape: pool.submit(
                alone, AT_A_SHAPE, shape, *CHOSEN, LLMNB_CACHE=cache,
                **chosen(shape),
            )
            for shape in OTHERS
        }  # fmt: skip
        return {name: run.result() for name, run in runs.items()}


@pytest.mark.parametrize("shape", OTHERS)
def test_every_shape_computes_the_same(processes, shape):
    done = processes[shape]
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("shape", SHAPES)
def test_the_shape_follows_the_features(monkeypatch, shape):
    monkeypatch.delenv("LLMNB_TILE", raising=False)
    listed = ",".join(f"+{name}" for name in SHAPES[shape])
    monkeypatch.setattr(numba.config, "CPU_FEATURES", listed + ",-avx512vl")
    assert tile.cpu_features() == SHAPES[shape]
    assert "x".join(map(str, tile.tile_shape())) == shape


@pytest.mark.parametrize(
    "triple, shape",
    [
        ("arm64-apple-darwin24.0.0", (6, 4, 4)),
        ("aarch64-unknown-linux-gnu", (6, 4, 4)),
        ("x86_64-pc-windows-msvc", (4, 2, 4)),
    ],
)
def test_arm_has_neon_though_llvm_may_not_say_so(monkeypatch, triple, shape):
    monkeypatch.delenv("LLMNB_TILE", raising=False)
    monkeypatch.setattr(numba.config, "CPU_FEATURES", None)
    monkeypatch.setattr(tile, "get_host_cpu_features", str)  # none
    monkeypatch.setattr(tile.llvm, "get_process_triple", lambda: triple)
    assert tile.tile_shape() == shape


def test_numba_may_be_told_to_leave_avx_alone(monkeypatch):
    monkeypatch.delenv("LLMNB_TILE", raising=False)
    host = {"sse2": True, "avx2": True, "avx512f": True, "avx512bf16": True}
    found = tile.llvm.targets.FeatureMap
    monkeypatch.setattr(
        tile.llvm, "get_host_cpu_features", lambda: found(host)
    )
    monkeypatch.setattr(tile.llvm, "get_process_triple", lambda: "x86_64")
    monkeypatch.setattr(numba.config, "CPU_FEATURES", None)
    monkeypatch.setattr(numba.config, "ENABLE_AVX", 1)
    assert tile.tile_shape() == (8, 3, 16)
    monkeypatch.setattr(numba.config, "ENABLE_AVX", 0)
    assert tile.cpu_features() == {"sse2"}
    assert tile.tile_shape() == (4, 2, 4)


def test_the_variable_comes_first(monkeypatch):
    monkeypatch.setenv("LLMNB_TILE", "5x3x8")
    assert tile.tile_shape() == (5, 3, 8)
    monkeypatch.setenv("LLMNB_TILE", "")
    monkeypatch.setattr(numba.config, "CPU_FEATURES", "")
    assert tile.tile_shape() == (4, 2, 4)


@pytest.mark.parametrize(
    "text",
    ["6", "6x2", "6x2x7", "0x2x8", "6x0x8", "6x2x8x1", "axbxc", "6x2x8 "],
)
def test_a_shape_that_is_none(monkeypatch, text):
    monkeypatch.setenv("LLMNB_TILE", text)
    with pytest.raises(ValueError, match=f"LLMNB_TILE must .* got '{text}'"):
        tile.tile_shape()


# bfloat16


def nearest(x):
    """x rounded to 8 significant bits, halves to even, by arithmetic."""
    mantissa, exponent = np.frexp(np.asarray(x, np.float64))
    return np.ldexp(np.rint(mantissa * 256), exponent - 8)


@pytest.mark.parametrize("C", [1, 2, 15, 16, 37, 97])
def test_bf16_rounds_to_nearest_even(C):
    """Through the identity, every number comes out rounded, exactly."""
    rng = np.random.default_rng(C)
    x = rng.normal(size=(1, 50, C)) * 2.0 ** rng.integers(-20, 20, (50, C))
    x[0, ::2] = nearest(x[0, ::2]) * (1 + 2.0**-9)  # a half, or close to it
    x[0, ::5] = 2.0 ** rng.integers(-9, 9, C) * (1 + 2.0**-8)
    x[0, 1::5] = -(2.0 ** rng.integers(-9, 9, C)) * (1 + 3 * 2.0**-8)
    x = x.astype(np.float32)
    out, identity = np.empty_like(x), np.eye(C, dtype=np.float32)
    matmul.matmul_forward(out, x, identity, None, bf16=True)
    np.testing.assert_array_equal(out, nearest(x))
    assert (out != x).mean() > 0.5
    weights = np.ascontiguousarray(x[0])
    out = np.empty((1, C, 50), np.float32)
    matmul.matmul_forward(out, identity[None], weights, None, bf16=True)
    np.testing.assert_array_equal(out[0].T, nearest(x[0]))


@pytest.mark.parametrize(
    ("a", "b", "kept"),
    [(-127, 0, 0), (-127, 10, 0), (-70, -60, 0), (-126, 0, 1), (-63, -63, 1)],
)
def test_bf16_of_the_smallest_numbers(a, b, kept):
    """vdpbf16ps takes subnormal factors, sums for 0, as chapter 2.6 has it."""
    x = np.full((1, 1, 1), 2.0**a, np.float32)
    weight, out = np.full((1, 1), 2.0**b, np.float32), np.empty_like(x)
    matmul.matmul_forward(out, x, weight, None, bf16=True)
    assert out == (2.0 ** (a + b) if kept or not bfloat16.HALVES else 0)


def test_bf16_of_what_is_no_number():
    """The NaN that arithmetic makes stays one; so does an infinity."""
    bits = [0x7FC00000, 0xFFC00000, 0x7F800000, 0xFF800000]
    x = np.array(bits, np.uint32).view(np.float32).reshape(1, 4, 1)
    weight, out = np.ones((1, 1), np.float32), np.empty_like(x)
    matmul.matmul_forward(out, x, weight, None, bf16=True)
    np.testing.assert_array_equal(out, x)


def of_rounded(layer, p, *names):
    """What the reference makes in float64 of a problem with these rounded."""
    p = copied(p, np.float64) | {name: nearest(p[name]) for name in names}
    return results(layer, passed(layer, reference, p))


BF16_SHAPES = [(1, 1, 1, 1), (2, 37, 51, 97), (1, 13, 801, 49), (3, 50, 64, 9)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", BF16_SHAPES)
def test_bf16_products(shape, bias):
    """The product of the rounded factors, in float64; the bias is whole."""
    layer, absent = NAMED["matmul"], ("residual",)
    absent += () if bias else ("bias", "dbias")
    p = draw("matmul", *shape, dtype=np.float32, absent=absent)
    want = of_rounded(layer, p, "inp", "dout", "weight")
    if bias:
        want["dbias"] = p["dbias"] + p["dout"].sum((0, 1), dtype=np.float64)
    assert_near(results(layer, passed(layer, cpu, p, bf16=True)), want, 2e-5)
    if shape != BF16_SHAPES[0]:
        with pytest.raises(AssertionError):
            assert_near(results(layer, passed(layer, cpu, p)), want, 2e-5)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 37, 3, 5), (1, 210, 2, 9)]
)
def test_bf16_attention(shape):
    """That of rounded factors; what kernels round again on the way, weights
    and gradients of scores, may be off by one part in 2^8."""
    (B, T, NH, hs), layer = shape, NAMED["attention"]
    p = draw("attention", B, T, 1, NH, hs, dtype=np.float32, add=False)
    got = results(layer, passed(layer, cpu, p, bf16=True))
    want = of_rounded(layer, p, "inp", "dout")
    assert_near({"lse": got["lse"]}, {"lse": want["lse"]}, 4e-6)
    assert_near(got, want, 3e-3)
    sizes = p | {"inp": p["inp"].copy()}  # a sum's error goes by its terms
    np.abs(p["inp"][..., 2 * NH * hs :], out=sizes["inp"][..., 2 * NH * hs :])
    most = of_rounded(layer, sizes, "inp", "dout")["out"]
    assert (np.abs(got["out"] - want["out"]) <= 2**-8 * most).all()
    if T == 1:
        return
    plain = results(layer, passed(layer, cpu, p))
    assert np.abs(plain["lse"] - got["lse"]).max() > 1e-4  # of the scores
    p["inp"] = nearest(p["inp"]).astype(np.float32)
    rounded = results(layer, passed(layer, cpu, p))
    assert np.abs(rounded["out"] - got["out"]).max() > 1e-4  # the weights


# assembly

COMPILE = """
import json
import sys
from numba import float32, int64, njit, types, uint32
from llmnb.cpu.jit import FASTMATH
from llmnb.cpu.microkernel import multiply_tile
from llmnb.cpu.tile import VECTORS

@njit(fastmath=FASTMATH, error_model="numpy", no_cfunc_wrapper=True)
def one(out, at, start, bias, panels, a, b, depth, ahead):
    multiply_tile(
        out, at, start, bias, panels, a, b, depth, VECTORS, (ahead, 64)
    )

numbers = types.Array(float32, 1, "C")
panels = types.Array({"fp32": float32, "bf16": uint32}[sys.argv[1]], 1, "C")
at = types.UniTuple(int64, 7)
four = int64, int64, int64, int64
one.compile(types.void(numbers, at, numbers, numbers, panels, *four))
print(json.dumps(list(one.inspect_asm().values())))
"""
AVX512 = AVX2 + ",+avx512f,+avx512vl,+avx512bw,+avx512dq,+avx512cd"
BF16 = AVX512 + ",+avx512bf16"


def loops(assembly):
    """Instructions from a label to a jump back to it, loop by loop."""
    lines, labels = assembly.splitlines(), {}
    for n, line in enumerate(lines):
        if label := re.match(r"([.\w]+):", line):
            labels[label[1]] = n
        jump = re.match(r"\s+j\w+\s+([.\w]+)", line)
        if jump and jump[1] in labels:
            yield lines[labels[jump[1]] + 1 : n + 1]


@x86_only
@pytest.mark.parametrize(
    "precision, processor, features, instruction, register, shape",
    [
        ("fp32", "haswell", AVX2, "vfmadd...ps", "ymm", (6, 2)),
        ("fp32", "skylake-avx512", AVX512, "vfmadd...ps", "zmm", (8, 3)),
        ("bf16", "cooperlake", BF16, "vdpbf16ps", "zmm", (8, 3)),
    ],
)
def test_the_sums_stay_in_registers(
    processor, features, precision, instruction, register, shape
):
    """Compiled for a processor that need not be this one, and not run.

    Each is one that the oldest LLVM knows that numba may bring.
    """
    done = alone(
        COMPILE, precision, LLMNB_CACHE="", NUMBA_CPU_NAME=processor,
        NUMBA_CPU_FEATURES=features,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (assembly,) = json.loads(done.stdout)
    pattern = rf"\s+{instruction}\s.*%{register}(\d+)$"
    found = []
    for loop in loops(assembly):
        targets = [m[1] for m in (re.match(pattern, x) for x in loop) if m]
        if targets:
            found.append((loop, targets))
    ((loop, targets),) = found  # one loop has them all
    rows, vectors = shape
    sums = rows * vectors
    assert len(set(targets)) == sums  # every sum is a register
    assert len(targets) % sums == 0  # LLVM may take two steps in a turn
    turns = len(targets) // sums
    assert not [x for x in loop if "(%rsp" in x]  # nothing on the stack
    stores = rf"\s+v\w+\s+%{register}\d+, .*\(.*\)$"
    assert not [x for x in loop if re.match(stores, x)]  # nor elsewhere
    spread = [x for x in loop if re.match(r"\s+vbroadcastss\s", x)]
    loads = [x for x in loop if re.match(r"\s+vmov[ua]p[sd]\s", x)]
    assert (len(spread), len(loads)) == (rows * turns, vectors * turns)
