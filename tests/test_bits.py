"""The bits of every layer, of cold and warm processes and any threads."""

import json
import os
import subprocess
import sys

import bits as recorder
import pytest

PROGRAM = """
import hashlib, json
import numpy as np
import llmnb
from llmnb import cpu

bits = {}

def spy(name):
    function = getattr(cpu, name)
    def call(*args, **how):
        function(*args, **how)
        arrays = [x for x in args if isinstance(x, np.ndarray)]
        hashed = hashlib.sha256(b"".join(x.tobytes() for x in arrays))
        bits.setdefault(name, []).append(hashed.hexdigest()[:12])
    setattr(cpu, name, call)

LAYERS = "encoder", "layernorm", "matmul", "attention", "gelu"
LAYERS += ("crossentropy_softmax",)
for layer in LAYERS:
    spy(f"{layer}_forward")
    spy(f"{layer}_backward")
spy("adamw_update")
sizes = [(2, 5, 6, 2), (3, 33, 48, 4), (2, 64, 128, 4), (1, 40, 51, 3)]
for precision in ("fp32", "fp64"):
    for B, T, C, NH in sizes:
        cfg = llmnb.GPT2Config(T, 130, 2, NH, C)
        model = llmnb.GPT2(cfg, B, T, precision=precision)
        tokens = np.random.default_rng(0).integers(0, 130, (B, T))
        for step in (1, 2):
            model.forward(tokens, tokens[:, ::-1])
            model.backward()
            model.clip_gradients(0.1)
            model.update(1e-3, step=step)
print(json.dumps(bits))
"""


def of_layers(cache, threads):
    """Hashes of what each call of each layer leaves, in a new process."""
    variables = {**os.environ, "LLMNB_CACHE": str(cache)}
    variables["NUMBA_NUM_THREADS"] = str(threads)
    command = [sys.executable, "-c", PROGRAM]
    return json.loads(subprocess.check_output(command, env=variables))


def test_bits_do_not_depend_on_the_cache_or_the_threads(tmp_path):
    """A process that compiles its kernels computes what one that loads them
    does: a run that is resumed must go on with the same bits."""
    cold = of_layers(tmp_path, 2)
    assert len(cold) == 13
    assert sum(map(len, cold.values())) > 700
    assert of_layers(tmp_path, 2) == cold
    assert of_layers(tmp_path, 1) == cold


@pytest.mark.parametrize("part", ["on_host", "on_simulator", "run_folder"])
def test_the_bits_are_the_recorded_ones(part):
    """Losses, logits, gradients, weights and files, commit after commit."""
    record = json.loads(recorder.RECORD.read_text())
    if recorder.machine() not in record:
        pytest.skip(f"no record for {recorder.machine()}; see tests/bits.py")
    found = getattr(recorder, part)()
    if part == "run_folder":
        found = {"run folder": found}
    assert not recorder.different(found, record[recorder.machine()])
