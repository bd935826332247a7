"""The contest of kernels: right before fast, and no time without a GPU."""

import importlib
import json
import pkgutil
import re
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numba
import numpy as np
import pytest
import results_page

import llmnb.bench
from llmnb.bench import clock, ladders
from llmnb.bench import contest as module
from llmnb.bench.contest import count, in_turns, judge, kernel_contests
from llmnb.bench.ladders import LADDERS, TINY, Ladder, ladder_named
from llmnb.bench.report import bars_figure, report
from llmnb.cli.__main__ import main
from llmnb.gpu.launch import simulated, to_host
from llmnb.gpu.ptx import compile_kernel, no_compiler

RESULTS = Path(__file__).parents[2] / "book" / "results"
NAMES = [x.layer for x in LADDERS]
WHY = "no GPU: this test says so"
compiles = pytest.mark.skipif(bool(no_compiler()), reason=no_compiler() or "")


# the ladders


@pytest.mark.parametrize("name", NAMES)
def test_the_best_version_is_right(name):
    ladder = ladder_named(name)
    best = len(ladder.versions)
    assert judge(ladder, best, TINY, simulated) == ""


def test_every_tuple_of_plainer_versions_has_a_ladder():
    """A version that is written must be measured: add it to LADDERS."""
    known, seen = {f for x in LADDERS for f in x.versions}, 0
    for info in pkgutil.iter_modules(llmnb.bench.__path__, "llmnb.bench."):
        if "rungs_" not in info.name:
            continue
        rungs = importlib.import_module(info.name)
        for value in (getattr(rungs, x) for x in rungs.__all__):
            if isinstance(value, tuple):
                assert known.issuperset(value), info.name
                seen += len(value)
    assert seen >= 12


def test_what_is_only_written_is_drawn_as_nothing():
    for ladder in LADDERS:
        drawn = ladder.draw(TINY)
        for name in ladder.results:
            empty = np.isnan(drawn[name]).all()
            assert empty != ladder.changes, (ladder.layer, name)
        if "logits" in drawn:  # nobody may read what is only padding
            padding = np.isnan(drawn["logits"])
            assert padding[..., TINY.V :].all()
            assert not padding[..., : TINY.V].any()


def test_least_bytes():
    rows, T, C = TINY.B * TINY.T, TINY.T, TINY.C
    for name, (floats, tables) in {
        "layernorm_forward": (2 * rows * C + 2 * rows + 2 * C, 0),
        "gelu_backward": (4 * rows * 4 * C, 0),  # dinp is read and written
        "encoder_forward": (rows * C + T * C + rows, 1),
        "encoder_backward": (rows * C + 2 * T * C + rows, 2),
    }.items():
        ladder = ladder_named(name)
        drawn = ladder.draw(TINY)
        asked = len({*drawn["inp"].flat})  # rows of the tables
        least = 4 * (floats + tables * asked * C)
        assert ladder.least_bytes(drawn) == least, name


def test_flops():
    s = ladders.GPT2_124M
    layers = {x.layer: x.flops(s) for x in LADDERS if x.flops}
    forward, pairs = 8 * s.B * s.T * s.C**2, s.B * s.T * (s.T + 1) // 2
    assert layers == {
        "matmul_forward": forward,
        "matmul_backward": 2 * forward,
        "attention_forward": 2 * 2 * pairs * s.C,
        "attention_backward": 5 * 2 * pairs * s.C,
    }


# right before fast


class Spoilt(Ladder):
    """A ladder whose layer leaves a wrong number in an array."""

    mistake = "out", 0.0

    def function(self, version):
        right = super().function(version)

        def layer(out, inp):
            right(out, inp)
            array, value = self.mistake
            {"out": out, "inp": inp}[array]._array[0, 0, 3] = value

        return layer


@pytest.mark.parametrize(
    ("array", "value", "message"),
    [
        ("out", 9.0, r"out is \de[+-]\d+ from float64"),
        ("out", np.nan, "out is not finite everywhere"),
        ("inp", 9.0, "inp was changed"),
    ],
)
def test_a_wrong_version_is_found(array, value, message, monkeypatch):
    ladder = Spoilt(*ladder_named("gelu_forward"))
    monkeypatch.setattr(Spoilt, "mistake", (array, value))
    assert re.fullmatch(message, judge(ladder, 1, TINY, simulated))
    found, _ = count(ladder, 1, TINY)
    assert re.fullmatch(message, found["wrong"])


