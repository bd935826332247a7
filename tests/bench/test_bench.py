"""The benchmark: who races, what is counted, how it is reported."""

import hashlib
import io
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from llmnb.bench import bench as module
from llmnb.bench import peers, race
from llmnb.bench.bench import (
    CONFIGS,
    bench,
    layers_figure,
    report,
)
from llmnb.bench.peers import missing, peak_memory, random_batch, serve
from llmnb.bench.race import (
    WARM_UP,
    Contestant,
    LlmC,
    Settings,
    lineup,
    ratios,
    start_times,
    take_turns,
)
from llmnb.bench.stopwatch import Stopwatch, timed_step
from llmnb.config import GPT2Config
from llmnb.cpu import bfloat16
from llmnb.formats.published import write_folder
from llmnb.model.generate import generate
from llmnb.model.gpt2 import GPT2
from llmnb.model.tensors import flops_per_token, parameter_count

ROOT = Path(__file__).parents[2]
CFG = GPT2Config(16, 131, 3, 2, 16)
SHAPE = {"model": dict(vars(CFG)), "batch_size": 2, "seq_len": 16}
OURS = {"kind": "llmnb", "backend": "reference", "precision": "fp32"}
REFERENCE = Settings(("fp32", "bf16"), (), 3, 1, "reference")


@pytest.fixture(scope="module")
def result():
    return bench({"tiny": (CFG, 2, 16)}, REFERENCE)


# numbers that are none


def test_who_computes_no_numbers_has_no_speed(monkeypatch):
    steps = [{"loss": 3.0, "seconds": 1.0} for _ in range(5)]
    for name in ("llmnb fp32", "torch"):
        found = {
            "llmnb fp32": {"steps": steps, "facts": {"peak_bytes": 1}},
            name: {
                "steps": [*steps[:4], {"loss": math.nan, "seconds": 0.1}],
                "facts": {"peak_bytes": 1},
            },
        }
        monkeypatch.setattr(
            "llmnb.bench.bench.race", lambda *x, f=found: (f, {})
        )
        with pytest.raises(FloatingPointError, match=f"{name}: the loss is n"):
            bench({"tiny": (CFG, 2, 16)}, REFERENCE)


def test_curves_of_no_numbers_are_not_compared(monkeypatch):
    monkeypatch.setattr("llmnb.bench.bench.no_device", lambda backend: "")
    monkeypatch.setattr("llmnb.bench.peers.missing", lambda *x: "")

    class Broken(GPT2):
        def __init__(self, *shape, backend, precision):
            super().__init__(*shape, "reference")

        def forward(self, *batch):
            return math.inf

        def backward(self):
            pass

        def update(self, step):
            pass

    monkeypatch.setattr("llmnb.bench.bench.GPT2", Broken)
    with pytest.raises(FloatingPointError, match="cpu fp32: the loss is inf"):
        module.loss_curves(["fp32"], 2, (CFG, 2, 16))


# our contestant


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


