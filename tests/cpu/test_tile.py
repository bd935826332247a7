"""The inner loop: every tile shape, masked features, bfloat16, assembly.

The tile of this machine is what all other tests use. Here the other shapes
run in processes of their own, because a shape is chosen at import.
"""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import numpy as np
import pytest
from layers import NAMED, assert_near, draw, passed, results
from tiles import AVX2, MASKS, ON_X86, OURS, SHAPES, chosen, masked

from llmnb import cpu
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
]
AT_A_SHAPE = """
import sys
import pytest
from llmnb.cpu import tile
assert sys.argv[1] == f"{tile.ROWS}x{tile.VECTORS}x{tile.LANES}"
options = ["-q", "-p", "no:cacheprovider", "-o", "addopts="]
sys.exit(pytest.main(options + sys.argv[2:]))
"""
THE_CHOICE = """
from llmnb.cpu import tile
print(f"{tile.ROWS}x{tile.VECTORS}x{tile.LANES}", *tile.cpu_features())
"""
x86_only = pytest.mark.skipif(not ON_X86, reason="features of x86")


def python(program, *args, cache=None, **variables):
    """Run a program in a new process with nothing set but what is asked."""
    ours = ("LLMNB_", "NUMBA_CPU_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    paths = [str(TESTS), str(TESTS.parent), env.get("PYTHONPATH")]
    env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if cache is not None:
        variables["LLMNB_CACHE"] = str(cache)
    return subprocess.run(
        [sys.executable, "-c", program, *args],
        cwd=TESTS,
        env={**env, **variables},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """The processes of the next test, two or more at a time.

    Nearly all of their time goes into compiling, which takes one core.
    """
    cache = tmp_path_factory.mktemp("kernels")
    with ThreadPoolExecutor(max(2, (os.cpu_count() or 2) // 2)) as pool:
        runs = {
            shape: pool.submit(
                *(python, AT_A_SHAPE, shape, *CHOSEN),
                cache=cache,
                **chosen(shape),
            )
            for shape in OTHERS
        }
        return {name: run.result() for name, run in runs.items()}


@pytest.mark.parametrize("shape", OTHERS)
def test_every_shape_computes_the_same(processes, shape):
    done = processes[shape]
    assert done.returncode == 0, done.stdout + done.stderr


@x86_only
@pytest.mark.parametrize("shape", MASKS)
def test_masked_features(shape):
    """The choice; its products are those of the test before or, for this
    machine's own tile, of the layers' tests."""
    done = python(THE_CHOICE, **masked(shape))
    assert done.returncode == 0, done.stderr
    taken, *features = done.stdout.split()
    assert taken == shape
    assert sorted(features) == sorted(MASKS[shape][1:].split(",+"))


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
    monkeypatch.setattr(tile.llvm, "get_host_cpu_features", dict)
    monkeypatch.setattr(tile.llvm, "get_process_triple", lambda: triple)
    assert tile.tile_shape() == shape


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


BF16_SHAPES = [(1, 1, 1, 1), (2, 37, 51, 97), (1, 13, 801, 49), (3, 50, 64, 9)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", BF16_SHAPES)
def test_bf16_products(shape, bias):
    """The product of the rounded factors, in float64; the bias is whole."""
    layer, absent = NAMED["matmul"], ("residual",)
    absent += () if bias else ("bias", "dbias")
    p = draw("matmul", *shape, dtype=np.float32, absent=absent)
    inp, dout, weight = (nearest(p[x]) for x in ("inp", "dout", "weight"))
    rows, drows = (x.reshape(-1, x.shape[2]) for x in (inp, dout))
    want = {
        "out": inp @ weight.T + (p["bias"] if bias else 0),
        "dinp": p["dinp"] + dout @ weight,
        "dweight": p["dweight"] + drows.T @ rows,
    }
    if bias:
        want["dbias"] = p["dbias"] + p["dout"].sum((0, 1), dtype=np.float64)
    assert_near(results(layer, passed(layer, cpu, p, bf16=True)), want, 2e-5)
    if shape != BF16_SHAPES[0]:
        with pytest.raises(AssertionError):
            assert_near(results(layer, passed(layer, cpu, p)), want, 2e-5)


def heads(x, NH, parts):
    """(B, T, parts C) to (parts, B, NH, T, hs), in float64."""
    B, T, _ = x.shape
    x = x.astype(np.float64).reshape(B, T, parts, NH, -1)
    return x.transpose(2, 0, 3, 1, 4)


def transposed(x):
    return np.swapaxes(x, -1, -2)


def attention_of_rounded(inp, dout, out, NH):
    """lse, out, dinp of rounded factors, and how far rounding may carry.

    In float64. What kernels round again on the way, weights and gradients of
    scores, is not rounded here. Each such number may be off by one part in
    2^8, half a step of 8 bits, and so may each term of the sums it enters.
    """
    q, k, v = heads(nearest(inp), NH, 3)
    dy, y = heads(nearest(dout), NH, 1)[0], heads(out, NH, 1)[0]
    scale = 1 / np.sqrt(q.shape[-1])
    scores = q @ transposed(k) * scale
    future = np.triu(np.ones(scores.shape[-2:], bool), 1)
    scores[..., future] = -np.inf
    lse = np.log(np.exp(scores).sum(-1))
    weights = np.exp(scores - lse[..., None])
    D = (y * heads(dout, NH, 1)[0]).sum(-1, keepdims=True)
    dscores = weights * (dy @ transposed(v) - D) * scale

    def sums(w, ds, q, k, v, dy):
        dv, dk, dq = transposed(w) @ dy, transposed(ds) @ q, ds @ k
        parts = np.stack([dq, dk, dv]).transpose(1, 3, 0, 2, 4)
        return (w @ v).transpose(0, 2, 1, 3).reshape(dout.shape), (
            parts.reshape(inp.shape)
        )

    factors = weights, dscores, q, k, v, dy
    allowed = [x / 256 for x in sums(*map(np.abs, factors))]
    return (lse, *sums(*factors)), (np.zeros_like(lse), *allowed)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 37, 3, 5), (1, 210, 2, 9)]
)
def test_bf16_attention(shape):
    (B, T, NH, hs), layer = shape, NAMED["attention"]
    p = draw("attention", B, T, 1, NH, hs, dtype=np.float32, add=False)
    got = passed(layer, cpu, p, bf16=True)
    found = [got[name] for name in ("lse", "out", "dinp")]
    arrays = p["inp"], p["dout"], got["out"], NH
    want, allowed = attention_of_rounded(*arrays)
    for x, y, most in zip(found, want, allowed, strict=True):
        float32 = 4e-6 * max(1, np.abs(y).max())
        assert (np.abs(x - y) <= most + float32).all()
    if T == 1:
        return
    plain = passed(layer, cpu, p)
    assert np.abs(plain["lse"] - got["lse"]).max() > 1e-4  # of the scores
    p["inp"] = nearest(p["inp"]).astype(np.float32)
    rounded = passed(layer, cpu, p)
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
        ("bf16", "znver4", BF16, "vdpbf16ps", "zmm", (8, 3)),
    ],
)
def test_the_sums_stay_in_registers(
    processor, features, precision, instruction, register, shape
):
    """Compiled for a processor that need not be this one, and not run."""
    done = python(
        *(COMPILE, precision),
        LLMNB_CACHE="",
        NUMBA_CPU_NAME=processor,
        NUMBA_CPU_FEATURES=features,
    )
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