def test_fewer_rows_are_compared():
    ladder, seen = ladder_named("crossentropy_softmax_forward"), []
    assert ladder.checked == 1

    def settle(a, module):
        seen.append(len(a.logits))
        ladder.settle(a, module)

    assert judge(ladder._replace(settle=settle), 1, TINY, simulated) == ""
    assert seen == [1]


@pytest.mark.parametrize("library", ["", "no library"])
@pytest.mark.parametrize("why", ["", "no GPU for torch"])
def test_the_library_and_torch_take_turns(why, library, monkeypatch):
    """Where they start, on the same arrays; who fails costs its own row."""
    seen = []
    ladder = ladder_named("matmul_forward")._replace(
        library=lambda: {
            "cuBLASLt": lambda *a: seen.append(a[0].shape),
            "TF32": fail,
        },
        torch=lambda torch, a: lambda: seen.append(a.out),
    )
    torch = SimpleNamespace(as_tensor=lambda x, device: (x.shape, device))
    monkeypatch.setattr(module, "no_cublas", lambda: library)
    monkeypatch.setattr(module, "torch_on", torch_or_none(torch, why))
    there = {
        k: simulated(x) if np.ndim(x) else x
        for k, x in ladder.draw(TINY).items()
    }
    runs, found = module._rivals(ladder, there)
    reasons = {k: x["unmeasured"] for k, x in found.items()}
    asked = {"cuBLASLt": library, "torch": why}
    asked |= {} if library else {"TF32": "no kernel"}
    assert reasons == {k: x for k, x in asked.items() if x}
    assert [*runs] == [k for k, x in asked.items() if not x]
    seen.clear()  # each has been tried
    for run in runs.values():
        run()
    shapes = [(2, 5, 128)] * (not library)
    assert seen == shapes + [((2, 5, 128), "cuda")] * (not why)


def fail(*arguments):
    raise RuntimeError("\nno kernel\nfor this shape")


def torch_or_none(torch, why=""):
    """A function that gives torch, or raises where there is none."""

    def found(device):
        assert device == "cuda"
        if why:
            raise NotImplementedError(why)
        return torch

    return found


# without a GPU


def facts(contests, backend="cuda"):
    """What a command writes of some contests."""
    facts = {"command": "llmnb bench --backend cuda --kernels", "load": 0.5}
    facts |= {"date": "2026-01-02", "commit": "abc", "machine": "m"}
    return {**facts, "threads": 1, "backend": backend, "contests": contests}


@pytest.fixture(scope="module")
def result():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "no_times", lambda: WHY)
        return kernel_contests(
            ["layernorm_forward", "encoder_forward"], counted=TINY
        )


def test_no_time_without_a_gpu(result):
    assert [x["name"] for x in result] == ["layernorm_forward",
                                           "encoder_forward"]  # fmt: skip
    for found in result:
        assert found["limit"] == 0
        assert len(found["contestants"]) == 2  # and no rival
        for row in found["contestants"]:
            assert row["unmeasured"] == WHY
            assert "seconds" not in row and "wrong" not in row
            assert row["moved"] == 32 * row["sectors"] / row["least_bytes"]
    with pytest.raises(ValueError, match="nothing to draw"):
        bars_figure({"contests": result}, "kernel")
    text = report(facts(result))
    assert text.count(WHY) == 2 and "GPU " not in text
    assert json.loads(json.dumps(result)) == result


@compiles
def test_compiled_facts(result):
    row = result[0]["contestants"][1]  # the one that is used
    (kernel,) = row["compiled"]
    for cc in ("sm_80", "sm_90"):
        facts = kernel[cc]
        assert 0 < facts["registers"] < 256
        assert facts["vector_loads"] > 0 and facts["vector_stores"] > 0
        assert facts["float64"] == facts["spilled"] == 0
    _, launches = count(ladder_named("gelu_forward"), 1, TINY)
    rows = module.compiled(launches * 3)  # one kernel is compiled once
    assert len(rows) == 1 and set(rows[0]) == {"name", "sm_80", "sm_90"}


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(module, "no_compiler", lambda: "there is none")
    found = kernel_contests(["layernorm_forward"], counted=TINY)
    for row in found[0]["contestants"]:
        assert "compiled" not in row and row["sectors"] > 0
    report(facts(found))


# the clock


