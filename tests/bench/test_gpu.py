"""`make gpu`: rehearsed on the stand-in, and judged by PyTorch on a CPU."""

import json
import os
import signal
import subprocess
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import results_page
from processes import python

from llmnb import GPT2Config, cuda
from llmnb.bench import contest as kernels
from llmnb.bench import gpu, start
from llmnb.bench.ladders import GPT2_124M, LADDERS, TINY, ladder_named
from llmnb.gpu.launch import simulated, to_host
from llmnb.reference.bfloat16 import to_bfloat16

NAMES = [x.layer for x in LADDERS]
REHEARSE = """
import sys
from llmnb.bench import gpu
some = "gelu_forward", "encoder_backward"
gpu.LADDERS = [x for x in gpu.LADDERS if x.layer in some]
# heads as wide as those of TINY, so that their kernels are compiled once
gpu.SMALL = gpu.GPT2Config(64, 251, 2, 2, 32)
gpu.main(["--rehearse", "--json", sys.argv[1], "--seconds", "500"])
print("|", *counts("refusals"), refused())
"""


def test_rehearsed_from_end_to_end(on_standin, tmp_path):
    """Every launch and copy of a measurement; results there are none."""
    said = on_standin(REHEARSE, tmp_path / "6.json")
    assert said.rsplit("|", 1)[1].split() == ["0"]
    found = json.loads((tmp_path / "6.json").read_text("utf-8"))
    kinds = [x["kind"] for x in found["contests"]]
    assert kinds == ["gradients", *4 * ["kernel"], "step", *5 * ["kernel"]]
    right, *halves, step, end, _, _, backward, gelu = (
        {y["name"]: y for y in x["contestants"]} for x in found["contests"]
    )
    assert "nvmath" in end["tf32 fused"]["unmeasured"]
    for precision in ("fp32", "bf16"):
        name = f"small {precision}"  # all is zero there
        assert right[name]["worst"] == pytest.approx(1)
        name += ", graph and parts"
        assert right[name] == {"name": name, "same_steps": 4}
    assert len(step["llmnb bf16"]["seconds"]) == 2
    for contest, rows in zip(found["contests"][1:5], halves, strict=True):
        assert contest["limit"] > 0 and contest["work"] > 0
        assert "timed at B = 2, T = 5, C = 32" in contest["about"]
        assert len(rows["llmnb bf16"]["seconds"]) >= 5
        assert {"seconds", "unmeasured"} & set(rows["torch bf16"])
    assert "unmeasured" in step["torch"] or "seconds" in step["torch"]
    for rows, last in ((backward, "encoder_backward"), (gelu, "gelu_forward")):
        linked = rows[f"{last}, LTO"]["seconds"]
        assert len(rows[last]["seconds"]) == len(linked)
    page = results_page.page({"6": found})
    assert "## On a GPU: a stand-in, no GPU" in page
    assert "No time has been measured" not in page
    assert "worst gradient away" in page


def test_without_a_gpu_it_refuses(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "no_times", lambda: "no GPU: none")
    with pytest.raises(RuntimeError, match="no GPU: none"):
        gpu.measure(tmp_path / "a.json")
    assert not (tmp_path / "a.json").exists()


def test_every_row_is_on_disk_before_the_next(tmp_path):
    path = tmp_path / "a.json"
    result = gpu.Result(path, 100, {"backend": "cuda"})
    contest, seen = result.contest("a", "losses", "of a test"), []

    def rows():
        found = json.loads(path.read_text("utf-8"))["contests"]
        seen.append([y["name"] for x in found for y in x["contestants"]])
        return {"worst": 1.0}

    for name in "abc":
        result.row(contest, name, rows)
    assert seen == [[], ["a"], ["a", "b"]]


def begun(path, resume=True, **how):
    """A result that another process has begun, and its one contest."""
    result = gpu.Result(path, 100, {"backend": "cuda"}, resume, **how)
    return result, result.contest("a", "losses", "of a test")


def end_the_process():
    raise SystemExit(3)


def test_a_process_that_ends_is_followed_by_another(tmp_path):
    """It asks for nothing twice, least of all for what has ended the first."""
    result, contest = begun(tmp_path / "new" / "a.json", resume=False)
    result.row(contest, "a", lambda: {"worst": 1.0})
    with pytest.raises(SystemExit):
        result.row(contest, "b", end_the_process)
    result, contest = begun(result.path)
    for name in "ab":
        result.row(contest, name, end_the_process)
    result.row(contest, "c", lambda: {"worst": 2.0})
    second = result.contest("a", "losses", "of a test")  # named like the first
    result.row(second, "a", lambda: {"worst": 3.0})
    found = json.loads(result.path.read_text("utf-8"))
    first, second = (x["contestants"] for x in found["contests"])
    assert [x.get("worst") for x in first] == [1.0, None, 2.0]
    assert "ended its process" in first[1]["unmeasured"]
    assert second == [{"name": "a", "worst": 3.0}]
    assert "under_way" not in found


