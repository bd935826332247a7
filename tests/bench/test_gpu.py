"""`make gpu`: rehearsed on the stand-in, and judged by PyTorch on a CPU."""

import json
import os
import signal
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import results_page

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
    result.row(contest, "late", rows, needs=1e6)
    late = {"name": "late", "unmeasured": "no time was left"}
    assert contest["contestants"][-1] == late


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
    name = next(iter(got))
    for value, said in (
        (fine[name] + 0.01, f"{name} is "),
        (fine[name] * np.nan, f"{name} is not finite everywhere"),
    ):
        spoilt = fine | {name: value}
        assert kernels.wrong_with(spoilt, got, kept).startswith(said)
    name = next(iter(kept))
    spoilt = fine | {name: kept[name] + 1}
    assert kernels.wrong_with(spoilt, got, kept) == f"{name} was changed"
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


def test_a_library_of_a_toolkit_is_found(tmp_path):
    place = tmp_path / "cuda-13.0" / "nvvm" / "lib64"
    place.mkdir(parents=True)
    assert start.library(roots=(tmp_path,)) == ""
    (place / "libnvvm.so.4").touch()
    assert start.library(roots=(tmp_path,)) == str(place)


@pytest.fixture
def process(monkeypatch, tmp_path):
    """One that is not started: the codes with which it ends, None being too
    late, and what it is asked."""
    seen = SimpleNamespace(codes=[], asked=[])

    def popen(command, env, cwd):
        seen.command, seen.env = command, env
        return seen

    def wait(timeout=None):
        code = seen.codes.pop(0)
        if code is None:
            raise TimeoutError
        return code

    seen.wait, seen.send_signal = wait, seen.asked.append
    seen.terminate = lambda: seen.asked.append("terminated")
    fake = SimpleNamespace(Popen=popen, TimeoutExpired=TimeoutError)
    monkeypatch.setattr(start, "subprocess", fake)
    monkeypatch.setattr(start, "install", lambda root: tmp_path)
    monkeypatch.setattr(start, "library", lambda: "/nvvm")
    return seen


def test_the_measurement_starts_with_what_was_found(process, tmp_path):
    process.codes += [7]
    with pytest.raises(SystemExit) as end:
        start.main(["--seconds", "9"])
    assert end.value.code == 7
    assert process.command[1:] == ["-m", "llmnb.bench.gpu", "--seconds", "9"]
    assert str(tmp_path) in process.env["PYTHONPATH"]
    assert process.env["LD_LIBRARY_PATH"].startswith("/nvvm")


@pytest.mark.parametrize(
    "system, how", [("posix", signal.SIGINT), ("nt", "terminated")]
)
def test_a_measurement_that_takes_too_long(process, monkeypatch, system, how):
    """It is asked to end as the system can ask; Windows has no SIGINT."""
    process.codes += [None, 3]
    there = {"environ": os.environ, "pathsep": os.pathsep, "name": system}
    monkeypatch.setattr(start, "os", SimpleNamespace(**there))
    with pytest.raises(SystemExit) as end:
        start.main([])
    assert (end.value.code, process.asked) == (3, [how])