@compiles
def test_the_kernels_that_measure():
    flat, number = ("float32", 1), ("int64", 0)
    chains = compile_kernel(clock._multiply_add, (flat, number))
    each = clock._CHAINS * clock._UNROLLED
    assert chains.ptx.count("fma.rn") == each
    assert chains.stack == chains.spilled == chains.float64 == 0
    for kernel in (clock._copy, clock._sweep):
        made = compile_kernel(kernel, (flat, flat))
        assert made.vector_loads and made.stack == made.float64 == 0


class Gpu:
    """A GPU made up: a queue of work, each of which takes its time.

    now: until when there is something in the queue; host: the host's time.
    """

    MULTIPROCESSOR_COUNT, L2_CACHE_SIZE = 2, 1 << 20

    def __init__(self):
        self.log, self.now, self.host, self.launch = [], 0.0, 0.0, 0.0

    def work(self, name, seconds, launch=None):
        self.log.append(name)
        self.host += self.launch if launch is None else launch
        self.now = max(self.now, self.host) + seconds

    def synchronize(self):
        self.log.append("synchronize")
        self.host = max(self.host, self.now)

    def event(self):
        mark = SimpleNamespace(synchronize=lambda: self.log.append("wait"))

        def record():
            self.log.append("mark")
            mark.at = self.now = max(self.now, self.host)

        mark.record = record
        mark.elapsed_time = lambda other: 1e3 * (other.at - mark.at)
        return mark


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    real = SimpleNamespace(
        get_current_device=lambda: gpu,
        event=gpu.event,
        synchronize=gpu.synchronize,
    )
    monkeypatch.setattr("time.perf_counter", lambda: gpu.host)
    monkeypatch.setattr(numba, "cuda", real, raising=False)
    monkeypatch.setitem(sys.modules, "numba.cuda", real)
    monkeypatch.setattr(clock, "to_device", simulated)
    sweep = {(16, 256): lambda *_: gpu.work("sweep", 1e-4)}
    monkeypatch.setattr(clock, "_sweep", sweep)
    return gpu


@pytest.mark.parametrize(
    ("launching", "launch", "sweeps"),
    [(2.1e-4, 0.0, 5), (2.1e-4, 8e-5, 16), (0.0, 0.0, 1)],
)
def test_the_clock_sweeps_before_the_first_mark(
    gpu, launching, launch, sweeps
):
    """So often that the GPU is behind the host: launch is a sweep's."""
    gpu.launch = launch
    seconds = clock.Clock().timer(lambda: gpu.work("run", 3e-5, launching))
    gpu.log.clear()
    assert seconds() == pytest.approx(3e-5)
    assert gpu.log == ["sweep"] * sweeps + ["mark", "run", "mark", "wait"]


def test_versions_take_turns(gpu):
    timer = clock.Clock()
    runs = {x: lambda x=x: gpu.work(x, ord(x) * 1e-6) for x in "ab"}
    found = in_turns(timer, runs, budget=1e-3)
    assert {k: len(v) for k, v in found.items()} == {"a": 5, "b": 5}
    assert found["a"] == pytest.approx([97e-6] * 5)
    log = "".join(x for x in gpu.log if x in "ab")
    assert log[-10:] == "ab" + "ba" + "ab" + "ba" + "ab"
    assert len(in_turns(timer, runs, budget=99.0)["a"]) == 50


def test_the_limits_are_of_the_work_of_two_kernels(gpu, monkeypatch):
    monkeypatch.setattr(clock.np, "zeros", lambda n, kind: np.empty(64, kind))
    took = {"_multiply_add": 1e-3, "_copy": 1e-6}
    for name, spent in took.items():
        run = {(16, 256): lambda *_, s=spent, n=name: gpu.work(n, s)}
        monkeypatch.setattr(clock, name, run)
    timer = SimpleNamespace(timer=lambda run: lambda: between(gpu, run))
    found = clock.limits(timer)
    flops = 2 * 16 * 8 * 4096 * 256 * 16  # of all threads of 16 blocks
    assert found["fma_peak"] == pytest.approx(flops / 1e-3)
    assert found["copy_bytes"] == pytest.approx(2 * 64 * 4 / 1e-6)


def between(gpu, run):
    start = gpu.now
    run()
    return gpu.now - start


