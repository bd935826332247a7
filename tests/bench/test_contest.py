"""The contest of kernels: right before fast, and no time without a GPU."""

import importlib
import json
import pkgutil
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numba
import numpy as np
import pytest

import llmnb.cuda
from llmnb.bench import clock
from llmnb.bench import contest as module
from llmnb.bench.contest import (
    compiled,
    contest,
    contest_report,
    count,
    judge,
    ladders_figure,
    speeds,
    timed,
)
from llmnb.bench.ladders import (
    GPT2_124M,
    LADDERS,
    TINY,
    Ladder,
    ladder_named,
    version_name,
)
from llmnb.cli.__main__ import main
from llmnb.gpu.launch import missing, simulated, to_host
from llmnb.gpu.ptx import compile_kernel, no_compiler
from llmnb.gpu.simulator import watch

ROOT = Path(__file__).parents[2]
NAMES = [x.layer for x in LADDERS]


# the ladders


@pytest.mark.parametrize("name", NAMES)
def test_the_best_version_is_right(name):
    ladder = ladder_named(name)
    best = len(ladder.versions)
    verdict = judge(ladder, best, TINY, simulated)
    assert verdict.get("error", 1) < ladder.tolerance, verdict


def test_every_tuple_of_versions_has_a_ladder():
    """A layer that is written must be measured: add it to LADDERS."""
    known = {(x.module, x.named or x.layer.upper()) for x in LADDERS}
    for info in pkgutil.iter_modules(llmnb.cuda.__path__):
        found = importlib.import_module(f"llmnb.cuda.{info.name}")
        for name, value in vars(found).items():
            public = name.isupper() and name[0] != "_"
            if public and isinstance(value, tuple) and callable(value[0]):
                assert (info.name, name) in known


@pytest.mark.parametrize("name", NAMES)
def test_torch_does_the_same(name):
    """PyTorch's operation, on a CPU, where V fills the padded rows."""
    torch = pytest.importorskip("torch")
    ladder = ladder_named(name)
    if ladder.torch is None:
        pytest.skip("PyTorch has no such operation")
    arguments = ladder.draw(TINY._replace(V=128))
    for key in ladder.changes:
        if key.startswith("d") and name != "residual_backward":
            arguments[key][...] = 0  # PyTorch writes where we add
    want = ladder.expected(arguments)
    tensors = {
        k: torch.from_numpy(v.copy()) if isinstance(v, np.ndarray) else v
        for k, v in arguments.items()
    }
    got = ladder.torch(torch, SimpleNamespace(**tensors))()
    names = ladder.writes + ladder.changes
    assert len(got) >= 1 or name == "adamw_apply"
    for key, x in zip(names, got, strict=False):
        x = x.detach().numpy().reshape(want[key].shape)
        np.testing.assert_allclose(x, want[key], atol=3e-5, err_msg=key)


def test_least_bytes():
    sizes = TINY
    rows, C = sizes.B * sizes.T, sizes.C
    ladder = ladder_named("layernorm_forward")
    least = ladder.least_bytes(ladder.draw(sizes))
    assert least == 4 * (2 * rows * C + 2 * rows + 2 * C)
    ladder = ladder_named("gelu_backward")  # dinp is read and written
    assert ladder.least_bytes(ladder.draw(sizes)) == 4 * 4 * rows * 4 * C
    ladder = ladder_named("encoder_forward")
    arguments = ladder.draw(sizes)
    asked = len(set(arguments["inp"].flat))
    least = 4 * (rows * C + sizes.T * C + rows + asked * C)
    assert ladder.least_bytes(arguments) == least


def test_flops():
    s = GPT2_124M
    forward = ladder_named("matmul_forward").flops(s)
    assert forward == 2 * s.B * s.T * s.C * 4 * s.C
    assert ladder_named("matmul_backward").flops(s) == 2 * forward
    pairs = s.B * s.T * (s.T + 1) // 2
    assert ladder_named("attention_forward").flops(s) == 2 * 2 * pairs * s.C
    assert ladder_named("attention_backward").flops(s) == 5 * 2 * pairs * s.C


# right before fast


class Spoilt(Ladder):
    """A ladder whose layer ends with a mistake."""

    def function(self, version):
        right = super().function(version)

        def layer(out, inp):
            right(out, inp)
            self.mistake(out._array, inp._array)

        return layer