def test_the_next_process_has_the_time_that_is_left(tmp_path):
    result, contest = begun(tmp_path / "a.json")  # nothing is there yet
    result.found["began"] -= 60
    result.write()
    result, contest = begun(result.path)
    result.row(contest, "a", end_the_process, needs=50)
    assert contest["contestants"][0]["unmeasured"] == "no time was left"
    result.found["began"] -= 86400
    result.write()
    _, contest = begun(result.path)  # that was yesterday's
    assert contest["contestants"] == []


def test_a_lost_gpu_ends_the_process_with_its_row_on_disk(
    tmp_path, monkeypatch
):
    assert not gpu.lost()
    monkeypatch.setattr(gpu, "lost", lambda: True)
    result, contest = begun(tmp_path / "a.json")
    with pytest.raises(SystemExit) as end:
        result.row(contest, "a", lambda: 1 / 0)
    assert end.value.code == start.AGAIN
    found = json.loads(result.path.read_text("utf-8"))["contests"]
    assert "by zero" in found[0]["contestants"][0]["unmeasured"]


LATE = """
import sys, time
from llmnb.bench import gpu
result = gpu.Result(sys.argv[1], 100, {}, patience=0.3)
contest = result.contest("a", "losses", "of a test")
result.row(contest, "in time", dict, needs=0.1)
result.row(contest, "late", lambda: time.sleep(500), needs=0.1)
"""


def test_who_is_late_ends_the_process(tmp_path):
    done = python(LATE, tmp_path / "a.json")
    assert done.returncode == start.AGAIN, done.stderr
    _, contest = begun(tmp_path / "a.json")
    names = {x["name"]: "unmeasured" in x for x in contest["contestants"]}
    assert names == {"in time": False, "late": True}


def test_tools_that_fail_cost_rows_and_nothing_else(tmp_path, monkeypatch):
    def fail(*args, **how):
        raise RuntimeError("no clock")

    for name in ("Clock", "on_gpu", "free_bytes", "torch_or_none"):
        monkeypatch.setattr(gpu, name, fail)
    monkeypatch.setattr(gpu, "no_cublas", lambda: "")
    result = gpu.Result(tmp_path / "a.json", 100, {"backend": "cuda"})
    gpu.ask_halves(result, TINY, judging=True)
    gpu.ask_kernels(result, TINY, judging=True)
    rows = [y for x in result.found["contests"] for y in x["contestants"]]
    assert len(rows) > 20 and {x["unmeasured"] for x in rows} == {"no clock"}
    assert gpu.step_batch(GPT2Config(), 16, 1024) == 1


def test_layers_are_timed_where_their_limit_fails(monkeypatch):
    def fail(clock):
        raise RuntimeError("no mma")

    monkeypatch.setattr(gpu, "Clock", lambda: "a clock")
    monkeypatch.setattr(gpu, "mma_peak", fail)
    assert gpu._half_tools() == ("a clock", 0)


@pytest.mark.parametrize("ladder", LADDERS, ids=NAMES)
def test_pytorch_in_float64_is_the_reference(ladder):
    """So it may judge on the GPU, at sizes that NumPy takes minutes for."""
    torch = pytest.importorskip("torch")
    drawn = kernels.drawn_by(torch, ladder, TINY, "cpu")
    want = ladder.expected({
        k: x.numpy().copy() if hasattr(x, "numpy") else x
        for k, x in drawn.items()
    })  # fmt: skip
    got = kernels.expected_by(torch, ladder, drawn)
    assert set(got) <= set(want) and got
    for name, x in got.items():
        y = want[name].reshape(-1)[: x.numel()]
        np.testing.assert_allclose(x.reshape(-1), y, atol=1e-6)
    fine = {k: torch.from_numpy(np.asarray(x)) for k, x in want.items()}
    kept = kernels._kept(ladder, drawn)
    assert set(kept).isdisjoint(ladder.results) and kept
    fine |= {k: x.clone() for k, x in kept.items()}
    assert kernels.wrong_with(fine, got, kept) == ""
    ladder.torch(torch, SimpleNamespace(**drawn))()  # it runs, AdamW's too


@pytest.mark.parametrize("layer", gpu.HALVES)
def test_layers_in_bfloat16_are_judged(layer):
    """On the simulator, by the function that judges on a GPU."""
    ladder, sizes = ladder_named(layer), TINY._replace(T=9)
    drawn = gpu.half_arguments(ladder, sizes)
    there = {
        k: simulated(x if k in gpu.SINGLE else to_bfloat16(x))
        for k, x in drawn.items()
    }
    getattr(cuda, f"{layer}_bf16")(*there.values())
    apart = gpu.half_apart(ladder, drawn, there)
    assert set(apart) == set(ladder.results)
    assert 0 < max(apart.values()) < gpu.FAR
    name = ladder.results[0]
    there[name].copy_to_device(np.zeros_like(to_host(there[name])))
    assert gpu.half_apart(ladder, drawn, there)[name] == pytest.approx(1)