@pytest.mark.parametrize(
    ("judged_first", "wrong"),
    [(lambda: "out is 9 off", "out is 9 off"), (fail, "no kernel")],
)
def test_the_contest_on_a_gpu_that_is_made_up(
    judged_first, wrong, monkeypatch
):
    """All that follows the clock: which rows are timed, and their shares.

    A version that is wrong, or fails, costs only its own row.
    """
    verdicts = iter([judged_first, str])

    def judged(ladder, version, sizes, place=None, seed=1):
        return "" if place is simulated else next(verdicts)()

    def turns(clock, runs, budget):
        assert clock == "clock" and [*runs] == ["layernorm_forward"]
        runs["layernorm_forward"]()  # it can be launched
        return {"layernorm_forward": [3e-6, 1e-6, 2e-6]}

    for name, what in {
        "no_times": lambda: "",
        "Clock": lambda: "clock",
        "limits": lambda clock: {"fma_peak": 1e12, "copy_bytes": 1e9},
        "to_device": simulated,
        "free_bytes": lambda: 1e9,
        "torch_on": torch_or_none(None, "none here"),
        "judge": judged,
        "in_turns": turns,
    }.items():
        monkeypatch.setattr(module, name, what)
    (found,) = kernel_contests(["layernorm_forward"], sizes=TINY, counted=TINY)
    one, two, torch = found["contestants"]
    assert one["unmeasured"] == f"wrong: {wrong}"
    assert two["seconds"] == [3e-6, 1e-6, 2e-6]
    assert torch == {"name": "torch", "unmeasured": "none here"}
    ladder = ladder_named("layernorm_forward")
    assert found["work"] == ladder.least_bytes(ladder.draw(TINY))
    assert found["limit"] == 1e9
    assert "timed at B = 2, T = 5" in found["about"]
    share = found["work"] / 2e-6 / 1e9
    text = report(facts([found]) | {"gpu": {"name": "Nothing 1"}})
    assert "  2.0 |" in text and f" {share:.0%} |" in text
    assert f"forward_by_threads (wrong: {wrong})" in text
    assert "GPU      Nothing 1" in text
    json.dumps(found)


@pytest.mark.parametrize("name", ["matmul_forward", "residual_forward"])
def test_the_limit_is_what_takes_the_time(name, monkeypatch):
    """The peak of multiply-adds for products, the copy for the rest."""
    ladder = ladder_named(name)
    most = {"fma_peak": 2, "copy_bytes": 3}
    found = module._goal(ladder, TINY, ladder.draw(TINY), most)
    assert found["limit"] == (2 if ladder.flops else 3)


@pytest.fixture
def with_torch(monkeypatch):
    """A GPU made up, whose memory is the host's, and PyTorch beside it."""
    torch = pytest.importorskip("torch")

    def there(torch, drawn):
        return {
            k: simulated(x.numpy().copy()) if np.ndim(x) else x
            for k, x in drawn.items()
        }

    def tensors(torch, there):
        return {
            k: torch.from_numpy(to_host(x)) if np.ndim(x) else x
            for k, x in there.items()
        }

    for name, what in {
        "drawn_by": partial(module.drawn_by, where="cpu"),
        "_there": there,
        "_tensors": tensors,
        "to_device": simulated,
        "free_bytes": lambda: 1e9,
        "torch_on": torch_or_none(torch),
        "judge": lambda *_: "",  # it sees too few rows
        "in_turns": lambda clock, runs, budget: dict.fromkeys(runs, [1.0]),
    }.items():
        monkeypatch.setattr(module, name, what)
    return module.Gpu(None, {"fma_peak": 1.0, "copy_bytes": 1.0}, torch, TINY)


@pytest.mark.parametrize(
    ("array", "value", "message"),
    [
        ("out", 9.0, r"wrong: out is \de[+-]\d+ from float64"),
        ("out", np.nan, "wrong: out is not finite everywhere"),
        ("inp", 9.0, "wrong: inp was changed"),
    ],
)
def test_pytorch_finds_a_wrong_version(
    array, value, message, with_torch, monkeypatch
):
    right, contest = ladder_named("gelu_forward"), {"about": "it"}
    rows = module.kernel_rows(right, TINY, with_torch, contest)
    assert rows == dict.fromkeys(["gelu_forward", "torch"], {"seconds": [1.0]})
    assert (
        contest["about"].startswith("it, timed at B = 2") and contest["work"]
    )
    monkeypatch.setattr(Spoilt, "mistake", (array, value))
    rows = module.kernel_rows(Spoilt(*right), TINY, with_torch, contest)
    assert re.fullmatch(message, rows["gelu_forward"]["unmeasured"])
    assert rows["torch"] == {"seconds": [1.0]}


def test_a_version_that_is_known_to_be_wrong_is_not_run(with_torch):
    ladder = Spoilt(*ladder_named("gelu_forward"))
    ladder = ladder._replace(torch=lambda torch, a: lambda: [a.out])
    known = {"gelu_forward": "out is 9 off"}
    rows = module.kernel_rows(ladder, TINY, with_torch, {"about": ""}, known)
    assert rows["gelu_forward"] == {"unmeasured": "wrong: out is 9 off"}


