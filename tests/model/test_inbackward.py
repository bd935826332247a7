"""A model whose blocks learn in the backward pass: GPT2's bits, in less."""

import math

import numpy as np
import pytest
from test_lora import CONFIGS, B, T, batch

import llmnb
from llmnb.cpu.panels import DEPTH
from llmnb.model.inbackward import PART, InBackward

KINDS = [("reference", "fp64"), ("cpu", "fp32")]


@pytest.mark.parametrize("backend, precision", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_it_learns_as_gpt2_does(name, backend, precision):
    models = [
        made(CONFIGS[name], B, T, backend, precision)
        for made in (llmnb.GPT2, InBackward)
    ]
    for step in 1, 2, 3:
        how = {"learning_rate": 1e-2, "step": step, "decay": ["fcw", "wte"]}
        (loss, norm), (ours, our_norm) = (
            model.step(*batch(step), **how) for model in models
        )
        assert ours == loss
        assert our_norm == pytest.approx(norm, rel=1e-5)
    for x, want in models[0].params.items():
        assert np.array_equal(models[1].params[x], want), x
    for group in "m", "v":
        flat = [model.memory.flat(group) for model in models]
        assert np.array_equal(*flat), group


def test_it_stores_no_matrixs_gradient():
    cfg = llmnb.GPT2Config(8, 5000, 6, 2, 16)
    whole, ours = llmnb.GPT2(cfg, 1, 8), InBackward(cfg, 1, 8)
    stored = [n for n in ours.params if isinstance(ours.grads[n], np.ndarray)]
    rest = [n for n, x in ours.params.items() if x.ndim < 3 and n != "wte"]
    assert stored == rest
    sizes, lean = whole.memory.sizes(), ours.memory.sizes()
    assert lean["grads"] == sum(whole.grads[n].nbytes for n in rest)
    saved = sizes["grads"] - lean["grads"]
    added = sum(lean[x] for x in ("squares", "factors", "few", "places"))
    assert abs(whole.memory.nbytes - ours.memory.nbytes - saved + added) < 1000


SHAPE = 1, 2, 16  # blocks, heads and channels
WIDE = 1, 2, 80
LOGITS = {
    "once": llmnb.GPT2Config(300, 2000, *WIDE),
    "once, untied": llmnb.LlamaConfig(300, 2000, *WIDE),
    "parts": llmnb.GPT2Config(300, 700, *SHAPE),
    "parts, untied": llmnb.LlamaConfig(300, 700, *SHAPE),
}


@pytest.mark.parametrize("name", LOGITS)
def test_logits_at_once_or_in_parts(name):
    """The bits of all at once, and in parts no other rows are written."""
    assert PART % DEPTH == 0  # whole chains
    cfg, T = LOGITS[name], 300 if "parts" in name else 280
    tokens = np.random.RandomState(5).randint(0, 700, (3, 2, 3, T))
    whole, ours = llmnb.GPT2(cfg, 3, T), InBackward(cfg, 3, T)
    for step in 0, 1, 2:
        want = whole.step(*tokens[step], step=step + 1)
        assert ours.step(*tokens[step], step=step + 1)[0] == want[0]
    for x, want in whole.params.items():
        assert np.array_equal(ours.params[x], want), x
    logits = ours._acts["logits"].reshape(3 * T, -1)
    over = ours.memory.sizes()["block"] // logits[0].nbytes + 1
    assert over < PART and logits[over:PART].any(axis=1).all()
    assert logits[PART:].any() == ("parts" not in name)


def test_what_needs_all_gradients_is_refused():
    model = InBackward(CONFIGS["llama"], B, T, "reference")
    before = model.memory.flat("params").copy()
    with pytest.raises(ValueError, match=r"max_norm must be inf, got 1\.0"):
        model.step(*batch(), max_norm=1.0)
    with pytest.raises(ValueError, match="backend must be one of 'cpu'"):
        InBackward(CONFIGS["llama"], B, T, "cuda")
    model.forward(*batch())
    for call in (
        model.backward, model.update, lambda: model.clip_gradients(math.inf)
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="call step"):
            call()
    assert np.array_equal(model.memory.flat("params"), before)
