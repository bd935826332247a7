"""Run tests or notebooks on every tile shape (chapter A.2), and on one thread.

    python tests/tiles.py                      all notebooks, on all of them
    python tests/tiles.py -s 6x2x8 -- ARGS     pytest with ARGS, on this one

A shape is taken so: where the processor has the features, the
others are hidden from the compiler, elsewhere LLMNB_TILE asks for the shape.
"""

import argparse
import os
import platform
import subprocess
import sys

import llvmlite.binding as llvm

from llmnb.cpu import tile

SHAPES = {
    "8x3x16": {"avx512f", "avx2"},
    "6x2x8": {"avx", "avx2"},
    "6x4x4": {"neon"},
    "4x2x4": {"sse2"},
}
OURS = f"{tile.ROWS}x{tile.VECTORS}x{tile.LANES}"
# the features of x86 that are left to numba, for the tile that fits them
AVX2 = "+sse2,+sse4.2,+avx,+avx2,+fma"
MASKS = {"4x2x4": "+sse2", "6x2x8": AVX2}
ON_X86 = platform.machine().lower() in ("x86_64", "amd64")

ONE_THREAD = "one-thread"


def chosen(shape):
    """What has a process take a shape: few features, or the variable."""
    host = {k for k, has in llvm.get_host_cpu_features().items() if has}
    needed = MASKS.get(shape, "+nothing").replace("+", "").split(",")
    if ON_X86 and host.issuperset(needed):
        features = {"NUMBA_CPU_FEATURES": MASKS[shape]}
        return {"NUMBA_CPU_NAME": "generic"} | features
    return {"LLMNB_TILE": shape}


def variables(name):
    """What a process needs in its environment, for a shape or one thread."""
    if name == ONE_THREAD:
        return {"NUMBA_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    return {} if name == OURS else chosen(name)


def main():
    parser = argparse.ArgumentParser("python tests/tiles.py")
    known = [*SHAPES, ONE_THREAD, "other"]
    parser.add_argument(
        "-s", "--shape", action="append", choices=known,
        help="other: the first that is not this machine's own",
    )  # fmt: skip
    parser.add_argument("args", nargs="*", help="of pytest")
    asked = parser.parse_args()
    other = next(name for name in SHAPES if name != OURS)
    failed = []
    for name in asked.shape or [*SHAPES, ONE_THREAD]:
        name = other if name == "other" else name
        print(f"=== {name}", flush=True)
        what = asked.args or ["notebooks"]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "--nbval", *what],
            env={**os.environ, **variables(name)},
        )
        failed += [name] if done.returncode else []
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
