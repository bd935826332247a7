"""The benchmark: what it counts and how it reports."""

import json
from types import SimpleNamespace

import pytest

from llmnb.bench import Stopwatch, bench, peak_memory, report
from llmnb.config import GPT2Config, parameter_count

CFG = GPT2Config(16, 131, 3, 2, 16)


@pytest.fixture(scope="module")
def result():
    return bench(CFG, 2, 16, steps=3, backend="reference")


def test_stopwatch(monkeypatch):
    clock = iter([0.0, 2.0, 10.0, 11.0, 20.0, 24.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    watch = Stopwatch(SimpleNamespace(f=lambda x: x + 1, g=abs, name="me"))
    assert (watch.f(1), watch.f(x=2), watch.g(-3)) == (2, 3, 3)
    assert watch.name == "me"
    assert watch.seconds == {"f": 3.0, "g": 4.0}
    assert watch.calls == {"f": 2, "g": 1}
    watch.reset()
    assert watch.seconds == {}
    with pytest.raises(AttributeError):
        watch.nothing  # noqa: B018


def test_calls_are_the_models(result):
    calls = {x["name"]: x["calls"] for x in result["layers"]}
    L = CFG.num_layers
    for way in ("forward", "backward"):
        assert calls[f"matmul_{way}"] == 4 * L + 1
        assert calls[f"layernorm_{way}"] == 2 * L + 1
        assert calls[f"attention_{way}"] == calls[f"gelu_{way}"] == L
    assert calls["adamw_update"] == 1


def test_times_add_up(result):
    assert set(result["parts"]) == {"forward", "backward", "clip", "update"}
    low, high = result["step_seconds_range"]
    assert 0 < low <= result["step_seconds"] <= high
    tokens = 2 * 16
    speed = result["tokens_per_second"] * result["step_seconds"]
    assert speed == pytest.approx(tokens)
    layers = sum(x["seconds"] for x in result["layers"])
    assert 0 < layers < 3 * high
    assert all(x["seconds"] >= 0 for x in result["layers"])


def test_facts(result):
    assert result["steps"] == 3
    assert result["parameters"] == parameter_count(CFG)
    assert result["model"]["num_layers"] == 3
    assert result["arena_bytes"] > 16 * result["parameters"]
    assert json.loads(json.dumps(result)) == result


def test_report(result):
    text = report(result)
    assert result["machine"] in text
    assert f"{parameter_count(CFG):,} parameters" in text
    assert "median of 3" in text
    for name in ("matmul_forward", "backward", "(the rest)", "tokens/s"):
        assert name in text
    assert "peak unknown" in report({**result, "peak_bytes": None})


def test_peak_memory():
    peak = peak_memory()
    if peak is None:
        pytest.skip("this system does not say how much memory was used")
    assert 10e6 < peak < 1e12


def test_no_steps():
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        bench(CFG, 2, 16, steps=0)
