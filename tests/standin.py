"""A driver that stands in for NVIDIA's: what is asked of it, counted.

It is compiled from gpu/standin_libcuda.c, where there is a C compiler, and a
program of its own runs with it in the driver's place. The program finds two
functions: counts(*names), and refused(), the first thing that was refused.
"""

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

from processes import python

from llmnb.gpu.toolkit import absent

SOURCE = Path(__file__).parent / "gpu" / "standin_libcuda.c"
COUNTS = """
import ctypes
import numpy as np

driver = ctypes.CDLL("libcuda.so.1")
driver.standin.restype = ctypes.c_long
driver.standin_refused.restype = ctypes.c_char_p


def counts(*names):
    return [driver.standin(x.encode()) for x in names]


def refused():
    return driver.standin_refused().decode()

"""


def no_compiler():
    """Why no stand-in can be compiled here; else empty."""
    if not sys.platform.startswith("linux"):
        return "the stand-ins are for Linux"
    if not shutil.which("cc"):
        return "there is no C compiler, cc, for the stand-ins"
    return ""


def no_standin():
    """Why there is no driver's stand-in here; else empty."""
    return no_compiler() or absent()


def compiled(folder):
    """Compile it into a folder; the environment that puts it in place."""
    library = folder / "libcuda.so.1"
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", library, SOURCE]
    subprocess.run(command, check=True)
    paths = {"LD_LIBRARY_PATH": str(folder)}
    return paths | {"LLMNB_CUDA": "", "LLMNB_MATMUL": "llmnb"}


def compiled_nccl(folder):
    """Compile NCCL's stand-in, from gpu/standin_libnccl.c; its path."""
    library = folder / "libnccl.so.2"
    command = ["cc", "-shared", "-fPIC", "-O1", "-pthread"]
    command += ["-Wl,-soname,libnccl.so.2", "-o", library]
    source = SOURCE.with_name("standin_libnccl.c")
    subprocess.run([*command, source, "-lrt", "-ldl"], check=True)
    return library


def runner(environment):
    """A function that runs a program on it; gives what that prints."""

    def run(code, *args, **others):
        done = python(COUNTS + code, *args, **environment | others)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    run.plain = partial(python, **environment)
    run.folder = environment["LD_LIBRARY_PATH"]
    return run


STEPS = """
import json, sys
from llmnb import GPT2, GPT2Config
from llmnb.model.architectures import PRESETS
cfg, B, T, precision = json.loads(sys.argv[1])
cfg = PRESETS[cfg] if isinstance(cfg, str) else GPT2Config(*cfg)
model = GPT2(cfg, B, T, "cuda", precision, seed=None)
batch, rows = np.zeros((2, B, T), int), []
names = ("allocations", "launches", "recorded", "recorded_copies", "copies",
         "recordings", "replays", "replayed", "refusals")
for k in range(1, 5):
    driver.standin_reset()
    model.step(*batch, 1.0, step=k, decay=["wte"])
    rows.append(dict(zip(names, counts(*names))))
print(json.dumps([rows, refused(), model.memory.nbytes]))
"""


def check_steps(run, cfg, B, T, precision="fp32"):
    """A step is recorded once and replayed; its launches, and the memory.

    No allocation, and no copy but the batch, the settings, the results.
    cfg: GPT2Config's arguments, or the name of a preset.
    """
    how = json.dumps([cfg, B, T, precision])
    rows, refused, nbytes = json.loads(run(STEPS, how))
    first, second, *later = rows
    launches = first["launches"]
    for row in rows:
        assert row["allocations"] == row["recorded_copies"] == 0
        assert row["copies"] == 6  # 2 of the batch, 2 of settings, 2 back
        assert row["refusals"] == 0
    assert second["recorded"] == second["replayed"] == launches
    assert (second["launches"], second["recordings"]) == (0, 1)
    for row in later:
        assert row["launches"] == row["recorded"] == row["recordings"] == 0
        assert (row["replays"], row["replayed"]) == (1, launches)
    assert refused == ""
    return launches, nbytes
