"""The kernel decorator: its options, and a cache that is never stale."""

import json
import os
import re
import shutil
import stat
from pathlib import Path
from types import SimpleNamespace

import llvmlite
import numba
import numpy as np
import pytest
from processes import output

import llmnb.cpu.jit as jit
from llmnb.cpu import compiled

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
import json
from llmnb.cpu.caller import call
print(json.dumps({
    "result": call(10.0),
    "hits": sum(call.stats.cache_hits.values()),
    "folder": str(call.stats.cache_path),
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


def run(copy, cache, program=PROGRAM, **more):
    """Run in a new process; -B because .pyc files go by whole seconds."""
    place = {"LLMNB_CACHE": str(cache), "PYTHONPATH": str(copy)}
    how = {"options": ["-B"], "cwd": copy}
    return json.loads(output(program, **how, **place, **more))


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

    # the other room that has kernels counts as well
    (copy / "llmnb" / "bench" / "more.py").write_text("")
    more = run(copy, cache)["folder"]
    assert more != first["folder"]

    # and so does the room whose numbers they take, such as EPS
    edit(copy, "../reference/layernorm.py", "EPS = 1e-5", "EPS = 1e-6")
    assert run(copy, cache)["folder"] != more


def test_no_folder_to_write_to(copy):
    """Kernels are compiled, and nothing is kept where it could be stale."""
    file = copy / "file"
    file.write_text("not a folder")
    for expected in (20, 21):
        assert run(copy, file / "cache")["result"] == expected
        edit(copy, "callee.py", "* x", "* x + 1")
    assert not list(copy.rglob("*.kernel"))


def test_the_options_of_a_kernel():
    @jit.inner
    def ratio(a, b):
        return a / b

    options = ratio.targetoptions
    assert {"reassoc", "contract"} < set(options["fastmath"])
    # with these, division in vectors would be rounded unlike in single steps
    assert not {"arcp", "afn", "fast"} & set(options["fastmath"])
    assert options["error_model"] == "numpy"
    assert not options.get("parallel")
    # under Python's error model this raises ZeroDivisionError
    assert ratio(1.0, 0.0) != 0
    # a function from outside the package is not kept on disk
    assert ratio.stats.cache_path is None


DAMAGES = {
    "empty": lambda data, other: b"",
    "cut": lambda data, other: data[: len(data) // 2],
    "longer": lambda data, other: data + b"\0",
    "a bit": lambda data, other: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    "another's": lambda data, other: other,
}


def test_a_damaged_kernel_is_compiled_again(copy):
    cache = copy / "cache"
    run(copy, cache)
    paths = [x for x in cache.rglob("*") if x.is_file()]
    for name, damage in DAMAGES.items():
        whole = [x.read_bytes() for x in paths]
        others = whole[1:] + whole[:1]
        for path, data, other in zip(paths, whole, others, strict=True):
            path.write_bytes(damage(data, other))
        for hits in (0, 1):  # what is compiled again is kept again
            done = run(copy, cache)
            assert (done["result"], done["hits"]) == (20, hits), name


@pytest.mark.skipif(os.name == "nt", reason="limits of files are POSIX's")
def test_a_full_disk_under_the_cache_stops_nothing(copy):
    limit = "import resource\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
    cache = copy / "cache"
    for _ in range(2):
        done = run(copy, cache, limit + PROGRAM)
        assert (done["result"], done["hits"]) == (20, 0)
    assert not [x for x in cache.rglob("*") if x.is_file()]


@pytest.mark.skipif(os.name == "nt", reason="users have no numbers there")
def test_the_folder_is_this_users_alone(tmp_path, monkeypatch):
    folder = compiled.cache_folder.__wrapped__
    monkeypatch.setenv("LLMNB_CACHE", str(tmp_path))
    ours = folder()
    assert stat.S_IMODE(ours.stat().st_mode) == 0o700
    ours.chmod(0o777)
    assert folder() == ours
    assert stat.S_IMODE(ours.stat().st_mode) == 0o700
    path = ours / "a.kernel"
    compiled._write(path, b"code")
    assert compiled._read(path) == b"code"
    someone = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: someone)
    assert compiled._read(path) is None
    assert folder() is None


def test_without_a_home_nothing_is_kept(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LLMNB_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", home)
    assert compiled.cache_folder.__wrapped__() is None


OPTIONS = {
    "NUMBA_OPT": "0",
    "NUMBA_LOOP_VECTORIZE": "0",
    "NUMBA_BOUNDSCHECK": "1",
    "NUMBA_SLP_VECTORIZE": "1",
    "NUMBA_DEBUGINFO": "1",
    "NUMBA_ENABLE_AVX": "0",
}


def test_a_kernel_is_found_by_the_options_it_was_compiled_with(copy):
    cache = copy / "cache"
    assert run(copy, cache)["hits"] == 0
    for name, value in OPTIONS.items():
        assert run(copy, cache, **{name: value})["hits"] == 0, name
    assert run(copy, cache)["hits"] == 1
    assert run(copy, cache, NUMBA_BOUNDSCHECK="1")["hits"] == 1
    assert run(copy, cache, NUMBA_NUM_THREADS="1")["hits"] == 1


def test_a_kernel_has_a_name_that_windows_takes(tmp_path):
    made = compiled.KernelCache(lambda: 0, tmp_path)
    path = made._path((), SimpleNamespace(magic_tuple=tuple))
    assert re.fullmatch(r"[\w.-]+", path.name), path.name


def test_every_option_is_one_of_numbas():
    assert not set(compiled.CHANGING.split()) - set(vars(numba.config))


def test_kernels_that_may_not_be_compiled_say_so():
    program = """
import importlib, numpy, llmnb
for name in ("llmnb.cpu", "llmnb.cpu.math", "llmnb.cpu.decode"):
    try:
        importlib.import_module(name)
    except ImportError as error:
        assert "NUMBA_DISABLE_JIT is set" in str(error), error
        assert "'reference'" in str(error), error
    else:
        raise AssertionError(name)
cfg = llmnb.GPT2Config(4, 5, 1, 1, 4)
model = llmnb.GPT2(cfg, 1, 4, backend="reference")
tokens = numpy.array([[1, 2, 3, 4]])
assert model.forward(tokens, tokens) > 0
"""
    output(program, NUMBA_DISABLE_JIT="1")


LAYER = """
import os, numba, numpy as np
from llmnb import cpu
rng = np.random.default_rng(0)
x, y, weight = (rng.normal(size=(1, 40, 40)).astype("f4") for _ in range(3))
panels = np.empty(cpu.panels_shape(40, 40), "f4")

def layers(_=None):
    a, b, c = (np.empty_like(x) for _ in range(3))
    cpu.residual_forward(a, x, y)
    cpu.matmul_forward(b, x, weight[0], None)
    cpu.pack_weight(panels, weight[0])
    cpu.panels_forward(c, x, panels)
    return a.tobytes() + b.tobytes() + c.tobytes()
"""
FORK = (
    LAYER
    + """
import multiprocessing, sys
if sys.argv[1] == "kernels":
    want = layers()
else:
    numba.set_num_threads(1)  # starts the threads, too
with multiprocessing.get_context("fork").Pool(2) as pool:
    first, second = pool.map_async(layers, range(2)).get(60)
if sys.argv[1] == "kernels":
    assert first == want
assert first == second == layers()
child = os.fork()
if not child:
    if not os.fork():
        os._exit(layers() != first)
    os._exit(layers() != first or os.wait()[1])
assert os.waitpid(child, 0)[1] == 0
"""
)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("before", ["kernels", "threads"])
@pytest.mark.parametrize("layer", ["default", "workqueue"])
def test_a_forked_child_computes_the_same_bits(layer, before):
    quiet = ["-W", "ignore"]
    output(FORK, before, options=quiet, NUMBA_THREADING_LAYER=layer)


@jit.team
def copied(part, parts, address):
    out, inp = jit.arguments(address)
    mine = jit.share(inp.shape[0], part, parts)
    for i in range(mine.start, mine.stop):
        for j in range(inp.shape[1]):
            out[i, j] = inp[i, j]


def test_a_team_is_compiled_for_each_order_of_an_array():
    """By columns, it would read what lies with gaps from other places."""
    whole, found = np.arange(64.0).reshape(8, 8), np.zeros((4, 4))
    for x in (whole[:4, :4].T.copy("F"), whole[::2, ::2], whole[4:, 4:].T):
        copied(found, x)
        assert np.array_equal(found, x)


THREADS = (
    LAYER
    + """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(4) as pool:  # from the first, which compiles
    found = list(pool.map(layers, range(400)))
assert set(found) == {layers()}
"""
)


@pytest.mark.parametrize("layer", ["default", "workqueue"])
def test_threads_of_python_may_all_call_kernels(layer):
    output(THREADS, NUMBA_THREADING_LAYER=layer)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_waits_for_the_kernels_of_other_threads():
    """Its child would inherit a lock that nobody opens."""
    program = """
import threading
stop = threading.Event()
def busy():
    while not stop.is_set():
        layers()
want = layers()
thread = threading.Thread(target=busy)
thread.start()
for _ in range(50):
    child = os.fork()
    if not child:
        os._exit(layers() != want)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
thread.join()
"""
    output(LAYER + program, options=["-W", "ignore"])


def test_the_folder_is_named_by_the_sources(tmp_path, monkeypatch):
    folder = compiled.cache_folder.__wrapped__
    monkeypatch.setenv("LLMNB_CACHE", str(tmp_path))
    first = folder()
    assert first.parent == tmp_path / "kernels"
    assert first.is_dir()
    assert folder() == first
    for package in (numba, llvmlite):
        with monkeypatch.context() as patched:
            patched.setattr(package, "__version__", "0.0.0")
            assert folder() != first
    assert folder() == first


def test_without_sources_nothing_is_kept(tmp_path, monkeypatch):
    """As in a zip archive: any state of them would have the same name."""
    monkeypatch.setenv("LLMNB_CACHE", str(tmp_path))
    inside = tmp_path / "llmnb.zip" / "llmnb" / "cpu" / "compiled.py"
    monkeypatch.setattr(compiled, "__file__", str(inside))
    assert compiled.cache_folder.__wrapped__() is None


THREADS_CHANGE = """
import os
import sys
import numba
import numpy as np
from llmnb import cpu
os.environ["NUMBA_NUM_THREADS"] = sys.argv[1]
numba.njit(lambda: 0)()  # numba reads the variable when it compiles
x, weight = np.ones((1, 500, 700)), np.ones((600, 700))
out = np.empty((1, 500, 600))
for work in None, np.empty(cpu.work_shape()):
    out.fill(0)
    cpu.matmul_forward(out, x, weight, None, work=work)
    assert (out == 700).all()
"""


@pytest.mark.parametrize("now", [1, 3])
def test_every_thread_has_its_scratch_when_the_variable_changes(now):
    output(THREADS_CHANGE, now, NUMBA_NUM_THREADS="2")
