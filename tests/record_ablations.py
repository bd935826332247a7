"""Record what the settings of chapter 1.18's run are worth.

    python tests/record_ablations.py

trains that chapter's model again and again, each time with one setting
changed and from two or three seeds, and writes the validation losses to
data/ablations.csv. It takes the cpu backend, which computes the same numbers
up to rounding in a fraction of the time: a minute a run.
"""

import gzip
import json
import sys

import numpy as np
from recorded import DATA

from llmnb.config import GPT2Config
from llmnb.model.gpt2 import GPT2
from llmnb.model.tensors import decaying
from llmnb.text import tokenizer
from llmnb.text.data import DataLoader
from llmnb.train.schedule import learning_rate

B, T, V, STEPS, EVERY = 4, 64, 1024, 3000, 250
SHAPE = T, V, 2, 4, 64  # max_seq_len, vocab_size, num_layers, num_heads, C
DEFAULT = {"peak": 5e-3, "warmup": 150, "clip": 1.0, "beta2": 0.95}
CHANGES = {
    "as it is": {},
    "no warm-up": {"warmup": 0},
    "no clipping": {"clip": float("inf")},
    "beta2 0.999": {"beta2": 0.999},
    "peak 0.002": {"peak": 2e-3},
    "peak 0.01": {"peak": 1e-2},
}
SEEDS = (42, 43, 44)


def texts():
    """The chapter's tokens, to train on and to validate on."""
    with gzip.open(DATA / "library.jsonl.gz") as lines:
        text = "".join(json.loads(line)["text"] for line in lines)[:400_000]
    encoding = tokenizer.train([text[:200_000]], vocab_size=V)
    tokens = np.array(encoding.encode_ordinary(text), np.uint16)
    return tokens[: -len(tokens) // 10], tokens[-len(tokens) // 10 :]


def losses(cfg, learnt, held_out, seed, peak, warmup, clip, beta2):
    """The validation loss every EVERY steps, from before the first."""
    model = GPT2(cfg, B, T, backend="cpu", seed=seed)
    batches = DataLoader([learnt], B, T, seed=seed)
    validation = DataLoader([held_out], B, T, shuffle=False)
    count = (len(held_out) - 1) // (B * T)
    for step in range(STEPS + 1):
        if step % EVERY == 0:
            validation.reset()
            yield np.mean(
                [model.forward(*validation.next_batch()) for _ in range(count)]
            )
        model.forward(*batches.next_batch())
        model.backward()
        norm = model.clip_gradients(clip)
        assert np.isfinite(norm)
        rate = learning_rate(step, peak, warmup, STEPS, final=0.05)
        rules = {"beta2": beta2, "weight_decay": 0.1, "decay": decaying(cfg)}
        model.update(rate, step=step + 1, **rules)


def main():
    learnt, held_out = texts()
    rows = ["setting,seed," + ",".join(map(str, range(0, STEPS + 1, EVERY)))]
    for name, change in CHANGES.items():
        for seed in SEEDS if not change else SEEDS[:2]:
            what = GPT2Config(*SHAPE), learnt, held_out, seed
            found = [f"{x:.4f}" for x in losses(*what, **DEFAULT | change)]
            rows.append(",".join([name, str(seed), *found]))
            print(rows[-1][:14], rows[-1][-6:], file=sys.stderr, flush=True)
    (DATA / "ablations.csv").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
