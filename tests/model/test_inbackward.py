"""A model whose blocks learn in the backward pass: GPT2's bits, in less."""

import math

import numpy as np
import pytest
from test_lora import CONFIGS, B, T, batch

import llmnb
from llmnb.cpu.panels import DEPTH
from llmnb.model.inbackward import ROWS, InBackward

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


def test_it_holds_one_blocks_gradients():
    cfg = llmnb.GPT2Config(8, 5, 6, 2, 16)
    whole, ours = llmnb.GPT2(cfg, 1, 8), InBackward(cfg, 1, 8)
    ends = "wte", "wpe", "lnfw", "lnfb"
    ends = 4 * sum(whole.params[x].size for x in ends)
    sizes, lean = whole.memory.sizes(), ours.memory.sizes()
    assert lean["grads"] == ends
    assert 6 * (lean["block"] - sizes["block"]) == sizes["grads"] - ends


def test_a_blocks_gradients_lie_over_the_logits():
    cfg = llmnb.GPT2Config(32, 5000, 2, 2, 16)
    whole, ours = llmnb.GPT2(cfg, 1, 32), InBackward(cfg, 1, 32)
    saved = 4 * sum(x.size for x in map(whole.grads.get, ours._layers[0][0]))
    assert abs(whole.memory.nbytes - ours.memory.nbytes - saved) < 1000
    assert np.shares_memory(ours.grads["fcw"], ours.memory["logits"]["logits"])


def test_logits_of_some_tokens_at_a_time():
    """The bits of all at once, and no other rows are written."""
    assert ROWS % DEPTH == 0  # whole chains
    cfg = llmnb.GPT2Config(300, 700, 1, 2, 16)
    tokens = np.random.RandomState(5).randint(0, 700, (3, 2, 3, 300))
    whole, ours = llmnb.GPT2(cfg, 3, 300), InBackward(cfg, 3, 300)
    for step in 0, 1, 2:
        want = whole.step(*tokens[step], step=step + 1)
        assert ours.step(*tokens[step], step=step + 1)[0] == want[0]
    for x, want in whole.params.items():
        assert np.array_equal(ours.params[x], want), x
    logits = ours._acts["logits"].reshape(900, -1)
    over = ours.memory.sizes()["block"] // logits[0].nbytes + 1
    assert over < ROWS and logits[:ROWS].any(axis=1).all()
    assert not logits[ROWS:].any()


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
