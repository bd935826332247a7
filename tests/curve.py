"""The run whose curve PyTorch has recorded."""

from pathlib import Path

import numpy as np

from llmnb.formats.shard import read_shard
from llmnb.text.readers import Readers
from llmnb.train.options import TrainConfig

RECORDED = Path(__file__).parent / "data"


def recorded_curve(name):
    """PyTorch's losses: a row a step, the columns as the file names them."""
    lines = (RECORDED / f"{name}.csv").read_text("utf-8").splitlines()
    rows = [x.split(",") for x in lines if x[0].isdigit()]
    assert len(rows) == 200
    return np.array(rows, float)


def recorded_batches():
    """The batches of that run, each row in its own eighth of the text."""
    return Readers(read_shard(RECORDED / "curve_tokens.bin"), 8, 64)


CURVE = TrainConfig(
    tokenizer="byte",
    num_layers=2,
    channels=64,
    seq_len=64,
    batch_size=8,
    steps=200,
    learning_rate=2e-3,
)