def test_a_stopwatch_that_waits(monkeypatch):
    clock = iter([0.0, 5.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    log = []
    ops = SimpleNamespace(f=lambda: log.append("f"))
    watch = Stopwatch(ops, lambda: log.append("wait"))
    watch.f()
    assert log == ["f", "wait"] and watch.seconds == {"f": 5.0}


def test_a_timed_step_is_a_step():
    a, b = GPT2(CFG, 2, 16, "reference"), GPT2(CFG, 2, 16, "reference")
    tokens, targets = random_batch(SHAPE)
    b.ops = Stopwatch(b.ops)
    for step in (1, 2):
        loss = a.forward(tokens, targets)
        a.backward()
        a.update(step=step)
        found = timed_step(b, tokens, targets, step)
        assert found["loss"] == loss
        assert found["calls"]["adamw_update"] == 1  # not added up
    for name in a.params:
        np.testing.assert_array_equal(a.params[name], b.params[name])


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_the_peak_of_another_process_is_its_own():
    ours = np.ones(50_000_000)  # 400 MB that the other does not have
    code = "import sys; print('up', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as other:
        other.stdout.readline()
        peak = peak_memory(other.pid)
        other.communicate()
    assert 1e6 < peak < ours.nbytes < peak_memory()
    assert peak_memory("nobody") is None


def test_the_batch_is_the_same_for_all():
    batch = random_batch(SHAPE)
    assert batch.shape == (2, 2, 16)
    assert batch.min() >= 0 and batch.max() < CFG.vocab_size
    np.testing.assert_array_equal(batch, random_batch(SHAPE))


def test_serve():
    answers, numbers = [], iter([1.0, 2.0])
    commands = io.StringIO("step\nstep\nfinish\nstep\n")
    serve(
        lambda: {"loss": next(numbers)},
        lambda: {"threads": 3},
        commands,
        answers.append,
    )
    assert [x.get("loss") for x in answers] == [1.0, 2.0, None]
    assert all(x["seconds"] >= 0 for x in answers[:2])
    assert answers[2]["threads"] == 3
    assert answers[2]["cpu_seconds_a_wait"] >= 0
    assert commands.read() == "step\n"


def test_bf16_is_missing_unless_the_cpu_has_it(monkeypatch):
    assert missing("fp32") is None and missing("fp64") is None
    monkeypatch.setattr(bfloat16, "has_bf16", lambda: False)
    assert missing("bf16") == "not available on this CPU"
    monkeypatch.setattr(bfloat16, "has_bf16", lambda: True)
    assert missing("bf16") is None
    assert "reference backend" in missing("bf16", "reference")


# processes


def test_a_contestant_trains_on_command():
    runner = Contestant("llmnb fp32", {**SHAPE, **OURS}, sys.executable, 1)
    try:
        losses = [runner.step()["loss"] for _ in range(3)]
        facts = runner.finish()
    finally:
        runner.close()
    model = GPT2(CFG, 2, 16, "reference")
    model.ops = Stopwatch(model.ops)
    batch = random_batch(SHAPE)
    want = [timed_step(model, *batch, 1 + i)["loss"] for i in range(3)]
    assert losses == want
    assert facts["threads"] == 1
    assert set(facts["versions"]) == {"llmnb", "numpy", "numba"}
    assert runner.unmeasured is None
    runner.close()  # once more does no harm


def test_a_contestant_says_why_it_cannot():
    spec = {**SHAPE, **OURS, "precision": "fp99"}
    with pytest.raises(ChildProcessError, match="llmnb fp99: .*precision"):
        Contestant("llmnb fp99", spec, sys.executable)


@pytest.mark.skipif(os.name != "posix", reason="there are no signals")
def test_a_contestant_that_is_ended():
    runner = Contestant("me", {**SHAPE, **OURS}, sys.executable, 1)
    try:
        runner._process.kill()
        runner._process.wait()
        with pytest.raises(ChildProcessError, match="me: was ended by SIGKI"):
            runner.step()
    finally:
        runner.close()


def test_a_program_that_is_no_python():
    with pytest.raises(OSError, match="no-python"):
        Contestant("torch", {**SHAPE, **OURS}, "no-python")


def has_torch(python):
    code = (
        "import sys, importlib.util as u; sys.exit(not u.find_spec('torch'))"
    )
    return subprocess.run([python, "-c", code]).returncode == 0


def test_a_python_without_torch(tmp_path):
    if has_torch(sys.executable):
        pytest.skip("this Python has torch")
    settings = REFERENCE._replace(precisions=("fp32",), against=("torch",))
    message = "torch: .* has no torch; name a Python .* --torch-python"
    with pytest.raises(ChildProcessError, match=message):
        race.race(SHAPE, settings)


@pytest.mark.parametrize("name", ["torch", "torch-bf16"])
def test_torch_trains_the_same_model(name):
    python = os.environ.get("LLMNB_TORCH_PYTHON", sys.executable)
    if not has_torch(python):
        pytest.skip("no torch: LLMNB_TORCH_PYTHON may name a Python with it")
    settings = Settings((), (name,), 3, 1, "reference", python)
    found, why = race.race(SHAPE, settings)
    assert why == {}
    losses = [x["loss"] for x in found[name]["steps"]]
    assert len(losses) == WARM_UP + 3
    assert abs(losses[0] - math.log(CFG.padded_vocab_size)) < 0.1
    assert losses[-1] < losses[0]
    assert found[name]["facts"]["threads"] == 1
    assert "torch" in found[name]["facts"]["versions"]


FAKE = """#!{python}
import os, time
names = "gpt2_124M.bin", "dev/data/tinyshakespeare/tiny_shakespeare_val.bin"
print(*(os.path.getsize(x) for x in names))
print("[GPT-2]")
print("val loss 9.0")
for step in range(3):
    print(f"step {{step}}: train loss {{5 - step}}.5 (took 1.0 ms)")
    time.sleep(0.2)
    open("awake", "w").write(str(step))
"""


@pytest.fixture
def train_gpt2(tmp_path):
    """A program that prints what llm.c's prints."""
    path = tmp_path / "train_gpt2"
    path.write_text(FAKE.format(python=sys.executable))
    path.chmod(0o755)
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_llmc_sleeps_between_its_steps(train_gpt2):
    runner = LlmC(train_gpt2, {**SHAPE, "batch_size": 4, "seq_len": 64})
    try:
        for loss in (5.5, 4.5, 3.5):
            found = runner.step()
            assert found["loss"] == loss and found["seconds"] > 0
            status = Path(f"/proc/{runner._process.pid}/status").read_text()
            assert "T (stopped)" in status
        assert runner.finish()["peak_bytes"] > 1e6
        with pytest.raises(ChildProcessError, match="llm.c: the program has"):
            runner.step()
        folder = Path(runner._folder.name)
        size = 1024 + 4 * parameter_count(CFG)
        assert (folder / "gpt2_124M.bin").stat().st_size == size
    finally:
        runner.close()
    assert not folder.exists()


def test_the_environment_of_a_contestant(monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")  # as llmnb.cpu sets it
    monkeypatch.setenv("MINE", "kept")
    env = race._environment(3, "folder")
    assert "GOMP_SPINCOUNT" not in env
    assert env["OMP_NUM_THREADS"] == env["NUMBA_NUM_THREADS"] == "3"
    assert env["LLMNB_CACHE"] == env["TORCHINDUCTOR_CACHE_DIR"] == "folder"
    assert env["MINE"] == "kept"
    assert race._environment(None)["OMP_NUM_THREADS"] == str(race.cores())


def test_llmc_has_one_batch_size(train_gpt2):
    runner = LlmC(train_gpt2, SHAPE)
    assert runner.unmeasured == "has B=4 T=64 compiled in"
    runner.close()


# the race


@pytest.mark.parametrize(
    ("backend", "against", "message"),
    [
        ("cpu", "torch-tf32", "torch-tf32 needs a GPU: --backend cuda"),
        ("cpu", "torch-compile-tf32", "needs a GPU"),
        ("cuda", "llmc={train_gpt2}", "train_gpt2 runs on the CPU"),
    ],
)
def test_who_cannot_race_where(backend, against, message, train_gpt2):
    against = against.format(train_gpt2=train_gpt2)
    with pytest.raises(ValueError, match=message):
        lineup(Settings(backend=backend, against=(against,)))


def test_who_races_on_a_gpu():
    against = "torch", "torch-tf32", "torch-compile-tf32"
    specs = lineup(Settings(("fp32", "tf32"), against, backend="cuda"))
    ours = [f"llmnb {p}{end}" for p in ("fp32", "tf32")
            for end in ("", ", no graph")]  # fmt: skip
    assert [*specs] == [*ours, *against]
    assert [specs[x]["graph"] for x in ours] == [True, False] * 2
    for name in against:
        assert specs[name]["device"] == "cuda"
        assert specs[name]["tf32"] is ("tf32" in name)
        assert specs[name]["compile"] is ("compile" in name)


def test_torch_is_told_where_and_how(monkeypatch):
    settings = SimpleNamespace(
        matmul=SimpleNamespace(allow_tf32=None),
    )
    cudnn = SimpleNamespace(allow_tf32=None)
    has = SimpleNamespace(is_available=lambda: True)
    backends = SimpleNamespace(cuda=settings, cudnn=cudnn)
    torch = SimpleNamespace(cuda=has, backends=backends)
    for tf32 in (True, False):
        spec = {"device": "cuda", "tf32": tf32}
        assert peers._torch_device(torch, spec) == "cuda"
        assert settings.matmul.allow_tf32 is tf32
        assert cudnn.allow_tf32 is tf32
    assert peers._torch_device(torch, {}) == "cpu"
    has.is_available = lambda: False
    with pytest.raises(NotImplementedError, match="torch finds no GPU"):
        peers._torch_device(torch, {"device": "cuda", "tf32": False})


def test_who_races(train_gpt2):
    against = "torch-compile", "torch", f"llmc={train_gpt2}"
    specs = lineup(Settings(("fp32", "bf16"), against))
    ours = ["llmnb fp32", "llmnb bf16"]
    assert [*specs] == [*ours, "torch-compile", "torch", "llm.c"]
    assert specs["torch-compile"]["compile"] is True
    assert specs["torch"]["compile"] is False
    assert specs["llm.c"]["path"] == str(train_gpt2)


class Player:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def step(self):
        self.log.append(self.name)
        return len(self.log)


def test_turns(monkeypatch):
    monkeypatch.setattr(race, "PAUSE", 0)
    log = []
    players = {name: Player(name, log) for name in "abc"}
    found = take_turns(players, range(4))
    assert "".join(log) == "abc" + "bca" + "cab" + "abc"
    assert found == {"a": [1, 6, 8, 10], "b": [2, 4, 9, 11],
                     "c": [3, 5, 7, 12]}  # fmt: skip


def test_ratios_are_taken_within_rounds():
    seconds = {
        "llmnb fp32": [1.0, 30.0, 4.0],
        "llmnb bf16": [1.0, 1.0, 1.0],
        "torch": [2.0, 10.0, 5.0],
    }
    assert ratios(seconds) == [
        {"ours": "llmnb fp32", "peer": "torch", "ratio": 0.8, "low": 0.5,
         "high": 3.0},
        {"ours": "llmnb bf16", "peer": "torch", "ratio": 0.2, "low": 0.1,
         "high": 0.5},
    ]  # fmt: skip
    assert ratios({"llmnb fp32": [1.0]}) == []


def test_starts(monkeypatch):
    """Each start has a process of its own, the cold ones an empty cache."""
    seen = []

    class Runner:
        unmeasured = None

        def __init__(self, name, spec, shape, settings, cache):
            folder = Path(cache)
            seen.append((name, [x.name for x in folder.iterdir()]))
            (folder / "kernel").write_text("x")

        def step(self):
            seen.append("step")

        def close(self):
            seen.append("closed")

    monkeypatch.setattr(race, "_start", Runner)
    monkeypatch.setattr(race, "STARTS", 2)
    rows = start_times(SHAPE, REFERENCE._replace(precisions=("fp32",)))
    once = [("llmnb fp32", []), "step", "closed"]
    once += [("llmnb fp32", ["kernel"]), "step", "closed"]
    assert seen == once * 2
    (row,) = rows
    assert row["name"] == "llmnb fp32"
    assert len(row["cold"]) == len(row["warm"]) == 2


def test_a_real_start(monkeypatch):
    monkeypatch.setattr(race, "STARTS", 1)
    fp32, bf16 = start_times(SHAPE, REFERENCE)
    assert 0 < fp32["warm"][0] < 60 and 0 < fp32["cold"][0] < 60
    assert "not available" in bf16["unmeasured"]


# the result


def test_rows(result):
    (config,) = result["configs"]
    fp32, bf16 = config["contestants"]
    assert (fp32["name"], bf16["name"]) == ("llmnb fp32", "llmnb bf16")
    assert bf16 == {
        "name": "llmnb bf16",
        "unmeasured": "not available in the reference backend",
    }
    assert len(fp32["seconds"]) == 3
    middle = sorted(fp32["seconds"])[1]
    assert fp32["step_seconds"] == middle
    assert fp32["tokens_per_second"] * middle == pytest.approx(2 * 16)
    flops = flops_per_token(CFG, 16) * 32
    assert fp32["flops_per_second"] * middle == pytest.approx(flops)
    assert abs(fp32["first_loss"] - math.log(131)) < 0.1
    assert fp32["arena_bytes"] > 16 * config["parameters"]
    assert config["parameters"] == parameter_count(CFG)
    assert config["ratios"] == []
    assert json.loads(json.dumps(result)) == result


def test_layers(result):
    row = result["configs"][0]["contestants"][0]
    calls = Counter({x["name"]: x["calls"] for x in row["layers"]})
    L = CFG.num_layers
    for way in ("forward", "backward"):
        assert calls[f"matmul_{way}"] == 4 * L + 1
        assert calls[f"attention_{way}"] == L
    # the backward pass computes a block's LayerNorms and GELU once more
    assert calls["layernorm_forward"] == 2 * calls["layernorm_backward"] - 1
    assert calls["layernorm_backward"] == 2 * L + 1
    assert calls["gelu_forward"] == 2 * calls["gelu_backward"] == 2 * L
    assert calls["adamw_update"] == 1
    assert set(row["parts"]) == {"forward", "backward", "update"}
    layers = sum(x["seconds"] for x in row["layers"])
    assert 0 < layers < 3 * max(row["seconds"])
    assert all(x["seconds"] >= 0 for x in row["layers"])


def test_share_of_the_peak():
    steps = [{"seconds": s, "loss": 5.0} for s in (9.0, 9.0, 2.0, 4.0, 3.0)]
    row = module._row("x", 600.0, SHAPE, steps, {"fma_peak": 300.0})
    assert row["seconds"] == [2.0, 4.0, 3.0]
    assert row["flops_per_second"] == 200.0
    other = {"contestants": [{"name": "y", "fma_peak": 400.0}]}
    module.shares({"configs": [{"contestants": [row]}, other]})
    assert row["share_of_peak"] == 0.5
    row = module._row("x", 1.0, SHAPE, steps, {})
    module.shares({"configs": [{"contestants": [row]}]})
    assert "share_of_peak" not in row


def test_the_peak_of_one_is_the_peak_of_all(monkeypatch):
    def fake(shape, settings, bar):
        steps = [{"seconds": 2.0, "loss": 5.0}] * (WARM_UP + 1)
        facts = {"llmnb fp32": {"fma_peak": 1e6}, "torch": {}}
        found = {k: {"steps": steps, "facts": v} for k, v in facts.items()}
        return found, {}

    monkeypatch.setattr(module, "race", fake)
    settings = Settings(("fp32",), ("torch",))
    (config,) = bench({"tiny": (CFG, 2, 16)}, settings)["configs"]
    ours, peer = config["contestants"]
    share = flops_per_token(CFG, 16) * 32 / 2.0 / 1e6
    assert ours["share_of_peak"] == peer["share_of_peak"] == share
    assert config["ratios"][0]["ratio"] == 1.0


def fake_result():
    """What a race writes, with times that can be checked by eye."""
    layers = [
        {"name": "matmul_forward", "calls": 4, "seconds": 0.1},
        {"name": "matmul_backward", "calls": 4, "seconds": 0.2},
        {"name": "(the rest)", "calls": 1, "seconds": 0.1},
    ]
    ours = {"name": "llmnb fp32", "seconds": [0.3, 0.4, 0.5]}
    ours |= {"step_seconds": 0.4, "tokens_per_second": 80.0}
    ours |= {"flops_per_second": 2e9, "share_of_peak": 0.25}
    ours |= {"peak_bytes": 123e6, "layers": layers}
    ours["parts"] = {"forward": 0.1, "backward": 0.2, "update": 0.1}
    peer = {"name": "torch", "seconds": [0.2, 0.2, 0.2]}
    peer |= {"step_seconds": 0.2, "tokens_per_second": 160.0}
    peer |= {"flops_per_second": 4e9, "peak_bytes": None}
    bf16 = {"name": "llmnb bf16", "unmeasured": "not available on this CPU"}
    seconds = {x["name"]: x["seconds"] for x in (ours, peer)}
    config = {"name": "tiny", **SHAPE, "parameters": parameter_count(CFG)}
    config |= {"contestants": [ours, bf16, peer], "ratios": ratios(seconds)}
    starts = [{"name": "llmnb fp32", "cold": [9.0], "warm": [1.5]}, bf16]
    facts = {"command": "llmnb bench", "date": "2026-01-02", "threads": 2}
    facts |= {
        "load": 0.25,
        "commit": "abc",
        "machine": "A processor, Linux, Python 3",
    }
    return {**facts, "configs": [config], "start": starts}


def test_report(result):
    text = report(result)
    assert result["machine"] + ", 1 threads" in text
    assert f"{parameter_count(CFG):,} parameters" in text
    for name in ("matmul_forward", "backward", "(the rest)", "tokens/s"):
        assert name in text
    assert "not available in the reference backend" in text


def test_report_of_a_race():
    lines = [" ".join(x.split()) for x in report(fake_result()).split("\n")]
    assert "load 0.25 before the race" in lines
    assert "llmnb fp32 400.0 80 2.0 25% 123" in lines
    assert "llmnb bf16 not available on this CPU" in lines
    assert "torch 200.0 160 4.0 - -" in lines
    ratio = "llmnb fp32 / torch: 2.00 of its time, median of the rounds "
    assert ratio + "(1.50 to 2.50)" in lines
    assert "matmul_backward 4 200.00 50.0%" in lines
    assert "llmnb fp32 9.00 1.50" in lines


def test_layers_figure():
    (ax,) = layers_figure(fake_result()).axes
    widths = {}
    names = [x.get_text() for x in ax.get_yticklabels()]
    for bars in ax.containers:
        widths[bars.get_label()] = [round(x.get_width()) for x in bars]
    assert names == ["matmul", "(the rest)"]
    assert widths == {"forward": [100, 0], "backward": [200, 0],
                      "neither": [0, 100]}  # fmt: skip
    empty = {"configs": []}
    with pytest.raises(ValueError, match="there is nothing to draw"):
        layers_figure(empty)


def test_named_configurations():
    lengths = ["124m-64", "124m-256", "124m-1024", "124m-16x1024"]
    assert [*CONFIGS] == ["small", *lengths]
    counts = [parameter_count(cfg) for cfg, _, _ in CONFIGS.values()]
    assert counts == [834_304] + 4 * [124_475_904]
    shapes = [(12, 64), (4, 64), (4, 256), (1, 1024), (16, 1024)]
    assert [x[1:] for x in CONFIGS.values()] == shapes


# a GPU


@pytest.fixture
def no_gpu(monkeypatch):
    """A machine without a GPU, whatever this one has."""
    from llmnb.bench import clock

    monkeypatch.setattr(clock, "no_times", lambda: "no GPU: says the test")
    monkeypatch.setattr(race, "_start", None)  # no process is started
    return "no GPU: says the test"


def test_no_gpu(no_gpu):
    settings = Settings(("fp32", "tf32"), ("torch",), backend="cuda")
    result = bench({"tiny": (CFG, 2, 16)}, settings, start=True)
    (config,) = result["configs"]
    names = ["llmnb fp32", "llmnb fp32, no graph", "llmnb tf32",
             "llmnb tf32, no graph", "torch"]  # fmt: skip
    rows = [{"name": x, "unmeasured": no_gpu} for x in names]
    assert config["contestants"] == rows == result["start"]
    assert config["ratios"] == config["captures"] == []
    assert result["losses"] == {"unmeasured": no_gpu}
    text = report(result)
    assert text.count(no_gpu) == 2 * len(names) + 1
    for backend, why in (("cpu", ""), ("cuda", no_gpu)):
        assert race.no_device(backend) == why
    spec = {**SHAPE, **OURS, "backend": "cuda", "graph": True}
    with pytest.raises(NotImplementedError, match=no_gpu):
        peers.llmnb_contestant(spec)


class OnGpu(GPT2):
    """A model on the host that passes for one on a GPU, and takes notes."""

    log = []

    def __init__(self, cfg, B, T, backend="cuda", precision="fp32"):
        assert backend in ("cpu", "cuda")
        self.log.append((backend, precision))
        super().__init__(cfg, B, T, "reference", "fp32")

    def clip_gradients(self, max_norm):
        self.log.append(("clip", max_norm))

    def step(self, tokens, targets, step):
        self.log.append(("step", step))
        loss = self.forward(tokens, targets)
        self.backward()
        self.update(step=step)
        return loss, 1.0


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is made up; what waits for it is noted."""
    import numba

    from llmnb.bench import clock
    from llmnb.model import gpt2

    log = []
    real = SimpleNamespace(synchronize=lambda: log.append("synchronize"))
    monkeypatch.setattr(OnGpu, "log", log)
    monkeypatch.setattr(numba, "cuda", real, raising=False)
    monkeypatch.setitem(sys.modules, "numba.cuda", real)
    monkeypatch.setattr(clock, "no_times", lambda: "")
    monkeypatch.setattr(clock, "Clock", lambda: "clock")
    monkeypatch.setattr(clock, "limits", lambda clock: {"fma_peak": 9.0})
    monkeypatch.setattr(peers, "_our_facts", lambda backend: {"for": backend})
    monkeypatch.setattr(gpt2, "GPT2", OnGpu)
    monkeypatch.setattr(module, "GPT2", OnGpu)
    return log


@pytest.mark.parametrize("graph", [True, False])
def test_our_contestant_on_a_gpu(gpu, graph):
    spec = {**SHAPE, **OURS, "backend": "cuda", "precision": "tf32"}
    step, facts = peers.llmnb_contestant(spec | {"graph": graph})
    assert gpu == [("cuda", "tf32")]
    model, batch = GPT2(CFG, 2, 16, "reference"), random_batch(SHAPE)
    for number in (1, 2):
        loss = model.forward(*batch)
        model.backward()
        model.update(step=number)
        gpu.clear()
        assert step() == {"loss": loss}
        own = ("step", number) if graph else ("clip", math.inf)
        assert gpu == [own, "synchronize"]  # before the clock is read
    found = facts()
    assert found["for"] == "cuda" and found["fma_peak"] == 9.0
    assert found["device_bytes"] == found["arena_bytes"] > 1e5
    assert ("apart" in found) is not graph
    if not graph:
        assert len(found["apart"]) == 3
        assert found["apart"][0]["calls"]["adamw_update"] == 1
        assert set(found["apart"][0]["parts"]) == set(module.PARTS)


def test_loss_curves(gpu):
    shape = CFG, 2, 16
    found = module.loss_curves(("fp32", "bf16", "tf32"), 3, shape)
    runs = ["cpu fp32", "cuda fp32", "cuda tf32"]  # and no bf16
    assert [*found] == [*runs, "worst"]
    assert all(len(found[x]) == 3 for x in runs)
    assert found["cpu fp32"][0] > found["cpu fp32"][-1]
    assert found["worst"] == {"cuda fp32": 0.0, "cuda tf32": 0.0}
    lines = [*module._losses_lines(found)]
    assert lines[-1].endswith("differ from the CPU's by at most 0.0e+00")


def test_tf32_is_missing_on_a_cpu():
    assert missing("tf32", "cuda") is None
    assert missing("tf32", "cpu") == "not available in the cpu backend"
    assert missing("bf16", "cuda") == "not available in the cuda backend"


def test_what_a_graph_saves():
    seconds = {
        "llmnb fp32": [1.0, 2.0, 1.0],
        "llmnb fp32, no graph": [1.5, 2.25, 5.0],
        "llmnb tf32": [1.0, 1.0, 1.0],
        "torch": [9.0, 9.0, 9.0],
    }
    row = {"name": "llmnb fp32", "saved": 0.5, "low": 0.25, "high": 4.0}
    assert module.captures(seconds) == [row]


def test_layers_that_were_timed_apart():
    """On a GPU the layers come from steps of their own."""
    steps = [{"seconds": 1.0, "loss": 5.0}] * (WARM_UP + 2)
    apart = {"loss": 4.0, "parts": dict.fromkeys(module.PARTS, 2.0)}
    apart |= {"layers": {"f": 5.0}, "calls": {"f": 3}}
    facts = {"apart": [apart] * 3, "peak_bytes": 1e6, "device_bytes": 7e6}
    row = module._row("x", 600.0, SHAPE, steps, facts)
    assert "apart" not in row
    assert row["step_seconds"] == 1.0 and row["first_loss"] == 5.0
    assert row["layers"] == [
        {"name": "f", "calls": 3, "seconds": 5.0},
        {"name": "(the rest)", "calls": 1, "seconds": 1.0},
    ]
    assert module._numbers(row).split()[-1] == "7"  # the GPU's memory


# the page of results


def test_the_page_is_what_its_files_say(results_page):
    found = results_page.results()
    assert found, "there are no results"
    text = (ROOT / "book" / "results.md").read_text("utf-8")
    assert text == results_page.page(found), "run book/_ext/results_page.py"
    for name, _, result in results_page.figures(found):
        with Image.open(ROOT / "book" / "_static" / name) as image:
            drawn_from = image.info["Description"]
        assert drawn_from == results_page.digest(result), name


def test_files_name_no_folder_of_a_machine():
    for path in (ROOT / "book" / "results").glob("*.json"):
        result = json.loads(path.read_text("utf-8"))
        assert "/" not in result["command"], path.name


def test_a_page_of_results(results_page):
    found = {"one": fake_result()}
    text = results_page.page(found)
    assert "## A processor, Linux, Python 3, 2 threads" in text
    assert "| llmnb, float32 | 400.0 | 80 | 25% | 123 |  |" in text
    row = "| PyTorch | 200.0 | 160 |  |  | 2.00 (1.50 to 2.50) |"
    assert row in text
    assert "Not measured: llmnb, bfloat16 (not available on this CPU)." in text
    assert "| llmnb, float32 | 9.0 | 1.5 |" in text
    assert "](_static/results-one.png)" in text
    names = [name for name, _, _ in results_page.figures(found)]
    assert names == ["results-one.png", "results-one-layers.png"]
    (ax,) = results_page.steps_figure(fake_result()).axes
    bars = [round(x.get_width()) for x in ax.patches]
    assert bars == [400, 200]


def test_a_changed_file_is_noticed(results_page):
    one, other = fake_result(), fake_result()
    other["configs"][0]["contestants"][0]["step_seconds"] = 0.1
    assert results_page.digest(one) != results_page.digest(other)
    text = json.dumps(one).encode()
    assert results_page.digest(one) == hashlib.sha256(text).hexdigest()


def test_peers_runs_without_llmnb():
    """The file that torch's Python runs imports the standard library."""
    text = Path(peers.__file__).read_text("utf-8")
    top = [x.split()[1] for x in text.split("\n") if x.startswith("import ")]
    top += [x.split()[1] for x in text.split("\n") if x.startswith("from ")]
    assert set(top) <= set(sys.stdlib_module_names)


# writers


WRITING = {"prompt": 5, "count": 6, "rounds": 2, "threads": 1}


def test_our_writer(tmp_path):
    model = GPT2(CFG, 1, 16, "cpu")
    write_folder(tmp_path, CFG, model.params)
    spec = {"folder": str(tmp_path), "vocab_size": 131, "prompt": 5}
    step, facts = peers.decoder_contestant(spec | {"count": 6})
    draw = np.random.RandomState(0)
    for _ in range(2):
        answer, prompt = step(), draw.randint(0, 131, 5).tolist()
        want = list(generate(model, prompt, 6, temperature=0))
        assert answer["tokens"] == want
        assert answer["first_seconds"] > 0 < answer["token_seconds"]
    assert facts()["threads"] >= 1


def test_pace():
    answer = peers._pace([1.0, 5.0, 6.0, 8.0, 11.0], [7, 8, 9, 10])
    assert (answer["first_seconds"], answer["token_seconds"]) == (4.0, 2.0)


def test_writers_race():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    result = module.bench_writers(CFG, **WRITING)
    assert result["same_tokens"]
    assert set(result["writers"]) == {"llmnb", "transformers"}
    for row in result["writers"].values():
        assert len(row["first_seconds"]) == len(row["token_seconds"]) == 2
        assert row["threads"] == 1
    for kind in ("first", "token"):
        (ratio,) = result[f"{kind}_seconds_ratios"]
        assert (ratio["ours"], ratio["peer"]) == ("llmnb", "transformers")
        assert 0 < ratio["low"] <= ratio["ratio"] <= ratio["high"]
    json.dumps(result)
    text = module.writers_report(result)
    assert "a prompt of 5 tokens, 6 more: the same tokens" in text
    assert "later token: llmnb / transformers: " in text
    other = {**result, "same_tokens": False}
    assert "OTHER TOKENS" in module.writers_report(other)


def test_writers_where_there_are_no_transformers(tmp_path):
    fake = tmp_path / "transformers.py"
    fake.write_text("raise ImportError(\"No module named 'transformers'\")")
    (tmp_path / "torch.py").write_text("")
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\nPYTHONPATH={tmp_path} exec "{sys.executable}" "$@"\n'
    )
    python.chmod(0o755)
    with pytest.raises(ChildProcessError, match="No module named 'transf"):
        module.bench_writers(CFG, **WRITING, python=str(python))


@pytest.mark.parametrize("sizes", [(0, 4), (4, 1), (10, 7)])
def test_writers_that_do_not_fit(sizes):
    with pytest.raises(ValueError, match="together at most 16"):
        race.race_writers(CFG, *sizes, rounds=1)