@pytest.mark.parametrize(
    ("array", "value", "message"),
    [
        ("out", 9.0, r"out is \de[+-]\d+ from the reference"),
        ("out", np.nan, "out is not finite everywhere"),
        ("inp", 9.0, "inp was changed"),
    ],
)
def test_a_wrong_version_is_found(array, value, message, monkeypatch):
    def mistake(self, out, inp):
        {"out": out, "inp": inp}[array][0, 0, 3] = value

    monkeypatch.setattr(Spoilt, "mistake", mistake, raising=False)
    ladder = Spoilt(*ladder_named("gelu_forward"))
    verdict = judge(ladder, 1, TINY, simulated)
    assert set(verdict) == {"wrong"}
    assert re.fullmatch(message, verdict["wrong"])
    found, _ = count(ladder, 1, TINY)
    assert re.fullmatch(message, found["wrong"])


def test_fewer_rows_are_compared():
    ladder = ladder_named("crossentropy_softmax_forward")
    assert ladder.checked == 1
    seen = []
    spy = ladder._replace(
        arguments=lambda s, draw: seen.append(s) or ladder.arguments(s, draw)
    )
    assert "error" in judge(spy, 1, TINY, simulated)
    assert [s.B for s in seen] == [1]


def test_the_library_takes_turns(monkeypatch):
    """cuBLASLt is timed where it starts, on the same arrays."""
    seen = []

    def multiply(out, inp, weight, bias):
        seen.append(out.shape)

    ladder = ladder_named("matmul_forward")._replace(
        library=lambda: {"cuBLASLt": multiply}
    )
    monkeypatch.setattr(module, "to_device", simulated)
    monkeypatch.setattr(module, "in_turns", lambda clock, runs: runs)
    for why, names in (("", [2, "cuBLASLt"]), ("no library", [2])):
        monkeypatch.setattr(module, "no_cublas", lambda why=why: why)
        _, runs = timed(ladder, [2], TINY, None)
        assert [*runs] == names
    _, runs = timed(ladder, [], TINY, None)
    assert runs == {}
    monkeypatch.setattr(module, "no_cublas", lambda: "")
    _, runs = timed(ladder, [], TINY, None)
    runs["cuBLASLt"]()
    assert seen == [(2, 5, 128)]


def test_torch_takes_turns(monkeypatch):
    torch = pytest.importorskip("torch")
    ladder = ladder_named("gelu_forward")
    monkeypatch.setattr(module, "to_device", simulated)
    monkeypatch.setattr(module, "in_turns", lambda clock, runs: runs)

    class Here:
        """torch, for which a simulated array is on the GPU."""

        as_tensor = staticmethod(
            lambda x, device: torch.from_numpy(np.array(x))
        )

    _, runs = timed(ladder, [1], TINY, None, Here)
    assert [*runs] == [1, "torch"]
    (out,) = runs["torch"]()
    assert out.shape == (2, 5, 128)


# without a GPU


@pytest.fixture(scope="module")
def result():
    with pytest.MonkeyPatch.context() as patch:
        why = "no GPU: this test says so"
        patch.setattr(module, "no_times", lambda: why)
        names = ["layernorm_forward", "encoder_forward"]
        return contest(names, counted=TINY)


def test_no_time_without_a_gpu(result):
    why = {"unmeasured": "no GPU: this test says so"}
    assert result["gpu"] == result["limits"] == why
    assert [x["layer"] for x in result["ladders"]] == [
        "layernorm_forward",
        "encoder_forward",
    ]
    for found in result["ladders"]:
        assert found["peers"] == {"torch": why}
        for row in found["versions"]:
            assert row["time"] == why
            assert "judged" not in row
            assert row["counted"]["sectors"] > 0
            assert "wrong" not in row["counted"]
    assert [*speeds(result)] == []
    with pytest.raises(ValueError, match="nothing to draw"):
        ladders_figure(result)
    text = contest_report(result)
    assert "GPU      none: no GPU: this test says so" in text
    assert text.count("no GPU: this test says so") == 3
    assert "TFLOP/s" not in text and " us " not in text
    assert json.loads(json.dumps(result)) == result


def test_compiled_facts(result):
    if no_compiler():
        pytest.skip(no_compiler())
    row = result["ladders"][0]["versions"][1]  # the one that is used
    (kernel,) = row["compiled"]
    for cc in ("sm_80", "sm_90"):
        facts = kernel[cc]
        assert 0 < facts["registers"] < 256
        assert facts["vector_loads"] > 0 and facts["vector_stores"] > 0
        assert facts["float64"] == facts["spilled"] == 0


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(module, "no_compiler", lambda: "there is none")
    found = contest(["layernorm_forward"], counted=TINY)
    for row in found["ladders"][0]["versions"]:
        assert row["compiled"] == {"unmeasured": "there is none"}
    contest_report(found)


def test_one_kernel_is_compiled_once():
    if no_compiler():
        pytest.skip(no_compiler())
    _, launches = count(ladder_named("gelu_forward"), 1, TINY)
    rows = compiled(launches * 3)
    assert len(rows) == 1 and set(rows[0]) == {"name", "sm_80", "sm_90"}


# the clock


