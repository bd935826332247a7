# Written by `make export` from notebooks/appendix/17_gpu.py: edit that file.

"""Find what a GPU's machine lacks, then measure there."""

__all__ = ["AGAIN", "BETTER", "NEEDS", "install", "library", "main"]


# find what is lacking
import importlib.util
import os
import signal
import subprocess
import sys
import time
from importlib.machinery import PathFinder
from pathlib import Path

AGAIN = 75  # the code of a measurement that another is to take up
_TRIES = 12
NEEDS = {"numba_cuda": "numba-cuda[cu13]>=0.30,<0.31", "numba": "numba"}
BETTER = {"nvmath": "nvmath-python>=1.0", "regex": "regex", "tqdm": "tqdm"}


def install(root):
    """Put what is lacking beside the checkout, root; the folder it is in.

    Wheels in root/wheels are taken as they are; else pip is asked.

    Derived in chapter A.17.
    """
    there, every = root / "build" / "gpu", NEEDS | BETTER
    wheels = sorted(map(str, (root / "wheels").glob("*.whl")))
    how = ["--no-index", "--no-deps", *wheels]
    if not wheels:  # one try, where nobody may answer
        how = [*_lacking(every, there), "--retries=1", "--timeout=9"]
    if wheels or _lacking(every, there):
        command = [sys.executable, "-m", "pip", "install", "-q", "--upgrade"]
        command += ["--no-input", "--target", str(there), *how]
        most = 120 if wheels or _lacking(NEEDS, there) else 30
        try:
            subprocess.run(command, timeout=most, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            print("pip could not install:", error, flush=True)
    for x in _lacking(every, there):
        much = "nothing" if x in NEEDS.values() else "less"
        print(f"without {x} {much} can be measured", flush=True)
    return there


def _lacking(every, there):
    """Of packages by module, those that are neither here nor in a folder."""
    importlib.invalidate_caches()  # the folder may be new
    return [
        wheel for name, wheel in every.items()
        if not (
            importlib.util.find_spec(name)
            or PathFinder.find_spec(name, [str(there)])
        )
    ]  # fmt: skip


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
    end = time.monotonic() + float(os.environ.get("LIMIT", 480))
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
    for _ in range(_TRIES):
        code = _measured(command, env, root, end)
        if time.monotonic() >= end or 0 <= code != AGAIN:
            break
        command = [*command, "--resume"]
    sys.exit(code)


def _measured(command, env, root, end):
    """The code with which a measurement ends, which it must by then."""
    process = subprocess.Popen(command, env=env, cwd=root)
    try:
        return process.wait(timeout=max(1.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        if os.name == "nt":  # which has no such signal
            process.terminate()
        else:
            process.send_signal(signal.SIGINT)  # closes what it has started
    try:
        return process.wait(timeout=10)
    except subprocess.TimeoutExpired:  # it hears nothing, deep in the driver
        process.kill()
        return 1


if __name__ == "__main__":
    main()
