"""The code of kernels, interpreted: what a GPU runs, and no simulator does.

With a GPU there, the layers' own tests run it.
"""

import gpu
import numpy as np
import pytest
from cuda.test_bf16_attention import passes
from cuda.test_bf16_layers import ROWS
from cuda.test_bf16_matmul import layer as linear_bf16
from layers import LAYERS, NAMED, problem
from problems import batch
from ptx import Fault, compiled_code

from llmnb import GPT2, GPT2Config, LlamaConfig
from llmnb.bench.ladders import LADDERS
from llmnb.gpu.launch import empty, kernel, to_host
from llmnb.gpu.simulator import cuda, load4, store4

pytestmark = pytest.mark.skipif(not gpu.SIMULATED, reason="there is a GPU")
WARP, LANE = 32, 1  # what goes on alone for as long as it can
SUMS = "layernorm_forward", "crossentropy_softmax_forward", "encoder_backward"
EVEN, ODD = (1, 33, 36, 3, 61), (2, 5, 33, 3, 13)  # B, T, C, NH, V
SMALL = {"num_kv_heads": 1, "hidden": 48}


@pytest.mark.parametrize("ladder", LADDERS, ids=lambda x: x.layer)
def test_layers_of_gpt2(ladder):
    """Warps run ahead of one another; in sums lanes too."""
    cases = [(EVEN, WARP), (ODD, WARP)]
    if ladder.layer in SUMS:
        cases.append((ODD, LANE))
    for sizes, together in cases:
        arrays = gpu.draw(ladder.layer, *sizes)
        with compiled_code(together) as ran:
            gpu.check_ladder(ladder.layer, arrays, tol=2e-5)
        assert ran


@pytest.mark.parametrize(
    "layer", [x for x in LAYERS if x.gpu], ids=lambda x: x.name
)
def test_layers_of_other_families(layer):
    sizes, options = layer.even
    p = problem(layer, np.float32, layer.sized(*sizes), **options)
    with compiled_code(WARP) as ran:
        gpu.check_problem(layer, p)
    assert ran


@pytest.mark.parametrize(("name", "sizes", "options"), ROWS)
def test_layers_in_bfloat16(name, sizes, options):
    layer = NAMED[name]
    p = problem(layer, np.float32, layer.sized(*sizes), **options)
    with compiled_code(WARP) as ran:
        gpu.check_half(layer, p)
    assert ran


def test_tensor_cores():
    with compiled_code(WARP) as ran:
        linear_bf16(1, 67, 40, 72, add=True, residual=True)
        passes(1, 67, 2, 16, add=True, races=False)
    assert len(set(ran)) >= 5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "cfg", [GPT2Config(7, 61, 1, 2, 32), LlamaConfig(7, 61, 1, 2, 32, **SMALL)]
)
def test_two_steps(cfg, precision):
    """A model learns by it as on the CPU."""
    tokens, targets = batch(cfg, 1, 7)
    how, found = {"learning_rate": 1e-2, "max_norm": 1.0}, []
    with compiled_code() as ran:
        for made in (
            GPT2(cfg, 1, 7, "cuda", precision, seed=7),
            GPT2(cfg, 1, 7, "cpu", seed=7),
        ):
            steps = [made.step(tokens, targets, step=k, **how) for k in (1, 2)]
            found.append([loss for loss, _ in steps])
    assert len(set(ran)) > 15
    tolerance = 1e-5 if precision == "fp32" else 4e-3
    np.testing.assert_allclose(*found, rtol=0, atol=tolerance)
    assert found[0][1] < found[0][0] - 0.1


@kernel
def _turned(out, waits):
    """Each thread takes what the last but it has written."""
    kept = cuda.shared.array(64, np.float32)
    i = cuda.threadIdx.x
    kept[i] = np.float32(i)
    if waits:
        cuda.syncthreads()
    out[i] = kept[63 - i]


@kernel
def _beyond(out):
    out[cuda.threadIdx.x + 1] = np.float32(1)


@kernel
def _by_fours(out):
    store4(out, 0, *load4(out, 4))


@kernel
def _some_lanes(out):
    i = cuda.threadIdx.x
    if i < 7:
        out[i] = cuda.shfl_xor_sync(0xFFFFFFFF, out[i], 1)


def test_a_barrier_that_is_missing_shows():
    want = np.arange(64, dtype=np.float32)[::-1]
    for waits in (1, 0):
        out = empty(64)
        with compiled_code(WARP):
            _turned[1, 64](out, waits)
        assert (to_host(out) == want).all() == bool(waits)


def test_what_a_gpu_would_not_answer_is_a_fault():
    with compiled_code():
        with pytest.raises(Fault, match="outside of all arrays"):
            _beyond[1, 4](empty(4))
        with pytest.raises(Fault, match="a lane has ended"):
            _some_lanes[1, 32](empty(32))
        with pytest.raises(Fault, match="1025 threads in a block"):
            _beyond[1, 1025](empty(2000))
        with pytest.raises(Fault, match="no multiple of 16"):
            _by_fours[1, 1](gpu.between(np.zeros(8, np.float32)))
