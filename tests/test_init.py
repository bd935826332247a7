"""The generator against PyTorch's recorded draws, and the first weights.

tests/data/parity_draws.json is written by record_parity.py, with torch.
"""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnb.config import GPT2Config, parameter_shapes
from llmnb.init import (
    CHUNK,
    Generator,
    MersenneTwister,
    box_muller,
    init_params,
)

DATA = Path(__file__).parent / "data"
RECORDED = json.loads((DATA / "parity_draws.json").read_text("utf-8"))

# torch 2.13.0, CPU: the first five of torch.empty(16).normal_() with
# manual_seed(137), and all of torch.empty(5).normal_() with manual_seed(137)
SIXTEEN = [0.22857945, 0.8203133, 0.0, 0.0, 0.0]


def empty_params(cfg, dtype=np.float32):
    shapes = parameter_shapes(cfg)
    return {name: np.full(s, 9, dtype) for name, s in shapes.items()}


def drawn(generator, n, mean=0.0, std=1.0):
    array = np.empty(n, np.float32)
    generator.normal_(array, mean, std)
    return array