def test_a_version_that_is_wrong_in_the_simulator(monkeypatch):
    monkeypatch.setattr(module, "no_times", lambda: WHY)
    monkeypatch.setattr(module, "judge", lambda *_, **__: "out is 9 off")
    (found,) = kernel_contests(["gelu_forward"], counted=TINY)
    (row,) = found["contestants"]
    assert row["unmeasured"] == "wrong: out is 9 off"


# what is drawn and written, from numbers that are made up


def fake_times(result):
    """Contests with times that can be checked by eye; for tests alone."""
    result = json.loads(json.dumps(result))
    for i, found in enumerate(result, 1):
        found |= {"work": 1000 * i, "limit": 1e9}
        for number, row in enumerate(found["contestants"], 1):
            del row["unmeasured"]
            row["seconds"] = [4e-6 / number] * 3
        torch = {"name": "torch", "seconds": [1e-6]}
        found["contestants"].append(torch)
    return result


def test_the_figure(result):
    timed = facts(fake_times(result))
    first, second = bars_figure(timed, "kernel").axes
    widths = [round(x.get_width()) for x in first.patches]
    assert widths == [25, 50, 100]  # 250, 500 and 1000 MB/s of 1 GB/s
    names = [x.get_text() for x in first.get_yticklabels()]
    assert names == ["forward_by_threads", "layernorm_forward", "torch"]
    ours, _, torch = [x.get_facecolor() for x in first.patches]
    assert ours != torch
    assert [round(x.get_width()) for x in second.patches] == [50, 100, 200]


def test_the_page_with_and_without_times(result):
    without = {"gpu": facts(result)}
    text = results_page.page(without)
    assert "**No time has been measured on a GPU yet.**" in text
    assert "    llmnb bench --backend cuda --kernels" in text
    assert text.count("Not measured:") == 1
    assert "**layernorm_forward**: counted at B = 2" in text
    assert [*results_page.figures(without)] == []
    gpu = {"name": "A GPU that is made up"}
    timed = {"gpu": facts(fake_times(result)) | {"gpu": gpu}}
    text = results_page.page(timed)
    assert "## On a GPU: A GPU that is made up" in text
    assert "No time" not in text and "Not measured" not in text
    assert "  25% |" in text and " 100% |" in text
    names = [name for name, _, _ in results_page.figures(timed)]
    assert names == ["results-gpu-ladders.svg"]


# the command


def test_the_command(monkeypatch, capsys, tmp_path):
    """llmnb bench --kernels: the whole way, without a GPU."""
    for place in (module, clock):
        monkeypatch.setattr(place, "no_times", lambda: WHY)
    path = tmp_path / "gpu.json"
    asked = ["bench", "--backend", "cuda", "--kernels", "encoder_forward"]
    assert not main([*asked, "--json", str(path)])
    text = capsys.readouterr().out
    assert "encoder_forward" in text and WHY in text
    found = json.loads(path.read_text("utf-8"))
    assert [x["name"] for x in found["contests"]] == ["encoder_forward"]
    assert "gpu" not in found


# what is committed


def test_no_number_stands_for_a_time():
    """A file from a machine without a GPU holds no time of one."""
    for path in RESULTS.glob("*.json"):
        found = json.loads(path.read_text("utf-8"))
        if found["backend"] != "cuda" or "gpu" in found:
            continue
        kinds = [x["kind"] for x in found["contests"]]
        assert kinds.count("kernel") == len(LADDERS)
        for row in (x for c in found["contests"] for x in c["contestants"]):
            assert "seconds" not in row
            assert row["unmeasured"].startswith("no GPU")


@pytest.mark.parametrize("ladder", LADDERS, ids=NAMES)
def test_the_gpu_file_counts_every_version(ladder):
    found = json.loads((RESULTS / "5-gpu.json").read_text("utf-8"))
    rows = {x["name"]: x["contestants"] for x in found["contests"]}
    rows = [x for x in rows[ladder.layer] if "sectors" in x]
    assert [x["name"] for x in rows] == ladder.names, "measure once more"
    arguments = ladder.draw(ladder.counted)
    assert rows[0]["sizes"] == ladder.counted._asdict()
    least = ladder.least_bytes(arguments)
    assert rows[0]["least_bytes"] == least, "measure once more"
