"""Runs whose blocks learn in the backward pass: `--in-backward`."""

from dataclasses import replace

import numpy as np
import pytest
from runs import PLAIN, cut_and_resumed, files_of, straight, weights

from llmnb import checks
from llmnb.model.inbackward import InBackward
from llmnb.train.options import TrainConfig
from llmnb.train.rehearsal import rehearse
from llmnb.train.run import begin, finish
from llmnb.train.start import new_model

LEAN = replace(PLAIN, clip=0, save_every=4, in_backward=True)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_it_is_the_plain_run_to_the_bit(tmp_path, arch, backend):
    lean = replace(LEAN, arch=arch, backend=backend)
    ours, rows = straight(tmp_path / "ours", lean)
    plain, want = straight(
        tmp_path / "plain", replace(lean, in_backward=False)
    )
    assert isinstance(ours.model, InBackward)
    assert np.array_equal(weights(ours), weights(plain))
    for row, other in zip(rows, want, strict=True):
        norm = row.grad_norm and pytest.approx(row.grad_norm, rel=1e-5)
        same = other._replace(tokens_per_second=row.tokens_per_second)
        assert same._replace(grad_norm=row.grad_norm) == row
        assert other.grad_norm == norm
    for run in ours, plain:
        finish(run)
    models = (files_of(x.folder) for x in (ours, plain))
    name = "model.bin" if arch == "gpt2" else "model.safetensors"
    assert len({found[name] for found in models}) == 1


def test_a_resumed_run_is_the_straight_run(tmp_path):
    run, _ = cut_and_resumed(tmp_path, 7, LEAN)
    assert isinstance(run.model, InBackward)


@pytest.mark.parametrize(
    "other",
    [
        {"clip": 1.0}, {"skip_loss": 3.0}, {"skip_norm": 3.0},
        {"total_batch": 64}, {"backend": "cuda"},
    ],
    ids=str,
)  # fmt: skip
def test_what_needs_the_whole_gradient_is_refused(other):
    [(name, value)] = other.items()
    with pytest.raises(ValueError, match=rf"wants {name} .*, got {value}$"):
        replace(LEAN, **other)
    assert replace(LEAN, in_backward=False, **other)
    assert replace(LEAN, total_batch=LEAN.batch_size * LEAN.seq_len)


def test_a_group_is_refused(tmp_path):
    def start(member):
        with pytest.raises(ValueError, match="one process, got a group of 2"):
            begin(tmp_path, LEAN, member)

    rehearse(2, start)


def test_a_model_that_fits_in_this_way_alone_is_trained(monkeypatch):
    shape = {"num_layers": 6, "channels": 32, "backend": "reference"}
    lean = TrainConfig(**shape, seq_len=8, clip=0, in_backward=True)
    size = new_model(lean, 50).memory.nbytes
    monkeypatch.setattr(checks, "free_memory", lambda: size)
    new_model(lean, 50)
    with pytest.raises(MemoryError, match="this machine has"):
        new_model(replace(lean, in_backward=False), 50)
