"""Run tests or notebooks on every tile shape (chapter A.2), and on one thread.

    python tests/tiles.py                      all notebooks, on all of them
    python tests/tiles.py -s 6x2x8 -- ARGS     pytest with ARGS, on this one

A shape is taken as in test_tile: where the processor has the features, the
others are hidden from the compiler, elsewhere LLMNB_TILE asks for the shape.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

for room in ("cpu", "reference"):
    sys.path.insert(0, str(Path(__file__).with_name(room)))

from test_tile import OURS, SHAPES, chosen  # noqa: E402

ONE_THREAD = "one-thread"


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