def test_the_kernels_that_measure():
    if no_compiler():
        pytest.skip(no_compiler())
    flat = ("float32", 1)
    number = ("int64", 0)
    chains = compile_kernel(clock._multiply_add, (flat, number))
    each = clock._CHAINS * clock._UNROLLED
    assert chains.ptx.count("fma.rn") == each
    assert chains.stack == chains.spilled == chains.float64 == 0
    for kernel in (clock._copy, clock._sweep):
        made = compile_kernel(kernel, (flat, flat))
        assert made.vector_loads and made.stack == made.float64 == 0


def test_a_copy_moves_the_least():
    here = simulated(np.arange(1024, dtype=np.float32))
    there = simulated(np.zeros(1024, np.float32))
    with watch() as seen:
        clock._copy[2, 64](there, here)
    np.testing.assert_array_equal(to_host(there), to_host(here))
    assert seen.sectors == 2 * 1024 * 4 // 32


class Gpu:
    """A GPU made up: a queue of work, each of which takes its time."""

    MULTIPROCESSOR_COUNT, L2_CACHE_SIZE = 2, 1 << 20

    def __init__(self):
        self.log, self.now = [], 0.0

    def work(self, name, seconds):
        self.log.append(name)
        self.now += seconds

    def event(self):
        gpu = self

        class Mark:
            def record(self):
                gpu.log.append("mark")
                self.at = gpu.now

            def synchronize(self):
                gpu.log.append("wait")

            def elapsed_time(self, other):
                return 1e3 * (other.at - self.at)

        return Mark()


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    real = SimpleNamespace(
        get_current_device=lambda: gpu,
        event=gpu.event,
        synchronize=lambda: gpu.log.append("synchronize"),
    )
    monkeypatch.setattr(numba, "cuda", real, raising=False)
    monkeypatch.setitem(sys.modules, "numba.cuda", real)
    monkeypatch.setattr(clock, "to_device", simulated)
    sweep = {(16, 256): lambda *_: gpu.work("sweep", 1e-4)}
    monkeypatch.setattr(clock, "_sweep", sweep)
    return gpu


def test_the_clock_sweeps_before_the_first_mark(gpu):
    timer = clock.Clock()
    gpu.log.clear()
    spent = timer.seconds(lambda: gpu.work("run", 3e-5), launching=2.1e-4)
    assert spent == pytest.approx(3e-5)
    assert gpu.log == ["sweep"] * 5 + ["mark", "run", "mark", "wait"]
    gpu.log.clear()
    timer.seconds(lambda: gpu.work("run", 3e-5), launching=0)
    assert gpu.log[:2] == ["sweep", "mark"]


def test_versions_take_turns(gpu):
    timer = clock.Clock()
    runs = {x: lambda x=x: gpu.work(x, ord(x) * 1e-6) for x in "ab"}
    found = clock.in_turns(timer, runs, budget=1e-3)
    assert {k: len(v) for k, v in found.items()} == {"a": 5, "b": 5}
    assert found["a"] == pytest.approx([97e-6] * 5)
    assert "".join(x for x in gpu.log if x in "ab")[-10:] == "ab" * 5
    assert len(clock.in_turns(timer, runs, budget=99.0)["a"]) == 50


def test_the_contest_on_a_gpu_that_is_made_up(monkeypatch):
    """All that follows the clock: which rows are timed, and their shares."""
    right = ladder_named("layernorm_forward")
    monkeypatch.setattr(module, "no_times", lambda: "")
    monkeypatch.setattr(module, "Clock", lambda: "clock")
    monkeypatch.setattr(module, "gpu_facts", lambda: {"name": "Nothing 1"})
    most = {"fma_peak": 1e12, "copy_bytes": 1e9}
    monkeypatch.setattr(module, "limits", lambda clock: most)
    monkeypatch.setattr(module, "to_device", simulated)
    monkeypatch.setattr(module, "_no_torch", lambda: (None, "no torch here"))
    verdicts = iter([{"wrong": "out is 9 off"}, {"error": 1e-7}])
    monkeypatch.setattr(module, "judge", lambda *_: next(verdicts))

    def turns(clock, runs):
        assert clock == "clock" and [*runs] == [2]
        runs[2]()  # it can be launched
        return {2: [3e-6, 1e-6, 2e-6]}

    monkeypatch.setattr(module, "in_turns", turns)
    found = contest(["layernorm_forward"], sizes=TINY, counted=TINY)
    one, two = found["ladders"][0]["versions"]
    assert one["time"] == {"unmeasured": "wrong: out is 9 off"}
    assert two["time"] == {"seconds": [3e-6, 1e-6, 2e-6]}
    peers = {"torch": {"unmeasured": "no torch here"}}
    assert found["ladders"][0]["peers"] == peers
    (speed,) = speeds(found)
    least = right.least_bytes(right.draw(TINY))
    assert speed["rate"] == pytest.approx(least / 2e-6)
    assert speed["share"] == pytest.approx(least / 2e-6 / 1e9)
    text = contest_report(found)
    assert "2.0 us (1.0 to 3.0)" in text and "wrong: out is 9 off" in text
    json.dumps(found)


