# Written by `make export` from notebooks/appendix/04_kernels.py: edit that file.

"""A second process that compiles a training step from its end."""

__all__ = ["HELPER", "compile_ahead", "compile_step", "main"]


# imports of the helper
import atexit
import contextlib
import gc
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numba
import numpy as np

from llmnb.cpu import attention, compiled, jit, panels
from llmnb.model.gpt2 import GPT2


# note what is wanted
def _wanted(step):
    """What a function would compile, in order: functions that do it.

    Nothing is compiled meanwhile, nor run; for a process that never will.
    """
    found, nowhere = [], SimpleNamespace(address=0)
    kept = jit._routine_for, panels.routine, jit._begin, jit._loop

    def noted(function):
        def note(*args):
            found.append(partial(function, *args))
            return nowhere

        return note

    jit._routine_for = noted(jit._routine_for)
    panels.routine = noted(panels.routine)
    jit._begin = jit._loop = lambda *args: nowhere
    step()
    jit._routine_for, panels.routine, jit._begin, jit._loop = kept
    return found


# what the helper does
def compile_step(record, precision):
    """Compile what a training step wants, and a clip, from the last on.

    record, precision: of a model, as `architecture_record` has it.

    Derived in chapter A.4.
    """
    from llmnb.model.architectures import architecture_from  # Part 5

    gc.disable()
    cfg = replace(architecture_from(record), num_layers=1, vocab_size=2)
    model = GPT2(cfg, 2, 2, "cpu", precision, seed=None)

    def step():
        model.forward(*np.zeros((2, 2, 2), int))
        model.backward()
        model.update()

    found = _wanted(step)
    long = [x for x in found if x.args[0].__module__ == attention.__name__]
    found = long + found[::-1] + _wanted(partial(model.clip_gradients, 1.0))
    compiled._read = partial(_read_or_mark, compiled._read)
    compiled._write = partial(_write_and_unmark, compiled._write)
    for compile_one in found:
        compile_one()


def main():
    """Compile ahead, until who asked for it is gone.

    The one argument of the process is of `compile_step`, in JSON.

    Derived in chapter A.4.
    """

    def outlive_nobody():
        sys.stdin.read()  # ends when the process at its other end does
        os._exit(0)

    threading.Thread(target=outlive_nobody, daemon=True).start()
    compile_step(*json.loads(sys.argv[1]))


# what the helper is at
def _mark(path):
    return path.with_suffix(".busy")


def _read_or_mark(read, path):
    """In the helper: who finds no kernel will make it."""
    data = read(path)
    with contextlib.suppress(OSError):
        if data is None:
            _mark(path).touch()
        else:  # one that was ended may have left its mark
            _mark(path).unlink(missing_ok=True)
    return data


def _write_and_unmark(write, path, data):
    write(path, data)
    with contextlib.suppress(OSError):
        _mark(path).unlink(missing_ok=True)


PATIENCE = 60  # seconds, for one kernel: far more than any takes


def _await_and_read(read, helper, path):
    """In the process that trains."""
    end = time.monotonic() + PATIENCE
    while _mark(path).exists() and not path.exists():
        if helper.poll() is not None or time.monotonic() > end:
            break
        time.sleep(0.005)
    return read(path)


# start it
HELPER = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); "
    "from llmnb.model.ahead import main; main()"
)


def compile_ahead(cfg, precision="fp32"):
    """Have a second process compile a training step's kernels, once.

    cfg, precision: of a GPT2 with the cpu backend. To be called before its
    first step; the process ends with this one at the latest.

    Derived in chapter A.4.
    """
    from llmnb.model.architectures import architecture_record  # Part 5

    folder = compiled.cache_folder()
    if folder is None or numba.get_num_threads() < 2:
        return
    what = json.dumps([architecture_record(cfg), precision])
    here = str(Path(__file__).parents[2])  # where this process found llmnb
    with contextlib.suppress(OSError):  # of a file that is there, for one
        (folder / f"{cfg.family}-{precision}.helped").touch(exist_ok=False)
        helper = subprocess.Popen(
            [sys.executable, "-P", "-c", HELPER, here, what],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        atexit.register(_end, helper)
        compiled._read = partial(_await_and_read, compiled._read, helper)
        gc.freeze()


def _end(helper):
    helper.kill()
    helper.wait()


if __name__ == "__main__":
    main()
