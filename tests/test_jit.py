"""The kernel decorator: its options, and a cache that is never stale."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest

import llmnb.cpu.jit as jit

PACKAGE = Path(jit.__file__).parents[1]
CALLEE = """from llmnb.cpu.jit import inner

FACTOR = 2


@inner
def scaled(x):
    return FACTOR * x
"""
CALLER = """from llmnb.cpu.callee import scaled
from llmnb.cpu.jit import inner


@inner
def call(x):
    return scaled(x)
"""
PROGRAM = """
import json, numba
before = numba.config.CACHE_DIR
from llmnb.cpu.caller import call
print(json.dumps({
    "result": call(10.0),
    "hits": sum(call.stats.cache_hits.values()),
    "folder": str(call.stats.cache_path),
    "restored": numba.config.CACHE_DIR == before,
}))
"""


@pytest.fixture
def copy(tmp_path):
    """A copy of the package with a kernel and its callee in two files."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "llmnb", ignore=ignore)
    (tmp_path / "llmnb" / "cpu" / "callee.py").write_text(CALLEE)
    (tmp_path / "llmnb" / "cpu" / "caller.py").write_text(CALLER)
    return tmp_path


def run(copy, cache, program=PROGRAM):
    """Run in a new process; -B because .pyc files go by whole seconds."""
    variables = {**os.environ, "LLMNB_CACHE": str(cache)}
    variables["PYTHONPATH"] = str(copy)
    variables.pop("NUMBA_CACHE_DIR", None)
    done = subprocess.run(
        [sys.executable, "-B", "-c", program],
        cwd=copy,
        env=variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def edit(copy, name, old, new):
    path = copy / "llmnb" / "cpu" / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_editing_a_callee_changes_the_result(copy):
    cache = copy / "cache"
    first = run(copy, cache)
    again = run(copy, cache)
    assert first["result"] == again["result"] == 20
    # without an edit the second process loads what the first compiled
    assert (first["hits"], again["hits"]) == (0, 1)
    assert first["folder"] == again["folder"]
    assert Path(first["folder"]).is_relative_to(cache)
    assert first["restored"]

    edit(copy, "callee.py", "* x", "* x + 1")
    edited = run(copy, cache)
    assert edited["result"] == 21
    assert edited["hits"] == 0

    # a global that the callee reads is part of the compiled code as well
    edit(copy, "callee.py", "FACTOR = 2", "FACTOR = 5")
    assert run(copy, cache)["result"] == 51

    # and an edit taken back finds the kernel of that state again
    edit(copy, "callee.py", "FACTOR = 5", "FACTOR = 2")
    edit(copy, "callee.py", "* x + 1", "* x")
    back = run(copy, cache)
    assert (back["result"], back["folder"]) == (20, first["folder"])


def test_no_folder_to_write_to(copy):
    """Kernels are compiled, and nothing is kept where it could be stale."""
    file = copy / "file"
    file.write_text("not a folder")
    for expected in (20, 21):
        assert run(copy, file / "cache")["result"] == expected
        edit(copy, "callee.py", "* x", "* x + 1")
    assert not list(copy.rglob("*.nbi"))


def test_a_real_kernel_is_kept_and_recompiled(copy):
    program = """
import json, numpy
from llmnb.cpu import residual
a = numpy.ones((3, 5), numpy.float32)
residual.residual_forward(out := numpy.zeros_like(a), a, a)
(routine,) = residual._residual_forward.routines.values()
print(json.dumps([float(out.sum()), routine.cache_hits]))
"""
    cache = copy / "cache"
    assert run(copy, cache, program) == [30, 0]
    assert run(copy, cache, program) == [30, 1]
    edit(copy, "residual.py", "inp1[i] + inp2[i]", "inp1[i] - inp2[i]")
    assert run(copy, cache, program) == [0, 0]


def test_the_options_of_a_kernel():
    @jit.kernel
    def fill(out):
        for i in numba.prange(len(out)):
            out[i] = 1

    @jit.inner
    def ratio(a, b):
        return a / b

    options = fill.targetoptions
    assert {"reassoc", "contract"} < set(options["fastmath"])
    assert options["parallel"]
    # with these, division in vectors would be rounded unlike in single steps
    assert not {"arcp", "afn", "fast"} & set(options["fastmath"])
    assert options["error_model"] == "numpy"
    assert not ratio.targetoptions.get("parallel")
    # under Python's error model this raises ZeroDivisionError
    assert ratio(1.0, 0.0) != 0
    # a function from outside the package is not kept on disk
    assert fill.stats.cache_path is None


def test_an_element_is_rounded_alike_wherever_it_stands():
    """In the vectors of a loop and in the rest that is done one by one."""

    @jit.kernel
    def quotient(out, a, b):
        for i in numba.prange(len(out)):
            out[i] = a[i] / (b[i] * b[i] + a[0])

    a, b = np.random.default_rng(0).uniform(1, 2, (2, 1000)).astype("f4")
    a[:65] = a[0]
    whole, part = np.empty_like(a), np.empty_like(a)
    quotient(whole, a, b)
    for n in range(1, 65):
        quotient(part[:n], a[:n], b[:n])
        np.testing.assert_array_equal(part[:n], whole[:n])


def test_the_folder_is_named_by_the_sources(tmp_path, monkeypatch):
    folder = jit.cache_folder.__wrapped__
    monkeypatch.setenv("LLMNB_CACHE", str(tmp_path))
    first = folder()
    assert first.parent == tmp_path / "kernels"
    assert first.is_dir()
    assert folder() == first
    monkeypatch.setattr(numba, "__version__", "0.0.0")
    assert folder() != first
