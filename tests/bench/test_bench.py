"""The benchmark: who races, what is counted, how it is reported."""

import hashlib
import io
import json
import math
import os
import re
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numba
import numpy as np
import pytest
import results_page
from processes import wait_for

from llmnb import cpu
from llmnb.bench import bench as module
from llmnb.bench import clock, peers, race
from llmnb.bench.bench import CONFIGS, bench
from llmnb.bench.race import Settings, lineup, ratios
from llmnb.bench.ranks import bench_group
from llmnb.bench.report import bars_figure, layers_figure, report, shares
from llmnb.bench.stopwatch import Stopwatch, timed_step
from llmnb.config import GPT2Config
from llmnb.formats.checkpoint import write_folder
from llmnb.model import gpt2
from llmnb.model.architectures import (
    ARCHITECTURES,
    LlamaConfig,
    architecture_record,
)
from llmnb.model.generate import generate
from llmnb.model.gpt2 import GPT2
from llmnb.model.tensors import flops_per_token, parameter_count
from llmnb.train.group import ALONE

ROOT = Path(__file__).parents[2]
CFG = GPT2Config(16, 131, 3, 2, 16)
LLAMA = LlamaConfig(16, 128, 2, 4, 16, num_kv_heads=2)
SHAPE = {"model": dict(vars(CFG)), "batch_size": 2, "seq_len": 16}
OURS = {"kind": "llmnb", "backend": "reference", "precision": "fp32"}
REFERENCE = Settings(("fp32", "bf16"), (), 3, 1, "reference", turn=0)
FP32 = REFERENCE._replace(precisions=("fp32",))
TINY = {"tiny": (CFG, 2, 16)}
RACE = Settings(("fp32",), ("torch",), 3, turn=0)
ONE_THREAD = Settings(threads=1, turn=0)
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def result():
    return bench(TINY, REFERENCE)


# numbers that are none


def fake_race(monkeypatch, **contestants):
    """What a race finds: for each contestant a last loss, and its facts."""
    seconds = [9.0, 9.0, 2.0, 4.0, 3.0]
    rows = [
        {"name": name.replace("_", " "), "loss": [3.0] * 4 + [loss]}
        | {"seconds": seconds, "peak_bytes": 1e6, **facts}
        for name, (loss, facts) in contestants.items()
    ]
    monkeypatch.setattr(module, "race", lambda *_: rows)


@pytest.mark.parametrize("name", ["llmnb fp32", "torch"])
def test_who_computes_no_numbers_has_no_speed(name, monkeypatch):
    losses = {"llmnb_fp32": (3.0, {}), "torch": (3.0, {})}
    losses[name.replace(" ", "_")] = math.nan, {}
    fake_race(monkeypatch, **losses)
    with pytest.raises(FloatingPointError, match=f"{name}: the loss is n"):
        bench(TINY, RACE)


# our contestant


def test_a_stopwatch_waits_before_it_reads_the_clock(monkeypatch):
    log, times = [], iter([0.0, 2.0, 10.0, 11.0, 20.0, 24.0])
    monkeypatch.setattr(
        "time.perf_counter", lambda: log.append("read") or next(times)
    )
    ops = SimpleNamespace(f=lambda x: log.append("f") or x + 1, name="me")
    watch = Stopwatch(ops, lambda: log.append("wait"))
    assert (watch.f(1), watch.f(x=2), watch.name) == (2, 3, "me")
    assert log == ["read", "f", "wait", "read"] * 2
    assert (watch.seconds, watch.calls) == ({"f": 3.0}, {"f": 2})
    watch.reset()
    assert watch.seconds == watch.calls == {}
    with pytest.raises(AttributeError):
        watch.nothing  # noqa: B018


def test_a_timed_step_is_a_step():
    a, b = GPT2(CFG, 2, 16, "reference"), GPT2(CFG, 2, 16, "reference")
    waits = []
    tokens, targets = peers.random_batch(SHAPE)
    b.ops = Stopwatch(b.ops, lambda: waits.append("waited"))
    for step in (1, 2):
        loss = a.forward(tokens, targets)
        a.backward()
        a.update(step=step)
        found = timed_step(b, tokens, targets, step)
        assert found["loss"] == loss
        calls = found["calls"]
        assert calls["adamw_update"] == 1  # not added up
        assert [*found["parts"]] == ["forward", "backward", "update"]
        assert len(waits) == sum(calls.values()) + 3
        waits.clear()
    for name in a.params:
        np.testing.assert_array_equal(a.params[name], b.params[name])


@on_linux
def test_the_peak_of_another_process_is_its_own():
    ours = np.ones(50_000_000)  # 400 MB that the other does not have
    code = "import sys; print('up', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as other:
        other.stdout.readline()
        peak = peers.peak_memory(other.pid)
        other.communicate()
    assert 1e6 < peak < ours.nbytes < peers.peak_memory()
    assert peers.peak_memory("nobody") is None


def test_a_turn_is_filled_with_steps():
    answers, seconds = [], iter([0.75, 0.5, 2.0])
    commands = io.StringIO("step 1\nstep 1\nfinish\nstep 1\n")
    step = lambda: {"seconds": next(seconds)}  # noqa: E731
    peers.serve(step, dict, commands, answers.append)
    assert [x.get("seconds") for x in answers] == [0.625, 2.0, None]
    assert answers[2]["cpu_seconds_a_wait"] >= 0
    assert commands.read() == "step 1\n"


