"""What does not fit in memory is refused in one line."""

import re

import pytest
from commands import SMALL, TINY

from llmnb.config import GPT2Config
from llmnb.model.gpt2 import GPT2


@pytest.mark.parametrize(("command", "says"), [
    ("train --out new " + TINY, "a smaller batch_size, seq_len or model"),
    ("train --out new --init {run} --limit 9999", "a smaller batch_size"),
    ("train --resume {run} --steps 9", "a smaller batch_size"),
    ("train --out new --corpus big.txt", "made with `llmnb data`"),
    ("train --out new --corpus .", "made with `llmnb data`"),
    ("generate {run}", "fewer or shorter texts"),
    ("generate {run} --backend reference", "a smaller batch_size"),
    ("eval {run} --text big.txt", "a smaller batch_size"),
    ("bench --steps 1 --turn 0 " + SMALL, "fewer precisions"),
])  # fmt: skip
def test_too_little_memory(failed, trained, tmp_path, free, command, says):
    """It is said in one line, and nothing is changed."""
    (tmp_path / "big.txt").write_text("spam " * 5000)
    free(20_000)
    before = {x: x.stat().st_mtime for x in trained.iterdir()}
    err = failed(*command.format(run=trained).split())
    assert err.count("\n") == 1 and says in err
    pattern = r"llmnb: error: needs [\d.]+ GB, this machine has 0.0 GB free:"
    assert re.match(pattern, err)
    assert {x: x.stat().st_mtime for x in trained.iterdir()} == before


def test_memory_goes_by_what_is_asked(done, failed, trained, tmp_path, free):
    free(20_000_000)
    ask = ["generate", trained, "--tokens", 4, "--samples"]
    failed(*ask, 100_000)
    done(*ask, 2)
    model = GPT2(GPT2Config(16, 300, 1, 2, 16), 2, 16, "reference")
    free(3 * model.memory.nbytes // 2)  # one of them fits, but not two
    ask = ["bench", "--steps", 1, "--turn", 0, *SMALL.split()]
    ask += ["--precision", "fp32"]
    assert "fewer precisions" in failed(*ask, "fp64")
    done(*ask)
    (tmp_path / "big.txt").write_text("spam " * 200_000)
    (tmp_path / "big.jsonl").write_text('{"text": "spam"}\n' * 50_000)
    free(600_000)
    ask = ["train", *TINY.split(), "--corpus"]
    done(*ask, "big.txt")  # 30,000 characters of it
    done(*ask, "big.jsonl")


def test_info_describes_a_model_that_is_too_large(done, free):
    free(1)
    assert "MB (params" in done("info", "--depth", 48, "--batch-size", 10**6)
