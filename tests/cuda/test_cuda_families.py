"""Every architecture on a GPU, which is simulated where there is none."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gpu import SIMULATED

import llmnb
from llmnb.arena import put
from llmnb.formats.families import described_config
from llmnb.gpu import launch
from llmnb.gpu.simulator import watch
from llmnb.model.architectures import Gemma3Config

FAMILIES = Path(__file__).parents[1] / "data" / "families"
CASES = sorted(x.name for x in FAMILIES.iterdir() if x.is_dir())
T = 7  # more positions than the windows of these models have
# norms of heads and after each half, two rotations, a window, caps; rows
# that are no multiple of 16 bytes, and rows that are
ODD = Gemma3Config(
    T, 29, 2, 3, 10, num_kv_heads=1, head_size=6, hidden=7, window=3,
    global_every=2, attention_softcap=3.0, final_softcap=2.0,
)  # fmt: skip
EVEN = replace(ODD, channels=16, head_size=8, hidden=12)
# GPT-2 of both kinds, and in small
WIDTHS = {
    "numbers": ODD, "vectors": EVEN,
    "gpt2 numbers": llmnb.GPT2Config(T, 61, 1, 2, 10),
    "gpt2 vectors": llmnb.GPT2Config(T, 61, 2, 3, 12),
}  # fmt: skip
ADAMW = {"learning_rate": 1e-2, "weight_decay": 0.1, "decay": ["qkvw", "fcw"]}


def stay_in_arena(model, monkeypatch):
    """Let no array of a simulated GPU be made outside a model's memory."""
    block = model.memory._block._array
    made = launch.DeviceArray.__init__

    def watched(self, array):
        inside = not array.size or np.shares_memory(array, block)
        assert inside, "an array of its own"
        made(self, array)

    monkeypatch.setattr(launch.DeviceArray, "__init__", watched)


def config(name):
    """A family's, of one block, or of one of each kind; GPT-2's."""
    if name == "gpt2":
        return llmnb.GPT2Config(T, 29, 1, 2, 8)
    cfg = described_config(FAMILIES / name / "config.json")
    every = min(cfg.global_every, 2)
    return replace(cfg, num_layers=every or 1, global_every=every)


def pair(cfg):
    """A model in float64 on the host, and on the device; a batch."""
    exact = llmnb.GPT2(cfg, 1, T, "reference", "fp64")
    model = llmnb.GPT2(cfg, 1, T, "cuda")
    rng = np.random.default_rng(0)
    flat = exact.memory.flat("params")
    flat[:] = rng.normal(scale=0.3, size=flat.size).astype(np.float32)
    put(model.memory.flat("params"), flat)
    return exact, model, rng.integers(0, cfg.vocab_size, (2, 1, T))


def check_passes(cfg):
    exact, model, batch = pair(cfg)
    grads = model.memory.flat("grads")
    put(grads, np.full(grads.shape, 7.0))
    loss = model.forward(*batch)
    logits = model.logits
    assert np.array_equal(model.logits_at(4), logits[:, 4])
    model.backward()
    assert loss == pytest.approx(exact.forward(*batch), rel=1e-6)
    error = np.abs(logits - exact.logits).max()
    assert error < 1e-5 * np.abs(exact.logits).max()
    assert type(logits) is np.ndarray
    exact.backward()
    for name, want in exact.grads.items():
        got, size = np.asarray(model.grads[name]), np.linalg.norm(want)
        assert size > 1e-3, f"{name}: nothing to test"
        assert np.linalg.norm(got - want) < 1e-5 * size, name


@pytest.mark.parametrize("name", CASES)
def test_logits_and_every_gradient(name):
    """Against the reference in float64."""
    cfg = config(name)
    assert cfg.window is None or cfg.window < T
    check_passes(cfg)


@pytest.mark.parametrize("cfg", WIDTHS.values(), ids=WIDTHS)
def test_whatever_its_widths(cfg):
    """With every access checked: vectors begin at multiples of 16 bytes."""
    with watch() as seen:
        check_passes(cfg)
    assert seen.atomics == 0
    named = {launched[0].__name__ for launched in seen.launches}
    if cfg.family != "gpt2":
        assert ("by_four" in named) is (cfg is EVEN)


@pytest.mark.parametrize("name", ["gpt2", *CASES])
def test_three_steps_in_one_block_of_memory(name, monkeypatch):
    """Whole steps, of one graph; none makes an array outside the arena."""
    exact, model, batch = pair(config(name))
    before = model.memory.nbytes
    if SIMULATED:
        stay_in_arena(model, monkeypatch)
    got, want = (
        [m.step(*batch, 1.0, step=k, **ADAMW) for k in (1, 2, 3)]
        for m in (model, exact)
    )
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert got[2][0] < got[0][0] - 0.1
    assert len(model._machine._graphs) == 1
    assert model.memory.nbytes == before
    for name, want in exact.params.items():
        if name != "qkvb":  # the gradient of keys' biases is rounding alone
            assert np.abs(np.array(model.params[name]) - want).max() < 1e-4