# processes


@pytest.fixture
def runner():
    runner = race.Contestant("me", {**SHAPE, **OURS}, ONE_THREAD)
    yield runner
    runner.close()
    runner.close()  # once more does no harm


@pytest.mark.parametrize("lean", [False, True])
def test_a_contestant_trains_on_command(lean):
    spec = {**SHAPE, **OURS, "in_backward": lean}
    with closing(race.Contestant("me", spec, ONE_THREAD)) as runner:
        losses = [runner.step()["loss"] for _ in range(3)]
        facts = runner.finish()
    assert ("apart" in facts) is not lean
    model = GPT2(CFG, 2, 16, "reference")
    model.ops = Stopwatch(model.ops)
    batch = peers.random_batch(SHAPE)
    want = [timed_step(model, *batch, 1 + i)["loss"] for i in range(3)]
    assert losses == want
    assert facts["threads"] == 1
    assert set(facts["versions"]) == {"llmnb", "numpy", "numba"}


@pytest.mark.skipif(os.name != "posix", reason="there are no signals")
def test_a_contestant_that_is_ended(runner):
    runner._process.kill()
    runner._process.wait()
    with pytest.raises(ChildProcessError, match="me: was ended by SIGKI"):
        runner.step()


@pytest.mark.skipif(os.name != "posix", reason="there are no groups")
def test_who_has_ended_is_closed_on_macos_too(runner, monkeypatch):
    """There the system refuses to end what has ended."""
    runner.finish()

    def refuse(*args):
        raise PermissionError

    monkeypatch.setattr(os, "killpg", refuse)
    runner.close()
    assert runner._process.returncode == 0


@pytest.mark.parametrize(
    ("others", "error", "message"),
    [
        ({"batch_size": "x"}, NotImplementedError, "batch_size must be a pos"),
        ({"precision": "tf32"}, NotImplementedError, "needs the backend 'cu"),
        ({"kind": "llmc"}, NotImplementedError, "has B=4 T=64 compiled in"),
        (
            {"kind": "llmc", "model": architecture_record(LLAMA)}
            | {"batch_size": 4, "seq_len": 64},
            NotImplementedError,
            "trains GPT-2 only",
        ),
        ({"model": {}, "kind": "llmnb-decoder"}, ChildProcessError, "me: 'pr"),
    ],
)
def test_a_contestant_says_why_it_cannot(others, error, message):
    with pytest.raises(error, match=message):
        race.Contestant("me", {**SHAPE, **OURS, **others}, ONE_THREAD)


def test_a_precision_that_the_processor_lacks(monkeypatch):
    """It is refused, and not replaced by float32."""
    monkeypatch.setattr(cpu, "has_bf16", lambda: False)
    spec = {**SHAPE, **OURS, "backend": "cpu", "precision": "bf16"}
    with (
        pytest.warns(UserWarning),
        pytest.raises(NotImplementedError, match="not available on this CPU"),
    ):
        peers.llmnb_contestant(spec)


@pytest.mark.parametrize(
    ("does", "patience", "message"),
    [
        ("exit 3", 60, "me: ended with code 3"),
        ("exec >&2; echo 1; echo no Python; exit 3", 60, "me: no Python"),
        ("exec sleep 60", 1, "me: gave no answer in 1 s"),
        ("exec >&2; exec sleep 60", 1, "me: gave no answer in 1 s"),
    ],
)
def test_a_program_that_is_no_python(does, patience, message, tmp_path):
    """It says its last words; it costs its own time, and nobody else's."""
    program, start = tmp_path / "python", time.monotonic()
    program.write_text(f"#!/bin/sh\n{does}\n")
    program.chmod(0o755)
    settings = Settings(torch_python=str(program), patience=patience)
    with pytest.raises(ChildProcessError, match=message):
        race.Contestant("me", {**SHAPE, "kind": "torch"}, settings)
    assert time.monotonic() - start < 30


