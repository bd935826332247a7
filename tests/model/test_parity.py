"""GPT-2 against PyTorch: weights, logits, gradients, ten steps of AdamW.

The fixtures are tests/data/parity_*.npz, written by record_parity.py. Where
torch is installed the last test compares live, on one more configuration.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from problems import relative

from llmnb.config import GPT2Config
from llmnb.model.gpt2 import GPT2

DATA = Path(__file__).parents[1] / "data"
CASES = ["ordinary", "odd", "narrow", "clipped"]
MATRICES = {"wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw"}

# the largest error allowed, relative to the size of what is compared
NAMES = "losses", "logits", "grads", "norms", "final"
TOLERANCES = {
    "fp64": dict(zip(NAMES, (1e-13, 1e-13, 1e-13, 1e-13, 1e-12), strict=True)),
    "fp32": dict(zip(NAMES, (1e-6, 2e-6, 5e-6, 1e-5, 1e-4), strict=True)),
}


class Fixture:
    """One recorded case: its arrays by name, and its hyperparameters."""

    def __init__(self, arrays):
        self.arrays = arrays
        self.case = json.loads(str(arrays["meta"]))["case"]
        self.tokens = arrays["tokens"][:, :-1]
        self.targets = arrays["tokens"][:, 1:]

    def model(self, backend, precision, recorded_weights=True):
        case = self.case
        cfg = GPT2Config(**case["model"])
        sizes = case["batch_size"], case["seq_len"]
        model = GPT2(cfg, *sizes, backend, precision, case["seed"])
        if recorded_weights:
            for name, value in model.params.items():
                value[...] = self.arrays[f"initial.{name}"]
        return model

    def step(self, model, step):
        """One training step, the first is 1; its loss and gradient norm."""
        case, norm = self.case, 0.0
        loss = model.forward(self.tokens, self.targets)
        model.backward()
        if case["max_norm"] is not None:
            norm = model.clip_gradients(case["max_norm"])
        model.update(
            case["learning_rate"],
            *case["betas"],
            eps=1e-8,
            weight_decay=case["weight_decay"],
            step=step,
            decay=None if case["decay"] == "all" else MATRICES,
        )
        return loss, norm


def load(name):
    with np.load(DATA / f"parity_{name}.npz") as file:
        return Fixture(dict(file))


@pytest.fixture(scope="module", params=CASES)
def recorded(request):
    return load(request.param)


def errors(fixture, backend, precision):
    """How far we are from all that is recorded, by name."""
    arrays, error = fixture.arrays, {}
    model = fixture.model(backend, precision)
    model.forward(fixture.tokens, fixture.targets)
    error["logits"] = relative(model.logits, arrays[f"logits.{precision}"])
    model.backward()
    for name, grad in model.grads.items():
        want = arrays[f"grads.{precision}.{name}"]
        error[f"grads {name}"] = relative(grad, want)
    padding = model.grads["wte"][model.cfg.vocab_size :]
    assert not padding.any()
    steps = np.array([fixture.step(model, step) for step in range(1, 11)])
    for i, name in enumerate(("losses", "norms")):
        want = arrays[f"{name}.{precision}"]
        if want.size:
            error[name] = np.max(np.abs(steps[:, i] - want) / want)
    for name, value in model.params.items():
        want = arrays[f"final.{precision}.{name}"]
        error[f"final {name}"] = relative(value.ravel()[:8], want)
    return error


def too_large(error, precision):
    limits = TOLERANCES[precision]
    return {k: e for k, e in error.items() if not e < limits[k.split()[0]]}


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_ten_steps_from_the_recorded_weights(recorded, backend, precision):
    error = errors(recorded, backend, precision)
    assert not too_large(error, precision)


def test_our_own_weights_are_pytorchs(recorded):
    model = recorded.model("reference", "fp32", recorded_weights=False)
    for name, value in model.params.items():
        want = recorded.arrays[f"initial.{name}"]
        assert value.shape == want.shape
        np.testing.assert_allclose(value, want, rtol=0, atol=2e-8)


def test_live_parity():
    pytest.importorskip("torch")
    from record_parity import measure

    case = {
        "model": vars(GPT2Config(23, 200, 1, 5, 40)),
        "batch_size": 2, "seq_len": 21, "seed": 7, "learning_rate": 3e-4,
        "betas": [0.8, 0.99], "weight_decay": 0.3, "decay": "2-D",
        "max_norm": 0.5,
    }  # fmt: skip
    fixture = Fixture(measure(case))
    test_our_own_weights_are_pytorchs(fixture)
    for backend in ("reference", "cpu"):
        for precision in ("fp64", "fp32"):
            error = errors(fixture, backend, precision)
            assert not too_large(error, precision)
