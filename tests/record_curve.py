"""Record PyTorch's training curves, which chapters 1.18 and 2.7 lay ours over.

    python tests/record_curve.py

needs torch (`pip install -e .[parity]`) and writes two files from
tests/data/curve_tokens.bin. Each holds 200 steps of the model in
record_parity.py: torch_curve.csv in float32, and once more in float64 from
the same float32 weights; torch_curve_bf16.csv in float32 under autocast to
bfloat16. A file that would change only in its date is left as it is.
"""

import math

import numpy as np
import torch
from record_parity import SIZES, TorchGPT2, provenance
from recorded import DATA
from torch import nn

from llmnb.formats.shard import read_shard

B, T, STEPS, WARMUP, SEED = 8, 64, 200, 20, 42
PEAK, FINAL = 2e-3, 2e-4
MODEL = dict(zip(SIZES, (T, 257, 2, 4, 64), strict=True))
RULES = {"betas": [0.9, 0.95], "weight_decay": 0.1, "decay": "2-D"}


def learning_rate(step):
    if step < WARMUP:
        return PEAK * (step + 1) / WARMUP
    part = (step - WARMUP) / (STEPS - WARMUP)
    return FINAL + (PEAK - FINAL) * 0.5 * (1 + math.cos(math.pi * part))


def curve(tokens, dtype, bf16=False):
    """The loss of each step, before its update.

    bf16: whether the forward pass runs under autocast to bfloat16; the
    backward pass then takes the same types, as autocast means it to.
    """
    model = TorchGPT2(**MODEL)
    model.initialise(SEED)
    model.to(dtype)
    optimizer = model.optimizer(PEAK, **RULES)
    # eight readers, each in its own eighth of the text: the text's changes
    # reach a batch one row at a time
    rows = torch.arange(B)[:, None] * STEPS * T + torch.arange(T + 1)
    losses = []
    for step in range(STEPS):
        windows = tokens[rows + step * T]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = model.loss(model(windows[:, :-1]), windows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        losses.append(loss.item())
    return losses


def write(path, **columns):
    """Losses by step, after what made them."""
    order = "row b of step s is tokens[(200 b + s) 64 : (200 b + s) 64 + 65]"
    facts = {**provenance(), "seed": SEED, "batch": order}
    lines = [f"# {key}: {value}" for key, value in facts.items()]
    lines.append(",".join(["step", *columns]))
    for step, losses in enumerate(zip(*columns.values(), strict=True)):
        lines.append(f"{step}," + ",".join(f"{x:.9g}" for x in losses))

    def undated(lines):
        return [x for x in lines if not x.startswith("# date")]

    old = path.read_text("utf-8").splitlines() if path.exists() else []
    if undated(old) == undated(lines):
        print(f"{path.name}: unchanged")
        return
    path.write_text("\n".join(lines) + "\n", "utf-8")
    print(f"{path.name}: {columns['loss'][0]} -> {columns['loss'][-1]}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    tokens = read_shard(DATA / "curve_tokens.bin").astype(np.int64)
    tokens = torch.from_numpy(tokens)
    both = {"loss": torch.float32, "loss64": torch.float64}
    columns = {name: curve(tokens, dtype) for name, dtype in both.items()}
    write(DATA / "torch_curve.csv", **columns)
    half = curve(tokens, torch.float32, bf16=True)
    write(DATA / "torch_curve_bf16.csv", loss=half)
