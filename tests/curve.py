"""The run whose curve PyTorch has recorded."""

from pathlib import Path

import numpy as np

from llmnb.formats.shard import read_shard
from llmnb.train.options import TrainConfig

RECORDED = Path(__file__).parent / "data"


class Readers:
    """Row b of the batch reads part b of the text."""

    def __init__(self, B=8, T=64):
        tokens = np.array(read_shard(RECORDED / "curve_tokens.bin"), np.int32)
        self.x, self.y = (
            a.reshape(B, -1, T) for a in (tokens[:-1], tokens[1:])
        )
        self.step = -1

    def next_batch(self):
        self.step += 1
        return self.x[:, self.step], self.y[:, self.step]


CURVE = TrainConfig(
    tokenizer="byte",
    num_layers=2,
    channels=64,
    seq_len=64,
    batch_size=8,
    steps=200,
    learning_rate=2e-3,
)