def test_the_largest_batch_that_fits():
    assert gpu.fitting_batch(16, lambda B: 10 * B, 1000) == 16
    assert gpu.fitting_batch(16, lambda B: 10 * B, 50) == 4
    with pytest.raises(MemoryError, match="needs 10 bytes on the GPU, of wh"):
        gpu.fitting_batch(16, lambda B: 10 * B, 9)
    cfg = GPT2Config()
    assert 11e9 < gpu.model_bytes(cfg, 1024, 16) < 12e9
    large = kernels.layer_bytes(
        ladder_named("fused_classifier"), GPT2_124M, 16
    )
    assert 8 * 16 * 1024 * 50304 * 4 < large < 80e9


def wheel(folder, name):
    """A wheel of one module, by hand."""
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}.py", "HERE = 1\n")
        head = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        file.writestr(f"{info}/METADATA", head)
        kind = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        file.writestr(f"{info}/WHEEL", kind)
        file.writestr(f"{info}/RECORD", "")


def test_carried_wheels_are_installed_beside_the_checkout(tmp_path):
    pytest.importorskip("pip")
    (tmp_path / "wheels").mkdir()
    wheel(tmp_path / "wheels", "carried")
    there = start.install(tmp_path)
    assert there == tmp_path / "build" / "gpu"
    assert (there / "carried.py").read_text() == "HERE = 1\n"


def test_what_cannot_be_installed_is_said(tmp_path, monkeypatch, capsys):
    """Where nobody answers, pip is given up, and what is lacking is named."""
    seen, limits = [], []

    def run(command, timeout, check):
        seen.append(command)
        limits.append(timeout)
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(start.subprocess, "run", run)
    monkeypatch.setattr(start, "NEEDS", {"nobody_has": "nobody-has>=1"})
    monkeypatch.setattr(start, "BETTER", {"json": "js", "nor_this": "nor"})
    start.install(tmp_path)
    assert seen[0].count("nobody-has>=1") == 1 and "js" not in seen[0]
    said = capsys.readouterr().out
    assert "pip could not install" in said
    assert "without nobody-has>=1 nothing can be measured" in said
    assert "without nor less can be measured" in said
    folder = tmp_path / "build" / "gpu"
    folder.mkdir(parents=True)
    (folder / "nobody_has.py").touch()
    start.install(tmp_path)
    assert limits == [120, 30]  # for less there is less time
    assert "nobody" not in capsys.readouterr().out
    (folder / "nor_this.py").touch()
    start.install(tmp_path)  # all is there from the last time
    assert capsys.readouterr().out == "" and len(seen) == 2


def test_a_library_of_a_toolkit_is_found(tmp_path):
    place = tmp_path / "cuda-13.0" / "nvvm" / "lib64"
    place.mkdir(parents=True)
    assert start.library(roots=(tmp_path,)) == ""
    (place / "libnvvm.so.4").touch()
    assert start.library(roots=(tmp_path,)) == str(place)


@pytest.fixture
def process(monkeypatch, tmp_path):
    """One that is not started: the codes with which it ends, None being too
    late, what it is told, and the options with which it is started."""
    seen = SimpleNamespace(codes=[], told=[], options=[])

    def popen(command, env, cwd):
        assert command[1:3] == ["-m", "llmnb.bench.gpu"]
        seen.env = env
        seen.options.append(command[3:])
        return seen

    def wait(timeout=None):
        code = seen.codes.pop(0)
        if code is None:
            raise TimeoutError
        return code

    seen.wait, seen.send_signal = wait, seen.told.append
    seen.terminate = lambda: seen.told.append("terminated")
    seen.kill = lambda: seen.told.append("killed")
    fake = SimpleNamespace(Popen=popen, TimeoutExpired=TimeoutError)
    monkeypatch.setattr(start, "subprocess", fake)
    monkeypatch.setattr(start, "install", lambda root: tmp_path)
    monkeypatch.setattr(start, "library", lambda: "/nvvm")
    return seen


INT, LOST = signal.SIGINT, start.AGAIN


@pytest.mark.parametrize(
    ("system", "limit", "codes", "told", "times"),
    [
        ("posix", 99, [7], [], 1),
        ("posix", 99, [LOST, LOST, 0], [], 3),  # it is taken up
        ("posix", 99, [-11, -11, 0], [], 3),
        # too late, it is asked to end as the system can ask
        ("posix", 0, [None, 3], [INT], 1),
        ("nt", 0, [None, 3], ["terminated"], 1),
        ("posix", 0, [None, None], [INT, "killed"], 1),
    ],
)
def test_how_a_measurement_ends(
    process, monkeypatch, tmp_path, system, limit, codes, told, times
):
    monkeypatch.setenv("LIMIT", str(limit))
    there = {"environ": os.environ, "pathsep": os.pathsep, "name": system}
    monkeypatch.setattr(start, "os", SimpleNamespace(**there))
    process.codes += codes
    with pytest.raises(SystemExit) as end:
        start.main(["--seconds", "9"])
    assert end.value.code == (1 if codes[-1] is None else codes[-1])
    assert process.told == told
    first, *others = process.options
    assert first == ["--seconds", "9"] and len(others) == times - 1
    assert all("--resume" in x for x in others)
    assert str(tmp_path) in process.env["PYTHONPATH"]
    assert process.env["LD_LIBRARY_PATH"].startswith("/nvvm")
