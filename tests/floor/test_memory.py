"""The arena: its layout, and that training allocates nothing after a step."""

import sys
from functools import partial

import numpy as np
import pytest
from measure import peak
from processes import output

from llmnb import GPT2, GPT2Config, checks
from llmnb.arena import Arena, footprint
from llmnb.model.layout import gpt2_layout
from llmnb.train.options import TrainConfig
from llmnb.train.start import new_model

CFG = GPT2Config(
    max_seq_len=32, vocab_size=200, num_layers=2, num_heads=4, channels=32
)


def allocated(backend):
    """Bytes that Python and NumPy held at once, at most, in three steps."""
    model = GPT2(GPT2Config(64, 200, 2, 4, 64), 4, 64, backend)
    tokens = np.arange(256).reshape(4, 64) % 200
    how = {"max_norm": 1.0, "decay": {"wte", "qkvw"}}
    step = partial(model.step, tokens, tokens, **how)
    step()
    return peak(lambda: [step() for _ in range(3)])


def test_a_step_allocates_nothing():
    # a temporary as large as one activation takes 65,536 bytes: the NumPy
    # backend makes such, the compiled one must not, not even for a moment
    assert allocated("cpu") < 30_000
    assert allocated("reference") > 65_536


FOOTPRINT = """
import ctypes
import numpy as np
from llmnb import GPT2, GPT2Config

def status(name):
    lines = open("/proc/self/status").read().splitlines()
    line = next(x for x in lines if x.startswith(name))
    return 1024 * int(line.split()[1])

cfg = GPT2Config(64, 1000, 2, 4, 64)
model = GPT2(cfg, 4, 64)
tokens = np.random.default_rng(0).integers(0, 1000, (4, 64))
for i in range(200):
    model.forward(tokens, tokens)
    model.backward()
    model.update(step=i + 1)
    if i == 0:  # give back what compiling took, and begin a new peak
        ctypes.CDLL(None).malloc_trim(0)
        open("/proc/self/clear_refs", "w").write("5")
        first = status("VmRSS")
print(status("VmHWM") - first)
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux"),
    reason="reads a process's peak memory from /proc, which Linux has",
)
def test_the_peak_of_200_steps_is_that_of_the_first():
    # the activations take 3.4 MB here, and a second copy of them must show
    assert int(output(FOOTPRINT)) < 2_000_000


def test_a_model_too_large_says_so(monkeypatch):
    def refuse(*_):
        raise MemoryError

    monkeypatch.setattr(np, "zeros", refuse)
    with pytest.raises(MemoryError, match="one block of [0-9,]+ bytes"):
        GPT2(CFG, 2, 16, "reference")


def test_a_model_beyond_all_addresses_says_so(monkeypatch):
    """Where nobody knows what is free, so that NumPy is asked."""
    monkeypatch.setattr(checks, "free_memory", lambda: None)
    for size in 2**59, 2**70:
        with pytest.raises(MemoryError, match="one block of [0-9,]+ bytes"):
            GPT2(GPT2Config(8, size, 1, 1, 4), 1, 8, "reference")


MEMINFO = "MemFree: 9 kB\nMemAvailable:    1000 kB\nSwapFree: 24 kB\nX: y\n"
BOX = {
    "proc/self/cgroup": "1:name=systemd:/\n0::/a/b\n",
    "sys/fs/cgroup/a/b/memory.max": "max\n",
    "sys/fs/cgroup/a/memory.max": "500000\n",
    "sys/fs/cgroup/a/memory.current": "400000\n",
    "sys/fs/cgroup/a/memory.stat": "anon 9\nactive_file 1\ninactive_file 2\n",
}
OLD_BOX = {
    "proc/self/cgroup": "4:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n",
    "sys/fs/cgroup/cpu,cpuacct/memory.limit_in_bytes": "1\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "500000\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "400000\n",
    "sys/fs/cgroup/memory/memory.stat": "inactive_file 9\n"
    "total_active_file 1\ntotal_inactive_file 2\n",
}
NO_SWAP = {
    "sys/fs/cgroup/a/memory.swap.max": "0\n",
    "sys/fs/cgroup/a/memory.swap.current": "0\n",
}
ZFS = "13 1 0x01\nname type data\nsize 4 5000\nc_min 4 2000\n"


@pytest.mark.parametrize(
    ("files", "want"),
    [
        ({}, 1024 * 1024),
        ({"proc/self/cgroup": "0::/\n"}, 1024 * 1024),
        ({"proc/self/cgroup": "nonsense"}, 1024 * 1024),
        ({"proc/spl/kstat/zfs/arcstats": ZFS}, 1024 * 1024 + 3000),
        (BOX, 100_003 + 24 * 1024),
        (BOX | NO_SWAP, 100_003),
        (BOX | {"sys/fs/cgroup/a/memory.max": "9" * 19}, 1024 * 1024),
        (BOX | {"sys/fs/cgroup/a/memory.current": "?"}, 1024 * 1024),
        (OLD_BOX, 100_003 + 24 * 1024),
        ({"proc/meminfo": "MemFree: 9 kB\n"}, None),
    ],
)
def test_what_is_free(tmp_path, files, want):
    for name, text in ({"proc/meminfo": MEMINFO} | files).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert checks.free_memory(tmp_path) == want


def test_what_is_free_where_nobody_knows(tmp_path, monkeypatch):
    assert checks.free_memory(tmp_path) is None
    monkeypatch.setattr(checks, "free_memory", lambda: None)
    checks.check_room(1 << 60)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_is_free_here():
    assert 1 << 20 < checks.free_memory() < 1 << 50


def test_what_would_fit_is_not_refused(monkeypatch):
    """A model that only reads takes no memory for its gradients."""
    shape = {"num_layers": 2, "num_heads": 4, "channels": 32, "seq_len": 16}
    config = TrainConfig(**shape, batch_size=2, backend="reference")
    cfg = config.model(200)
    sizes = footprint(gpt2_layout(cfg, 2, 16))
    reads = ("params", "acts", "logits", "block", "batch")
    least, whole = sum(sizes[x] for x in reads), sum(sizes.values())
    free = [whole]
    monkeypatch.setattr(checks, "free_memory", lambda: free[0])
    new_model(config, 200)
    free[0] = whole - 1
    with pytest.raises(MemoryError, match="needs 0.0 GB, this machine has"):
        new_model(config, 200)
    free[0] = least
    GPT2(cfg, 2, 16, "reference").forward(np.zeros((2, 16), np.int64))
    free[0] = least - 1
    with pytest.raises(MemoryError, match="batch_size, seq_len or model"):
        GPT2(cfg, 2, 16, "reference")


def test_a_group_over_the_one_before():
    layout = {
        "a": (np.float32, {"x": (40,)}),
        "b": (np.int32, {"y": (2,), "z": (1,)}, True),
        "b2": (np.float32, {"x": (30,)}, True),
        "c": (np.float32, {"x": (1,)}),
        "d": (np.float32, {"x": (50,)}, True),
        "e": (np.float32, {"x": (1,)}),
    }
    arena, sizes = Arena(layout), footprint(layout)
    assert sizes == {"a": 160, "b": 0, "b2": 0, "c": 4, "d": 196, "e": 4}
    offsets = {(g, name): at for g, name, _, _, at, _ in arena.table()}
    assert offsets["a", "x"] == offsets["b", "y"] == offsets["b2", "x"] == 0
    assert offsets["b", "z"] == 8
    assert offsets["c", "x"] == offsets["d", "x"] == 192
    assert offsets["e", "x"] == 448
    assert arena.nbytes == 512
    assert arena["a"]["x"].ctypes.data % 64 == 0


def test_logits_last_until_backward_and_blocks_share_their_place():
    model = GPT2(CFG, 2, 16)
    tokens = np.arange(32).reshape(2, 16)
    model.forward(tokens)
    first = model.logits.copy()
    model.forward(tokens, tokens)
    np.testing.assert_array_equal(model.logits, first)
    logits, block = (model.memory[g] for g in ("logits", "block"))
    assert np.shares_memory(logits["logits"], block["ln"])
    model.backward()
    grads = model.memory.flat("grads").copy()
    # what the blocks leave behind changes nothing
    for x in (*block.values(), *model.memory["dacts"].values()):
        x.fill(7)
    model.forward(tokens, tokens)
    model.backward()
    np.testing.assert_array_equal(model.memory.flat("grads"), grads)
