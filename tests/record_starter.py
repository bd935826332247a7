"""Write a starter pack as llm.c's: a model and what PyTorch computes with it.

    python tests/record_starter.py FOLDER [d12 | large]

needs torch. FOLDER then holds NAME.bin, NAME_debug_state.bin and
NAME_losses.txt for `llmnb verify FOLDER`. The weights are random: a small
model; with d12, one of GPT-2's 124 million parameters; with large, one with
fewer tokens and with weights as large as trained ones.
"""

import sys
from pathlib import Path

import numpy as np

from llmnb.config import GPT2Config
from llmnb.formats.llmc import write_checkpoint
from llmnb.formats.starter import DebugState as State
from llmnb.formats.starter import write_debug_state as write_state

SMALL = GPT2Config(64, 300, 3, 4, 64)


def single(arrays):
    """The same in float32, by name."""
    return {k: x.astype(np.float32) for k, x in arrays.items()}


def write_pack(folder, name, cfg, params, state, losses):
    """Write the three files of a pack."""
    write_checkpoint(folder / f"{name}.bin", cfg, params)
    write_state(folder / f"{name}_debug_state.bin", cfg, state)
    text = "".join(f"{loss:.6f}\n" for loss in losses)
    (folder / f"{name}_losses.txt").write_text(text, "ascii")


def record(folder, cfg, batch_size, seq_len, name="gpt2_124M", spread=1):
    """Write a pack of a random model; spread: makes its weights larger."""
    import torch
    from record_parity import TorchGPT2, ten_steps

    torch.manual_seed(0)
    model = TorchGPT2(**vars(cfg))
    model.initialise(42)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p *= spread
    rng = np.random.default_rng(1)
    shape = batch_size, seq_len + 1
    tokens = rng.integers(0, cfg.vocab_size, shape, np.int32)
    params = single(model.tensors())
    optimizer = model.optimizer(1e-4, (0.9, 0.999), 0.01)
    found = ten_steps(model, optimizer, tokens)
    losses, grads = found["losses"], single(found["grads"])
    state = State(
        tokens[:, :-1], tokens[:, 1:], found["logits"], losses[0], grads
    )
    write_pack(Path(folder), name, cfg, params, state, losses)


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    if "d12" in sys.argv:
        record(sys.argv[1], GPT2Config(), 4, 64)
    elif "large" in sys.argv:
        large = GPT2Config(128, 5000, 12, 12, 768)
        record(sys.argv[1], large, 4, 64, spread=5)
    else:
        record(sys.argv[1], SMALL, 4, 32)
