# Written by `make export` from notebooks/appendix/17_gpu.py: edit that file.

"""Find what a GPU's machine lacks, then measure there."""

__all__ = ["BETTER", "NEEDS", "install", "library", "main"]


# find what is lacking
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

NEEDS = {"numba_cuda": "numba-cuda[cu13]>=0.30,<0.31", "numba": "numba"}
BETTER = {"nvmath": "nvmath-python>=1.0", "regex": "regex", "tqdm": "tqdm"}


def install(root):
    """Put what is lacking beside the checkout, root; the folder it is in.

    Wheels in root/wheels are taken as they are; else pip is asked.

    Derived in chapter A.17.
    """
    there = root / "build" / "gpu"
    wheels = sorted(map(str, (root / "wheels").glob("*.whl")))
    lacking = [
        wheel
        for name, wheel in (NEEDS | BETTER).items()
        if importlib.util.find_spec(name) is None
    ]
    how = ["--no-index", "--no-deps", *wheels] if wheels else lacking
    if how:
        command = [sys.executable, "-m", "pip", "install", "-q", "--upgrade"]
        done = subprocess.run([*command, "--target", str(there), *how])
        if done.returncode:
            print("pip could not install:", *how)
    return there


def library(name="libnvvm.so.4", roots=("/usr/local", "/opt", "/usr/lib")):
    """The folder of a library of NVIDIA's toolkit; empty if nowhere.

    Derived in chapter A.17.
    """
    found = (x for root in roots for x in Path(root).glob(f"cuda*/**/{name}"))
    return next((str(x.parent) for x in found), "")


# start the measurement
def main(argv=None):
    """Install, find, and measure; ends with the measurement's code.

    Derived in chapter A.17.
    """
    argv = sys.argv[1:] if argv is None else argv
    root = Path(__file__).parents[2]
    env = dict(os.environ)
    for name, *found in (
        ("PYTHONPATH", str(root), str(install(root))),
        ("LD_LIBRARY_PATH", library()),
    ):
        every = [*found, os.environ.get(name, "")]
        env[name] = os.pathsep.join(filter(None, every))
    command = [sys.executable, "-m", "llmnb.bench.gpu", *argv]
    process = subprocess.Popen(command, env=env, cwd=root)
    try:
        code = process.wait(timeout=float(os.environ.get("LIMIT", 480)))
    except subprocess.TimeoutExpired:
        if os.name == "nt":  # which has no such signal
            process.terminate()
        else:
            process.send_signal(signal.SIGINT)  # closes what it has started
        code = process.wait()
    sys.exit(code)


if __name__ == "__main__":
    main()