# what is drawn, from numbers that are made up


def fake_times(found):
    """A result with times that can be checked by eye; for tests alone."""
    found = json.loads(json.dumps(found))
    found["gpu"] = {"name": "A GPU that is made up"}
    found["limits"] = {"fma_peak": 1e12, "copy_bytes": 1e9}
    for i, ladder in enumerate(found["ladders"]):
        ladder |= {"sizes": {}, "least_bytes": 1000 * (1 + i)}
        for row in ladder["versions"]:
            row["time"] = {"seconds": [4e-6 / row["version"]] * 3}
        ladder["peers"]["torch"] = {"seconds": [1e-6]}
    return found


def test_the_figure(result):
    first, second = ladders_figure(fake_times(result)).axes
    widths = [round(x.get_width()) for x in first.patches]
    assert widths == [25, 50, 100]  # 250, 500 and 1000 MB/s of 1 GB/s
    names = [x.get_text() for x in first.get_yticklabels()]
    assert names == ["version 1", "version 2", "torch"]
    assert [round(x.get_width()) for x in second.patches] == [50, 100, 200]


def as_written(found):
    facts = {"command": "llmnb bench --backend cuda --kernels"}
    facts |= {"date": "2026-01-02", "commit": "abc", "configs": []}
    return facts | found


def test_the_page_without_times(results_page, result):
    text = results_page.page({"gpu": as_written(result)})
    assert "**No time has been measured on a GPU yet.**" in text
    assert "    llmnb bench --backend cuda --kernels" in text
    assert text.count("| not measured |") == 4
    assert "| `layernorm_forward` | launches |" in text
    assert [*results_page.figures({"gpu": as_written(result)})] == []


def test_the_page_with_times(results_page, result):
    found = {"gpu": as_written(fake_times(result))}
    text = results_page.page(found)
    assert "## On a GPU: A GPU that is made up" in text
    assert "No time" not in text and "not measured" not in text
    assert "| 4.0 | 25% |" in text and "| 1.0 | 100% |" in text
    names = [name for name, _, _ in results_page.figures(found)]
    assert names == ["results-gpu-ladders.png"]


# the command


def test_the_command(monkeypatch, capsys, tmp_path):
    """llmnb bench --kernels: the whole way, without a GPU."""
    why = "no GPU: this test says so"
    for place in (module, clock):
        monkeypatch.setattr(place, "no_times", lambda: why)
    path = tmp_path / "gpu.json"
    asked = ["bench", "--backend", "cuda", "--kernels", "encoder_forward"]
    monkeypatch.setattr(sys, "argv", ["llmnb", *asked])
    assert not main([*asked, "--json", str(path)])
    text = capsys.readouterr().out
    assert "encoder_forward" in text and why in text
    found = json.loads(path.read_text("utf-8"))
    assert found["configs"] == [] and "losses" not in found
    assert [x["layer"] for x in found["ladders"]] == ["encoder_forward"]
    assert found["gpu"] == {"unmeasured": why}


# what is committed


def test_no_number_stands_for_a_time():
    """A file from a machine without a GPU holds no time of one."""
    for path in (ROOT / "book" / "results").glob("*.json"):
        found = json.loads(path.read_text("utf-8"))
        if "unmeasured" not in found.get("gpu", {}):
            continue
        for config in found["configs"]:
            for row in config["contestants"]:
                assert set(row) == {"name", "unmeasured"}
        assert set(found["losses"]) == {"unmeasured"}
        assert found["ladders"], "no kernel is named"
        for ladder in found["ladders"]:
            for peer in ladder["peers"].values():
                assert set(peer) == {"unmeasured"}
            for row in ladder["versions"]:
                assert set(row["time"]) == {"unmeasured"}
                assert "wrong" not in row["counted"]


def test_the_gpu_file_names_every_version():
    found = json.loads(
        (ROOT / "book" / "results" / "5-gpu.json").read_text("utf-8")
    )
    rows = {
        x["layer"]: [row["name"] for row in x["versions"]]
        for x in found["ladders"]
    }
    for ladder in LADDERS:
        names = [version_name(x) for x in ladder.versions]
        assert rows[ladder.layer] == names, "measure once more"
        first = found["ladders"][LADDERS.index(ladder)]["versions"][0]
        assert first["counted"]["sizes"] == ladder.counted._asdict()


def test_this_machine():
    assert clock.no_times() == (f"no GPU: {missing()}" if missing() else "")
