"""What the tests of the commands share: a small run, and what befalls it."""

import io
import os
import signal
from pathlib import Path

import pytest

from llmnb.train import loop

TINY = (
    "--tokenizer byte --limit 30000 --num-layers 1 --num-heads 2 "
    "--channels 16 --seq-len 16 --batch-size 2 --steps 6 --eval-every 4 "
    "--backend reference"
)
# are read whole, and have a tokenizer
OF_SHARDS = TINY.replace("--tokenizer byte --limit 30000 ", "")
BYTES = "--tokenizer", "byte"
PARTS = "val", "train"
ROOT = Path(__file__).parents[1]
LIBRARY = Path(__file__).parent / "data" / "library.jsonl.gz"
FILES = ["config.json", "log.csv", "loss.png", "model.bin", "sample.txt",
         "state_00000006.safetensors", "tokenizer.tiktoken"]  # fmt: skip


def interrupt(monkeypatch, at, *numbers):
    """Have signals come while step `at` is computed."""
    whole = loop.train_step

    def interrupted(config, model, batches, progress):
        if progress.step == at:
            for number in numbers or [signal.SIGINT]:
                signal.raise_signal(number)
        return whole(config, model, batches, progress)

    monkeypatch.setattr(loop, "train_step", interrupted)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def warnings_in(err):
    """The warnings among the lines, each without its beginning."""
    lines = [x.rpartition("llmnb: warning: ") for x in err.splitlines()]
    return [x for _, found, x in lines if found]


def raising(kind=OSError, *args):
    def fail(*_, **how):
        raise kind(*args)

    return fail


TUNE = (
    "--corpus a.txt --batch-size 1 --seq-len 8 --steps 2 --eval-every 4 "
    "--backend reference"
)
SMALL = (
    "--num-layers 1 --num-heads 2 --channels 16 --seq-len 16 "
    "--batch-size 2 --vocab-size 300 --backend reference"
)


class Terminal(io.StringIO):
    """What a terminal is sent."""

    def isatty(self):
        return True


def broken(kind):
    """A stream whose reader has gone away, or whose disk is full."""
    if kind == "full":
        if not Path("/dev/full").exists():
            pytest.skip("no /dev/full")
        return open("/dev/full", "w")
    pipe = os.pipe if kind == "pipe" else pytest.importorskip("pty").openpty
    reader, writer = pipe()
    os.close(reader)
    return open(writer, "w")


OTHERS = {
    "generate": "generate {run} --prompt spam --tokens 9 --samples 2",
    "eval": "eval {run} --text {run}/config.json --limit 300",
    "plot": "plot {run}",
    "data": "data out --corpus {run}/log.csv --tokenizer byte",
    "info": "info",
    "bench": "bench --steps 1 --turn 0 --precision fp32 --json - " + SMALL,
    "help": "train --help",
}
