"""Softmax and cross-entropy on a GPU: right, counted and compiled."""

import numpy as np
import pytest
from gpu import both, check_layer, check_machine_code, there
from layers import NAMED, problem

from llmnb.bench.rungs_crossentropy import loss_by_threads
from llmnb.cuda import crossentropy as layer
from llmnb.gpu.simulator import watch
from llmnb.reference import crossentropy as reference

# (B, T, V, Vp): one logit, padding or none, rows that vectors cannot move,
# rows for one warp and for several
SHAPES = [
    (1, 1, 1, 1),
    (1, 5, 3, 4),
    (1, 2, 5, 5),
    (3, 11, 33, 36),
    (1, 3, 64, 64),
    (2, 2, 101, 128),
    (1, 3, 257, 259),
    (1, 1, 1030, 1280),
]
GPT2 = 1, 1, 50257, 50304


def draw(shape, logits=None):
    """The arguments of both passes."""
    (*sizes, V, Vp), row = shape, NAMED["crossentropy_softmax"]
    p = problem(row, np.float32, row.sized(*sizes, V, Vp - V))
    p["logits"][...] = p["logits"] - 20 if logits is None else logits
    p["logits"][..., V:] = np.nan
    return [arrays for _, arrays in both(row, p)]


def run_forward(shape, logits=None, run=layer.crossentropy_softmax_forward):
    arrays = draw(shape, logits)[0]
    want = reference.crossentropy_softmax_forward
    return check_layer(run, want, arrays, ["losses", "lse"])


def run_by_threads(shape, logits=None):
    return run_forward(shape, logits, loss_by_threads)


def run_backward(shape, logits=None):
    arrays = draw(shape, logits)[1]
    # exp(z - lse) rounds its argument: the error grows with the logits
    largest = float(np.abs(arrays["logits"][..., : shape[2]]).max())
    layers = [m.crossentropy_softmax_backward for m in (layer, reference)]
    return check_layer(*layers, arrays, ["dlogits"], 2e-6 + 2e-7 * largest)


every = pytest.mark.parametrize(
    "run", [run_forward, run_backward, run_by_threads]
)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every
def test_it_equals_the_reference(run, shape):
    run(shape)


def extreme(shape):
    """Rows of +-80, of equal logits, rising, falling, with -1e30 in some."""
    B, T, V, Vp = shape
    logits = np.zeros((B, T, Vp), np.float32)
    rows = logits.reshape(-1, Vp)[:, :V]
    rising, rows[4:] = np.linspace(-80, 80, V), -1e30
    rows[0] = 80 * np.where(np.arange(V) % 3, 1, -1)
    rows[1], rows[2], rows[3] = -80, rising, rising[::-1]
    rows[4, 1::2], rows[5, V - 1] = 1.5, 3
    return logits


@every
@pytest.mark.parametrize("shape", [(1, 7, 37, 40), (1, 7, 293, 384)], ids=str)
def test_extreme_logits(run, shape):
    """No infinity and no NaN on the way, which fastmath rules out."""
    logits, targets = extreme(shape), draw(shape)[0]["targets"]
    hit = np.take_along_axis(logits, targets[..., None], -1)
    # a loss of 1e30 would hide the errors of the others
    np.put_along_axis(logits, targets[..., None], np.maximum(hit, -90), -1)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        run(shape, logits)


def test_machine_code(monkeypatch):
    """No spills; vectors of four where the chapter says so."""
    monkeypatch.setattr("llmnb.gpu.launch.simulate", lambda *args: None)
    with watch() as seen:
        forward, backward = draw((1, 1, 2053, 2112))
        layer.crossentropy_softmax_forward(*there(forward).values())
        layer.crossentropy_softmax_backward(*there(backward).values())
        loss_by_threads(*there(draw(GPT2)[0]).values())
    made = check_machine_code(seen, registers=64)
    names = "_loss_by_blocks", "_slopes_by_blocks", "_loss_by_threads"
    assert set(made) == set(names)
    for name, compiled in made.items():
        assert (compiled.vector_loads > 0) == ("blocks" in name), name
        assert (compiled.vector_stores > 0) == ("slopes" in name), name
        assert "ex2.approx" in compiled.ptx, name