def test_a_git_that_refuses_costs_nothing_but_the_commit(
    tmp_path, monkeypatch
):
    """As in a checkout that was copied, and now is another user's."""
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(race, "__file__", str(tmp_path / "a" / "b" / "c.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert race.facts_of(Settings())["commit"] is None


def has_torch(python):
    code = (
        "import sys, importlib.util as u; sys.exit(not u.find_spec('torch'))"
    )
    return subprocess.run([python, "-c", code]).returncode == 0


@pytest.fixture(scope="module")
def torch_python():
    """A Python that has torch."""
    python = os.environ.get("LLMNB_TORCH_PYTHON", sys.executable)
    if not has_torch(python):
        pytest.skip("no torch: LLMNB_TORCH_PYTHON may name a Python with it")
    return python


def run_race(settings):
    specs = {k: SHAPE | x for k, x in lineup(settings).items()}
    return {x["name"]: x for x in race.race(specs, 5, settings)}


def test_a_python_without_torch():
    if has_torch(sys.executable):
        pytest.skip("this Python has torch")
    message = "torch: No module named 'torch' in .* with --torch-python"
    found = run_race(FP32._replace(against=("torch",)))
    assert re.search(message, found["torch"]["unmeasured"])
    assert len(found["llmnb fp32"]["seconds"]) == 5  # it stops nobody else


@pytest.mark.parametrize("name", ["torch", "torch-bf16"])
def test_torch_trains_the_same_model(name, torch_python):
    settings = Settings((), (name,), 3, 1, "reference", torch_python, 0)
    row = run_race(settings)[name]
    assert len(row["loss"]) == len(row["seconds"]) == 5
    assert abs(row["loss"][0] - math.log(CFG.padded_vocab_size)) < 0.1
    assert row["loss"][-1] < row["loss"][0]
    assert row["threads"] == 1 and "torch" in row["versions"]


def test_ours_and_torch_compute_the_same_llama():
    """The peer, given our weights, has our loss."""
    torch = pytest.importorskip("torch")
    for cfg in (LLAMA, replace(LLAMA, num_kv_heads=4, tied=True)):
        ours = GPT2(cfg, 2, 8, "reference", "fp64", seed=1)
        theirs = peers._torch_model(architecture_record(cfg)).double()
        there = dict(theirs.named_parameters())
        with torch.no_grad():
            for name, x in ours.params.items():
                whole = f"{name.removesuffix('w')}.weight"
                if name in ("wte", "head", "lnfw"):
                    there.pop(whole).copy_(torch.from_numpy(x))
                    continue
                for i in range(2):
                    y = there.pop(f"blocks.{i}.{whole}")
                    y.copy_(torch.from_numpy(x[i]))
        assert not there
        spec = {"model": vars(cfg), "batch_size": 2, "seq_len": 8}
        batch = peers.random_batch(spec)
        want = ours.forward(*batch)
        with torch.no_grad():
            got = theirs(*torch.from_numpy(batch)).item()
        assert abs(got / want - 1) < 1e-6  # the angles are float32 there


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_llama_races_torchs(family, torch_python):
    cfg = ARCHITECTURES[family](16, 128, 2, 4, 16, num_kv_heads=2)
    how = ("torch",), 2, 1, "reference", torch_python, 0
    settings = Settings(("fp32",), *how)
    (contest,) = bench({"a": (cfg, 2, 8)}, settings)["contests"]
    assert contest["model"]["family"] == family
    assert contest["about"].startswith(f"{family}, 2 layers")
    for row in contest["contestants"]:
        assert abs(row["first_loss"] - math.log(128)) < 0.1


@pytest.mark.parametrize("family", ["qwen3", "gemma", "gemma2", "gemma3_text"])
def test_a_family_that_has_no_peer(family):
    """Whose computation nobody has written in PyTorch is said, not raced."""
    pytest.importorskip("torch")
    cfg = ARCHITECTURES[family](16, 131, 2, 4, 16, num_kv_heads=2)
    with pytest.raises(NotImplementedError, match="not for this"):
        peers._torch_model(architecture_record(cfg))


FAKE = """#!{python}
import os, time
names = "gpt2_124M.bin", "dev/data/tinyshakespeare/tiny_shakespeare_val.bin"
open("pid", "w").write(str(os.getpid()))
assert "GOMP_SPINCOUNT" not in os.environ
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


def ended(pid):
    """Whether a process is gone, or only waits to be waited for."""
    try:
        return "Z (zombie)" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


@on_linux
def test_llmc_sleeps_between_its_steps(train_gpt2):
    spec = {**SHAPE, "kind": "llmc", "path": str(train_gpt2)}
    spec |= {"batch_size": 4, "seq_len": 64}
    with closing(race.Contestant("llm.c", spec, ONE_THREAD)) as runner:
        folder = Path(runner._folder.name)
        size = 1024 + 4 * parameter_count(CFG)
        assert (folder / "gpt2_124M.bin").stat().st_size == size
        for loss in (5.5, 4.5, 3.5):
            found = runner.step()
            assert found["loss"] == loss and found["seconds"] > 0
            pid = int((folder / "pid").read_text())
            status = Path(f"/proc/{pid}/status").read_text()
            assert "T (stopped)" in status
        memory = runner.finish()["peak_bytes"]
        assert 1e6 < memory < 5e7  # its own, not that of Python with NumPy
    assert not folder.exists()
    wait_for(lambda: ended(pid))
    with pytest.raises(ChildProcessError, match="the program has ended"):
        peers._line(io.StringIO())


def test_the_environment_of_a_contestant(monkeypatch):
    """PYTHONPATH is kept, too, where wheels lie that were carried along."""
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")  # as llmnb.cpu sets it
    monkeypatch.setenv("MINE", "kept")
    monkeypatch.setenv("PYTHONPATH", "carried")
    seen = []

    def started(command, env, **_):
        seen.append(env)
        raise ChildProcessError("enough")

    monkeypatch.setattr(race.subprocess, "Popen", started)
    spec = {**SHAPE, **OURS}
    for settings, cache in ((Settings(threads=3), "folder"), (Settings(), "")):
        with pytest.raises(ChildProcessError, match="enough"):
            race.Contestant("me", spec, settings, cache)
    env, plain = seen
    assert "GOMP_SPINCOUNT" not in env
    assert env["OMP_NUM_THREADS"] == env["NUMBA_NUM_THREADS"] == "3"
    assert env["LLMNB_CACHE"] == env["TORCHINDUCTOR_CACHE_DIR"] == "folder"
    assert env["MINE"] == "kept" and env["PYTHONSAFEPATH"] == "1"
    assert env["PYTHONPATH"].split(os.pathsep)[1:] == ["carried"]
    assert plain["OMP_NUM_THREADS"] == str(race.cores())


# the race


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"against": ("torch-tf32",)}, ValueError, "torch-tf32 needs a GPU:"),
        ({"against": ("torch-compile-tf32",)}, ValueError, "needs a GPU"),
        ({"against": ("tensorflow",)}, ValueError, "no contestant 'tensorf"),
        ({"precisions": ("fp99",)}, ValueError, "precision must be one of"),
        ({"against": ("llmc=",)}, ValueError, "no contestant 'llmc='"),
        ({"against": ("llmc=/no/where",)}, OSError, "where is not a program"),
        (
            {"against": ("llmc=a",), "backend": "cuda"},
            ValueError,
            "train_gpt2 runs on the CPU",
        ),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"threads": -1}, ValueError, "threads must be at least 1, got -1"),
        ({"turn": float("nan")}, ValueError, "turn must be 0 to 3600 s, got"),
    ],
)
def test_who_cannot_race(settings, error, message):
    with pytest.raises(error, match=message):
        lineup(Settings(**settings))


def test_who_races(train_gpt2):
    against = "torch-bf16", "torch", f"llmc={train_gpt2}"
    specs = lineup(Settings(("fp32",), against, in_backward=True))
    ours = ["llmnb fp32", "llmnb fp32, in backward"]
    assert [*specs] == [*ours, "torch-bf16", "torch", "llm.c"]
    plain = {"kind": "torch", "device": "cpu", "compile": False}
    plain |= {"bf16": False, "tf32": False}
    assert specs["torch"] == plain
    assert specs["torch-bf16"] == plain | {"bf16": True}
    assert specs["llm.c"] == {"kind": "llmc", "path": str(train_gpt2)}
    against = "torch", "torch-compile-tf32"
    specs = lineup(Settings(("fp32", "tf32"), against, backend="cuda"))
    ours = [f"llmnb {x}" for x in ("fp32", "fp32, no graph", "tf32",
                                   "tf32, no graph")]  # fmt: skip
    assert [*specs] == [*ours, *against]
    assert [specs[x]["graph"] for x in ours] == [True, False] * 2
    there = plain | {"device": "cuda", "compile": True, "tf32": True}
    assert specs["torch-compile-tf32"] == there


def test_torch_is_told_where_and_how(monkeypatch):
    matmul, cudnn, has = (SimpleNamespace() for _ in "123")
    here = SimpleNamespace(matmul=matmul)
    backends = SimpleNamespace(cuda=here, cudnn=cudnn)
    torch = SimpleNamespace(cuda=has, backends=backends)
    monkeypatch.setitem(sys.modules, "torch", torch)
    has.is_available = lambda: True
    for tf32 in (True, False):
        assert peers.torch_on("cuda", tf32) is torch
        assert matmul.allow_tf32 is cudnn.allow_tf32 is tf32
    matmul.allow_tf32 = "untouched"
    assert peers.torch_on("cpu", True) is torch
    assert matmul.allow_tf32 == "untouched"
    has.is_available = lambda: False
    with pytest.raises(NotImplementedError, match="torch finds no GPU"):
        peers.torch_on("cuda")


def test_turns(monkeypatch):
    log = []
    monkeypatch.setattr("time.sleep", lambda pause: log.append(pause))
    turns = {x: lambda x=x: log.append(x) or len(log) // 2 for x in "abc"}
    found = race.take_turns(turns, range(4), 0.5)
    assert log[0::2] == [0.5] * 12
    assert "".join(log[1::2]) == "abc" + "bca" + "cab" + "abc"
    assert found == {"a": [1, 6, 8, 10], "b": [2, 4, 9, 11],
                     "c": [3, 5, 7, 12]}  # fmt: skip
    assert race.take_turns({}, range(4)) == {}


def test_ratios_are_taken_within_rounds():
    seconds = {
        "llmnb fp32": [1.0, 30.0, 4.0],
        "llmnb fp32, no graph": [2.0, 60.0, 8.0],
        "llmnb bf16": [1.0, 1.0, 1.0],
        "torch": [2.0, 10.0, 5.0],
    }
    rows = [{"name": k, "x": v} for k, v in seconds.items()]
    rows.append({"name": "llm.c", "unmeasured": "why"})
    assert [tuple(x.values()) for x in ratios(rows, "x")] == [
        ("llmnb fp32", "llmnb fp32, no graph", 0.5, 0.5, 0.5),
        ("llmnb fp32", "torch", 0.8, 0.5, 3.0),
        ("llmnb bf16", "llmnb fp32, no graph", 1 / 8, 1 / 60, 1 / 2),
        ("llmnb bf16", "torch", 0.2, 0.1, 0.5),
    ]
    assert ratios(rows[:1], "x") == ratios(rows) == []


@pytest.fixture
def made_up(monkeypatch, tmp_path):
    """Contestants that are made up: what they did, and when one fails.

    log: who starts, and what it finds compiled; who is closed. fails: from
    which of all its steps on, by name.
    """
    log, steps, fails = [], Counter(), {}

    class Contestant:
        def __init__(self, name, spec, settings, cache=tmp_path):
            self.name, kept = name, Path(cache, "kernel")
            log.append(f"start {name}{', warm' * kept.exists()}")
            if cache is not tmp_path:
                kept.touch()

        def step(self, turn=0):
            steps[self.name] += 1
            if steps[self.name] >= fails.get(self.name, 99):
                raise ChildProcessError(f"{self.name}: out of memory")
            return {"seconds": 1.0}

        def finish(self):
            return {"peak_bytes": 7}

        def close(self):
            log.append(f"close {self.name}")

    monkeypatch.setattr(race, "Contestant", Contestant)
    monkeypatch.setattr(race, "PAUSE", 0)
    return SimpleNamespace(log=log, fails=fails)


def test_starts(made_up):
    """Each start has a process of its own, the cold ones an empty cache."""
    also = f"llmc={sys.executable}"  # which has nothing to compile
    settings = FP32._replace(against=(also,))
    (contest,) = bench({}, settings, start=True)["contests"]
    (row,) = contest["contestants"]
    name, end = "llmnb fp32", "close llmnb fp32"
    once = [f"start {name}", end, f"start {name}, warm", end]
    assert made_up.log == once * race.STARTS
    assert row["name"] == name
    assert len(row["cold"]) == len(row["warm"]) == race.STARTS


@pytest.mark.parametrize("last", [1, 3])
def test_who_does_not_start_stops_nobody(last, made_up):
    """Whether it fails at its first step, or at one of a later start."""
    made_up.fails["a"] = last
    a, b = race.race_starts({"a": {}, "b": {}}, Settings())
    assert a == {"name": "a", "unmeasured": "a: out of memory"}
    assert len(b["cold"]) == len(b["warm"]) == race.STARTS


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_who_ends_in_the_race_stops_nobody(backend, made_up):
    """On a GPU each is alone in memory: one is closed before the next."""
    made_up.fails["a"] = 2
    settings = Settings(backend=backend)
    assert race.race({"a": {}, "b": {}}, 3, settings) == [
        {"name": "a", "unmeasured": "a: out of memory"},
        {"name": "b", "seconds": [1.0] * 3, "peak_bytes": 7},
    ]
    alone = ["start a", "close a", "start b", "close b"]
    assert (made_up.log == alone) is (backend == "cuda")


# the result


def test_rows(result):
    (contest,) = result["contests"]
    fp32, bf16 = contest["contestants"]
    why = "GPT2: precision 'bf16' needs the backend 'cpu' or 'cuda'"
    assert bf16 == {"name": "llmnb bf16", "unmeasured": why}
    assert fp32["name"] == "llmnb fp32" and len(fp32["seconds"]) == 3
    middle = sorted(fp32["seconds"])[1]
    assert fp32["step_seconds"] == middle
    assert fp32["tokens_per_second"] * middle == pytest.approx(2 * 16)
    flops = flops_per_token(CFG, 16) * 32
    assert fp32["flops_per_second"] * middle == pytest.approx(flops)
    assert abs(fp32["first_loss"] - math.log(131)) < 0.1
    assert fp32["arena_bytes"] > 16 * contest["parameters"]
    assert contest["parameters"] == parameter_count(CFG)
    assert contest["ratios"] == []
    assert json.loads(json.dumps(result)) == result


def test_layers(result):
    row = result["contests"][0]["contestants"][0]
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


def test_share_of_the_peak(monkeypatch):
    """The highest peak that any has measured is the peak of all."""
    peaks = {"llmnb_fp32": 1e6, "torch": 4e6}
    facts = {k: (3.0, {"fma_peak": x}) for k, x in peaks.items()}
    fake_race(monkeypatch, **facts, llm_c=(3.0, {"device_bytes": 7e6}))
    (contest,) = bench(TINY, RACE)["contests"]
    flops = flops_per_token(CFG, 16) * 32
    for row, memory in zip(
        contest["contestants"], (1e6, 1e6, 7e6), strict=True
    ):
        assert row["seconds"] == [2.0, 4.0, 3.0]  # and no round to warm up
        assert row["step_seconds"] == 3.0
        assert row["flops_per_second"] == flops / 3
        assert row["memory_bytes"] == memory
        assert shares(contest, row) == [flops / s / 4e6 for s in (2, 4, 3)]
    assert contest["ratios"][0]["ratio"] == 1.0
    fake_race(monkeypatch, llmnb_fp32=(3.0, {}))
    (contest,) = bench(TINY, RACE)["contests"]
    assert shares(contest, contest["contestants"][0]) == []


@pytest.mark.parametrize(
    ("precisions", "many"), [(("fp32",), 1), (("fp32", "fp64", "tf32"), 2)]
)
def test_all_of_ours_must_fit_together(precisions, many, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "check_room", lambda x, _: asked.append(x))
    fake_race(monkeypatch, llmnb_fp32=(3.0, {}))
    bench(TINY, RACE._replace(precisions=precisions))
    one = GPT2(CFG, 2, 16, "reference").memory.nbytes
    assert asked == [many * one]


def fake_result():
    """What a race writes, with times that can be checked by eye."""

    def row(name, seconds, **others):
        middle = seconds[len(seconds) // 2]
        facts = {"name": name, "seconds": seconds, "step_seconds": middle}
        facts["tokens_per_second"] = 32 / middle
        facts["flops_per_second"] = 8e8 / middle
        return facts | others

    times = {"matmul_forward": 0.1, "matmul_backward": 0.2, "(the rest)": 0.1}
    layers = [{"name": k, "calls": 4, "seconds": s} for k, s in times.items()]
    parts = {"forward": 0.1, "backward": 0.2, "update": 0.1}
    ours = row("llmnb fp32", [0.3, 0.4, 0.5], memory_bytes=123e6,
               layers=layers, parts=parts)  # fmt: skip
    peer = row("torch", [0.2, 0.2, 0.2], memory_bytes=None)
    bf16 = {"name": "llmnb bf16", "unmeasured": "not available on this CPU"}
    rows = [ours, bf16, peer]
    steps = {"name": "tiny", "kind": "step", "about": "a tiny model"}
    steps |= {"work": 8e8, "limit": 8e9, "ratios": ratios(rows)}
    cold = {"name": "llmnb fp32", "cold": [9.0], "warm": [1.5]}
    starts = {"name": "starts", "kind": "start", "about": "in seconds"}
    starts["contestants"] = [cold, bf16]
    facts = {"command": "llmnb bench", "date": "2026-01-02", "threads": 2}
    facts |= {"load": 0.25, "commit": "abc", "backend": "cpu"}
    facts["machine"] = "A processor, Linux, Python 3"
    return {**facts, "contests": [steps | {"contestants": rows}, starts]}


LINES = (
    "| | ms a step | tokens/s | GFLOP/s | memory, MB | of limit "
    "| llmnb fp32: ratio |",
    "| llmnb fp32 | 400.0 | 80 | 2.0 | 123 | 25% | |",
    "| torch | 200.0 | 160 | 4.0 | | 50% | 2.00 (1.50 to 2.50) |",
    "Not measured: llmnb bf16 (not available on this CPU).",
    "| llmnb fp32 | 9.00 | 1.50 |",
)


def lines_of(text):
    return [" ".join(x.split()) for x in text.split("\n")]


def cells_of(lines):
    return {x.strip() for line in lines for x in line.split("|")}


def test_report(result):
    text = report(result)
    assert result["machine"] + ", 1 threads" in text
    assert f"{parameter_count(CFG):,} parameters" in text
    for name in ("matmul_forward", "backward", "(the rest)", "tokens/s"):
        assert name in text
    lines = lines_of(report(fake_result()))
    for line in (
        *LINES,
        "load 0.25 before the race",
        "| matmul_backward | 4 | 200.00 | 50.0% |",
        "| update | | 100.00 | 25.0% |",
    ):
        assert line in lines


def test_figures():
    (ax,) = layers_figure(fake_result()).axes
    names = [x.get_text() for x in ax.get_yticklabels()]
    widths = {
        bars.get_label(): [round(x.get_width()) for x in bars]
        for bars in ax.containers
    }
    assert names == ["matmul", "(the rest)"]
    assert widths == {"forward": [100, 0], "backward": [200, 0],
                      "neither": [0, 100]}  # fmt: skip
    (ax,) = bars_figure(fake_result(), "step").axes
    assert [round(x.get_width()) for x in ax.patches] == [400, 200]
    reach = ax.collections[0].get_segments()[0]  # of the thin line
    assert reach[:, 0] == pytest.approx([300, 500])
    with pytest.raises(ValueError, match="there is nothing to draw"):
        layers_figure({"contests": []})


def test_named_configurations():
    for name, (cfg, batch_size, seq_len) in CONFIGS.items():
        if name != "small":
            assert parameter_count(cfg) == 124_475_904
            many = name.split("-")[1].split("x")
            assert seq_len == int(many[-1])
            assert batch_size * seq_len in (256, 1024, 16384)


# a GPU


def test_no_gpu(monkeypatch):
    """A machine without a GPU, whatever this one has."""
    no_gpu = "no GPU: says the test"
    monkeypatch.setattr(clock, "no_times", lambda: no_gpu)
    monkeypatch.setattr(subprocess, "Popen", None)  # no process is started
    monkeypatch.setattr(subprocess, "check_output", lambda *_, **__: "abc")
    settings = Settings(("fp32", "tf32"), ("torch",), backend="cuda")
    result = bench(TINY, settings, start=True)
    names = ["llmnb fp32", "llmnb fp32, no graph", "llmnb tf32",
             "llmnb tf32, no graph", "torch"]  # fmt: skip
    rows = [{"name": x, "unmeasured": no_gpu} for x in names]
    steps, starts = result["contests"]
    assert steps["contestants"] == rows == starts["contestants"]
    assert steps["ratios"] == [] and "gpu" not in result
    assert report(result).count(f"{'; '.join(names)} ({no_gpu})") == 2


class OnGpu(GPT2):
    """A model on the host that passes for one on a GPU, and takes notes."""

    log = []

    def __init__(self, cfg, B, T, backend="cuda", precision="fp32"):
        self.log.append((backend, precision))
        super().__init__(cfg, B, T, "reference", "fp32")
        self.precision = precision

    def clip_gradients(self, max_norm):
        self.log.append(("clip", max_norm))

    def step(self, *batch, step):
        self.log.append(("step", step))
        return super().step(*batch, step=step)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is made up; what waits for it is noted."""
    log = []
    real = SimpleNamespace(synchronize=lambda: log.append("synchronize"))
    monkeypatch.setitem(sys.modules, "numba.cuda", real)
    for place, name, what in (
        (OnGpu, "log", log),
        (numba, "cuda", real),
        (clock, "no_times", lambda: ""),
        (clock, "gpu_facts", lambda: {"name": "Nothing 1"}),
        (clock, "Clock", lambda: "clock"),
        (clock, "limits", lambda clock: {"fma_peak": 9.0}),
        (gpt2, "GPT2", OnGpu),
    ):
        monkeypatch.setattr(place, name, what, raising=False)
    return log


@pytest.mark.parametrize("graph", [True, False])
def test_our_contestant_on_a_gpu(gpu, graph):
    spec = {**SHAPE, **OURS, "backend": "cuda", "precision": "tf32"}
    step, facts = peers.llmnb_contestant(spec | {"graph": graph})
    assert gpu == [("cuda", "tf32")]
    model, batch = GPT2(CFG, 2, 16, "reference"), peers.random_batch(SHAPE)
    for number in (1, 2):
        loss = model.forward(*batch)
        model.backward()
        model.update(step=number)
        gpu.clear()
        assert step() == {"loss": loss}
        own = ("step", number) if graph else ("clip", math.inf)
        assert gpu == [own, "synchronize"]  # before the clock is read
    found = facts()
    assert found["threads"] and found["fma_peak"] == 9.0
    assert found["device_bytes"] == found["arena_bytes"] > 1e5
    assert ("apart" in found) is not graph
    if not graph:
        assert len(found["apart"]) == 3
        assert found["apart"][0]["calls"]["adamw_update"] == 1
        assert "backward" in found["apart"][0]["parts"]


def test_losses_are_those_of_the_cpu(gpu, monkeypatch):
    def found(specs, rounds, settings, *_):
        if rounds != 20:
            return []
        kinds = {k: f"{x['backend']} {x['precision']}"
                 for k, x in specs.items()}  # fmt: skip
        names = ["cpu fp32", "cuda fp32", "cuda bf16", "cuda tf32"]
        assert [*kinds] == [*kinds.values()] == names
        losses = [5.0, 3.0], [5.0, 2.5], None, [5.25, 3.0]
        rows = [{"loss": x} if x else {"unmeasured": "why"} for x in losses]
        return [{"name": x} | y for x, y in zip(names, rows, strict=True)]

    monkeypatch.setattr(module, "race", found)
    settings = Settings(("fp32", "bf16", "tf32"), backend="cuda")
    result = bench(TINY, settings)
    assert result["gpu"] == {"name": "Nothing 1"}
    _, contest = result["contests"]
    worst = {x["name"]: x.get("worst") for x in contest["contestants"]}
    assert worst == {"cpu fp32": 0.0, "cuda fp32": 0.5, "cuda bf16": None,
                     "cuda tf32": 0.25}  # fmt: skip
    lines = lines_of(report(result))
    assert "| cuda tf32 | 2.5e-01 |" in lines
    assert "Not measured: cuda bf16 (why)." in lines


@pytest.mark.parametrize(
    ("row", "error", "says"),
    [
        ({"loss": [math.inf]}, FloatingPointError, "the loss is inf"),
        ({"unmeasured": "ended"}, ChildProcessError, "ended"),
    ],
)
def test_losses_with_none_to_compare_with(row, error, says, monkeypatch):
    rows = [{"name": "cpu fp32", **row}, {"name": "cuda", "loss": [1.0]}]
    monkeypatch.setattr(module, "race", lambda *_: rows)
    with pytest.raises(error, match=f"cpu fp32: {says}"):
        module.losses_contest(("fp32",), Settings(backend="cuda"))


def test_layers_that_were_timed_apart(monkeypatch):
    """On a GPU the layers come from steps of their own."""
    parts = {"forward": 2.0, "backward": 2.0, "update": 2.0}
    apart = {"loss": 4.0, "parts": parts, "layers": {"f": 5.0}}
    facts = {"apart": [apart | {"calls": {"f": 3}}] * 3}
    fake_race(monkeypatch, llmnb_fp32=(3.0, facts))
    (row,) = bench(TINY, RACE)["contests"][0]["contestants"]
    assert "apart" not in row
    assert row["step_seconds"] == 3.0 and row["first_loss"] == 3.0
    assert row["parts"] == parts
    assert row["layers"] == [
        {"name": "f", "calls": 3, "seconds": 5.0},
        {"name": "(the rest)", "calls": 1, "seconds": 1.0},
    ]


# the page of results


def test_the_page_is_what_its_files_say():
    found = results_page.results()
    assert found, "there are no results"
    text = (ROOT / "book" / "results.md").read_text("utf-8")
    assert text == results_page.page(found), "run book/_ext/results_page.py"
    for name, _, result in results_page.figures(found):
        drawn = (ROOT / "book" / "_static" / name).read_text("utf-8")
        assert f"<!-- {results_page.digest(result)} -->" in drawn, name
    for path in (ROOT / "book" / "results").glob("*.json"):
        result = json.loads(path.read_text("utf-8"))
        assert "/" not in result["command"], "a folder of some machine"


def test_a_page_of_results():
    found = {"one": fake_result()}
    text = results_page.page(found)
    assert "## A processor, Linux, Python 3, 2 threads" in text
    assert "](_static/results-one.svg)" in text
    # the page turns the tables: a line a number, a column a contestant
    assert "| ms a step | 400.0 | 200.0 |" in lines_of(text)
    assert cells_of(LINES) <= cells_of(lines_of(text))
    names = [name for name, _, _ in results_page.figures(found)]
    assert names == ["results-one.svg", "results-one-layers.svg"]
    one, other = fake_result(), fake_result()
    other["contests"][0]["contestants"][0]["step_seconds"] = 0.1
    assert results_page.digest(one) != results_page.digest(other)
    text = json.dumps(one).encode()
    assert results_page.digest(one) == hashlib.sha256(text).hexdigest()


def test_peers_runs_without_llmnb():
    """The file that torch's Python runs imports the standard library."""
    lines = Path(peers.__file__).read_text("utf-8").split("\n")
    top = {x.split()[1] for x in lines if x.startswith(("import ", "from "))}
    assert top <= set(sys.stdlib_module_names)


# writers


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
    answer = peers._pace([1.0, 5.0, 6.0, 8.0, 11.0], [7, 8, 9, 10])
    assert (answer["first_seconds"], answer["token_seconds"]) == (4.0, 2.0)


TWO_TEXTS = Settings(steps=2, threads=1, turn=0)


@pytest.mark.parametrize("last", [2, 3])
def test_a_race_of_writers(last, monkeypatch):
    """What is made of the answers, and that the first text is not measured."""

    def found(specs, rounds, settings):
        assert rounds == 3 and settings == TWO_TEXTS
        kinds = {k: x["kind"] for k, x in specs.items()}
        assert kinds == {"llmnb": "llmnb-decoder",
                         "transformers": "transformers"}  # fmt: skip
        row = {"first_seconds": [9.0, 1.0, 2.0], "seconds": [9.0] * 3}
        row["token_seconds"] = [9.0, 0.1, 0.2]
        tokens = [[1, 2], [1, 2], [1, 2]], [[1, 5], [1, 2], [1, last]]
        return [
            row | {"name": k, "tokens": x}
            for k, x in zip(specs, tokens, strict=True)
        ]

    monkeypatch.setattr(module, "race", found)
    result = module.bench_writers(CFG, 5, 6, TWO_TEXTS)
    (contest,) = result["contests"]
    assert contest["same_tokens"] is (last == 2)
    for row in contest["contestants"]:
        assert row["first_seconds"] == [1.0, 2.0]
        assert row["tokens_per_second"] == pytest.approx(1 / 0.15)
    assert [x["of"] for x in contest["ratios"]] == ["first token",
                                                    "later token"]  # fmt: skip
    json.dumps(result)
    text = report(result)
    words = "the same" if last == 2 else "OTHER"
    said = f"5 tokens and 6 more, always the likeliest; both wrote {words}"
    assert said in text
    lines, same = lines_of(text), "1.00 (1.00 to 1.00)"
    row = "| 1,500.0 | 150.00 | 6.7 |"
    assert f"| llmnb {row} | |" in lines
    assert f"| transformers {row} {same} | {same} |" in lines


def test_writers_race(torch_python):
    how = TWO_TEXTS._replace(torch_python=torch_python)
    (contest,) = module.bench_writers(CFG, 5, 6, how)["contests"]
    assert contest["same_tokens"]
    for row in contest["contestants"]:
        assert len(row["first_seconds"]) == len(row["token_seconds"]) == 2
        assert row["threads"] == 1


def test_writers_where_there_are_no_transformers(tmp_path):
    fake = tmp_path / "transformers.py"
    fake.write_text("raise ImportError(\"No module named 'transformers'\")")
    (tmp_path / "torch.py").write_text("")
    python, run = tmp_path / "python", f'exec "{sys.executable}" "$@"'
    python.write_text(f"#!/bin/sh\nPYTHONPATH={tmp_path} {run}\n")
    python.chmod(0o755)
    how = TWO_TEXTS._replace(torch_python=str(python))
    with pytest.raises(ChildProcessError, match="No module named 'transf"):
        module.bench_writers(CFG, 5, 6, how)


@pytest.mark.parametrize(
    "measure",
    [
        lambda settings: bench(TINY, settings),
        lambda settings: module.bench_writers(CFG, 5, 6, settings),
        lambda settings: bench_group(ALONE, TINY, settings),
    ],
)
def test_a_mistake_is_found_before_anyone_starts(measure, monkeypatch):
    monkeypatch.delattr(module, "race")
    for name in ("steps", "threads"):
        says = f"{name} must be at least 1, got 0"
        with pytest.raises(ValueError, match=says):
            measure(Settings()._replace(**{name: 0}))


@pytest.mark.parametrize("sizes", [(0, 4), (4, 1), (10, 7)])
def test_writers_that_do_not_fit(sizes):
    with pytest.raises(ValueError, match="together at most 16"):
        module.bench_writers(CFG, *sizes)
