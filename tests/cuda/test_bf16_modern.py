"""Llama's layers in bfloat16, and models of them, on the simulator."""

import numpy as np
import pytest
from gpu import check_five_steps, check_gradients, check_half, half, single
from gpu import wide_half as widened

from llmnb import GPT2
from llmnb.cuda import rotary_forward_bf16
from llmnb.gpu.launch import simulated
from llmnb.model.architectures import (
    Gemma2Config,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)
from llmnb.reference.rotary import rope_table

B, T, C, H, hs = 2, 3, 72, 40, 16
SIZES = 16, 61, 1, 2, 32
SMALL = {"num_kv_heads": 1, "hidden": 64}
BATCH = np.random.default_rng(3).integers(0, 61, (2, 1, 5))


@pytest.mark.parametrize("offset", (0.0, 1.0))
def test_rmsnorm(offset):
    inp, weight, rstd = half(B, T, C), single(C), single(B, T)
    arrays = half(B, T, C), rstd, inp, weight
    how = {"offset": offset}
    check_half("rmsnorm_forward", arrays, [0, 1], exact=[1], **how)
    wide = widened(inp)
    rstd = (1 / np.sqrt((wide**2).mean(-1) + 1e-5)).astype(np.float32)
    for add in (True, False):
        arrays = half(B, T, C), single(C), half(B, T, C), inp, weight, rstd
        how["add"] = add
        check_half("rmsnorm_backward", arrays, [0, 1], exact=[1], **how)


def test_rotary():
    """Three of five heads turn, from position 2 on; the others stay."""
    table = rope_table(T + 2, hs, 1e4).astype(np.float32)
    for way in ("forward", "backward"):
        arrays = half(B, T, 5 * hs), table, 3
        check_half(f"rotary_{way}", arrays, [0], first=2)


@pytest.mark.parametrize("kind", ("swiglu", "geglu"))
def test_gates(kind):
    inp = half(B, T, 2 * H)
    check_half(f"{kind}_forward", (half(B, T, H), inp), [0])
    arrays = half(B, T, 2 * H), half(B, T, H), inp
    check_half(f"{kind}_backward", arrays, [0])


def test_token_vectors():
    tokens = np.array([[0, 8, 3], [3, 1, 3]], np.int32)
    arrays = half(B, T, C), tokens, single(9, C)
    check_half("embedding_forward", arrays, [0], scale=3.0)


def test_rows_that_are_no_eights_are_refused():
    x, table = simulated(half(1, 2, 24)), simulated(single(2, 12))
    with pytest.raises(ValueError, match="rotary_forward_bf16.* got 12"):
        rotary_forward_bf16(x, table, 1)


def pair(cfg, T=5):
    """In bfloat16 on the simulator, and in float32 on the host."""
    half = GPT2(cfg, 1, T, "cuda", "bf16", seed=7)
    return half, GPT2(cfg, 1, T, "cpu", seed=7)


@pytest.mark.parametrize("kind", (LlamaConfig, GemmaConfig))
def test_gradients_are_those_of_float32_but_for_rounding(kind):
    check_gradients(*pair(kind(*SIZES, **SMALL)), BATCH)


def test_five_steps_go_along_those_of_float32():
    """The norm of the first gradient only.

    With five tokens float32 itself parts by more, where its weights differ by
    a rounding to bfloat16.
    """
    check_five_steps(*pair(LlamaConfig(*SIZES, **SMALL), 16), norms=1)


@pytest.mark.parametrize(
    ("cfg", "what"),
    [
        (Qwen3Config(*SIZES, **SMALL), "qk_norm = True"),
        (Gemma2Config(*SIZES, **SMALL), "post_norms = True"),
        (MistralConfig(*SIZES, window=4, **SMALL), "window = 4"),
        (LlamaConfig(*SIZES, final_softcap=3.0), "final_softcap = 3.0"),
        (LlamaConfig(*SIZES, hidden=60), "hidden: in bfloat16 .* got 60"),
        (LlamaConfig(*SIZES, head_size=128), "channels, got 128"),
    ],
)
def test_a_model_without_its_layers_is_refused(cfg, what):
    with pytest.raises(ValueError, match=f"GPT2: .*{what}"):
        GPT2(cfg, 1, 5, "cuda", "bf16")
