"""Softmax and cross-entropy on a GPU: every version, counted and compiled."""

import numpy as np
import pytest
from gpu import PLACES, check_layer, check_machine_code

from llmnb.cuda import crossentropy as layer
from llmnb.cuda.crossentropy import (
    CROSSENTROPY_SOFTMAX_BACKWARD,
    CROSSENTROPY_SOFTMAX_FORWARD,
    FUSED_CLASSIFIER,
    SOFTMAX_BACKWARD,
    SOFTMAX_FORWARD,
)
from llmnb.cuda.launch import simulated, to_host
from llmnb.cuda.simulator import watch
from llmnb.reference import crossentropy as reference

# (B, T, V, Vp): one logit, padding or none, rows that vectors cannot move,
# rows for one warp and for several, more rows than a block of warps
SHAPES = [
    (1, 1, 1, 1),
    (1, 5, 3, 4),
    (1, 2, 5, 5),
    (3, 11, 33, 36),
    (1, 3, 64, 64),
    (2, 2, 101, 128),
    (1, 2, 331, 384),
    (1, 3, 257, 259),
    (1, 1, 1030, 1280),
]


def ladder(versions):
    return pytest.mark.parametrize("version", range(1, len(versions) + 1))


shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def nothing(*shape):
    return np.full(shape, np.nan, np.float32)


def draw(shape, seed=0):
    """logits with NaN in the padding, targets, dlosses, numbers to add to."""
    B, T, V, Vp = shape
    rng = np.random.default_rng(seed)
    logits = (6 * rng.normal(size=(B, T, Vp))).astype(np.float32)
    logits[..., V:] = np.nan
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    dlosses = rng.normal(size=(B, T)).astype(np.float32)
    other = rng.normal(size=(B, T, Vp)).astype(np.float32)
    return logits, targets, dlosses, other


def probabilities(shape, seed=0):
    logits, targets, dlosses, other = draw(shape, seed)
    probs = np.empty_like(logits)
    reference.softmax_forward(probs, logits, shape[2])
    return probs, targets, dlosses, other


def tolerance(logits, V):
    """exp(z - lse) rounds its argument: the error grows with the logits."""
    return 2e-6 + 2e-7 * float(np.abs(logits[..., :V]).max())


def run_softmax(shape, version, logits=None):
    B, T, V, Vp = shape
    logits = draw(shape)[0] if logits is None else logits
    arrays = {"probs": nothing(B, T, Vp), "logits": logits, "V": V}
    tol = tolerance(logits, V)
    check = check_layer, layer.softmax_forward, reference.softmax_forward
    return check[0](*check[1:], arrays, ["probs"], tol, version=version)


def run_forward(shape, version, logits=None):
    B, T, V, _ = shape
    drawn, targets, _, _ = draw(shape)
    logits = drawn if logits is None else logits
    arrays = {
        "losses": nothing(B, T),
        "lse": nothing(B, T),
        "logits": logits,
        "targets": targets,
        "V": V,
    }
    return check_layer(
        layer.crossentropy_softmax_forward,
        reference.crossentropy_softmax_forward,
        arrays,
        ["losses", "lse"],
        version=version,
    )


def row_lse(logits, V):
    wide = logits[..., :V].astype(np.float64)
    top = wide.max(-1)
    return top + np.log(np.exp(wide - top[..., None]).sum(-1))


def run_backward(shape, version, logits=None):
    B, T, V, Vp = shape
    drawn, targets, dlosses, _ = draw(shape)
    logits = drawn if logits is None else logits
    arrays = {
        "dlogits": nothing(B, T, Vp),
        "dlosses": dlosses,
        "logits": logits,
        "lse": row_lse(logits, V).astype(np.float32),
        "targets": targets,
        "V": V,
    }
    return check_layer(
        layer.crossentropy_softmax_backward,
        reference.crossentropy_softmax_backward,
        arrays,
        ["dlogits"],
        tolerance(logits, V),
        version=version,
    )


def both(losses, logits, dlosses, targets, V):
    """What fused_classifier does, by the reference."""
    lse = np.empty_like(losses)
    reference.crossentropy_softmax_forward(losses, lse, logits, targets, V)
    reference.crossentropy_softmax_backward(
        logits, dlosses, logits, lse, targets, V
    )


def run_classifier(shape, version, logits=None):
    B, T, V, _ = shape
    drawn, targets, dlosses, _ = draw(shape)
    logits = drawn if logits is None else logits
    arrays = {
        "losses": nothing(B, T),
        "logits": logits,
        "dlosses": dlosses,
        "targets": targets,
        "V": V,
    }
    return check_layer(
        layer.fused_classifier,
        both,
        arrays,
        ["losses", "logits"],
        tolerance(logits, V),
        version=version,
    )


RUNS = [
    (run, version)
    for run, versions in (
        (run_softmax, SOFTMAX_FORWARD),
        (run_forward, CROSSENTROPY_SOFTMAX_FORWARD),
        (run_backward, CROSSENTROPY_SOFTMAX_BACKWARD),
        (run_classifier, FUSED_CLASSIFIER),
    )
    for version in range(1, len(versions) + 1)
]
every = pytest.mark.parametrize(
    ("run", "version"), RUNS, ids=[f"{r.__name__[4:]}-{v}" for r, v in RUNS]
)


@shapes
@every
def test_a_version_equals_the_reference(run, version, shape):
    run(shape, version)


@shapes
@ladder(SOFTMAX_BACKWARD)
def test_the_softmax_gradient(shape, version):
    probs, _, _, dprobs = probabilities(shape)
    arrays = {
        "dlogits": draw(shape, 1)[3],
        "dprobs": dprobs,
        "probs": probs,
    }
    fun = layer.softmax_backward, reference.softmax_backward
    check_layer(*fun, arrays, ["dlogits"], version=version)


@shapes
def test_the_surprise_and_its_gradient(shape):
    probs, targets, dlosses, dprobs = probabilities(shape)
    arrays = {"losses": nothing(*shape[:2]), "probs": probs}
    arrays["targets"] = targets
    fun = layer.crossentropy_forward, reference.crossentropy_forward
    check_layer(*fun, arrays, ["losses"])
    probs[...] = (probs + 0.5) / 2  # so that 1 / p stays comparable
    arrays = {"dprobs": dprobs, "dlosses": dlosses, "probs": probs}
    arrays["targets"] = targets
    fun = layer.crossentropy_backward, reference.crossentropy_backward
    check_layer(*fun, arrays, ["dprobs"])


def extreme(shape):
    """Rows of +-80, of equal logits, rising, falling, with -1e30 in some."""
    B, T, V, Vp = shape
    logits = nothing(B, T, Vp)
    rows = logits.reshape(-1, Vp)[:, :V]
    rows[0] = 80 * np.where(np.arange(V) % 3, 1, -1)
    rows[1] = -80
    rows[2] = np.linspace(-80, 80, V)
    rows[3] = np.linspace(80, -80, V)
    rows[4] = 1.5
    rows[4, ::2] = -1e30
    rows[5] = -1e30
    rows[5, V - 1] = 3
    rows[6] = -1e30
    return logits


@every
@pytest.mark.parametrize("shape", [(1, 7, 37, 40), (1, 7, 293, 384)], ids=str)
def test_extreme_logits(run, version, shape):
    """No infinity and no NaN on the way, which fastmath rules out."""
    logits, (_, targets, _, _) = extreme(shape), draw(shape)
    hit = np.take_along_axis(logits, targets[..., None], -1)
    # a loss of 1e30 would hide the errors of the others
    np.put_along_axis(logits, targets[..., None], np.maximum(hit, -90), -1)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        run(shape, version, logits)


def test_a_probability_of_zero():
    for place in PLACES:
        probs = place(np.array([[[0, 1, 0, 0]]], np.float32))
        targets = place(np.array([[2]], np.int32))
        losses = place(nothing(1, 1))
        layer.crossentropy_forward(losses, probs, targets)
        np.testing.assert_allclose(to_host(losses), [[87.33655]], rtol=1e-6)


GPT2 = (1, 1, 50257, 50304)


@pytest.mark.parametrize(
    ("run", "version"),
    [(run_softmax, 5), (run_forward, 2), (run_backward, 2)]
    + [(run_classifier, 1), (run_classifier, 2)],
)
def test_a_row_of_gpt2(run, version):
    """An odd number of logits in a row that is padded to a multiple of 128.

    Each logit is read once or twice, in vectors of four but the last.
    """
    seen = run(GPT2, version)
    V, Vp = GPT2[2:]
    again = {1: V, 2: V - 24576}[version] if run is run_classifier else 0
    reads = {run_softmax: 2 * V, run_classifier: V + again}.get(run, V)
    assert 0 <= seen.read_bytes - 4 * reads < 13000, "a thread's targets"
    if run is not run_forward:
        assert 0 <= seen.written_bytes - 4 * Vp <= 4


def test_rows_that_the_classifier_keeps():
    for shape in ((1, 2, 2049, 2052), (1, 1, 24579, 24580)):
        seen = run_classifier(shape, 2)
        kernels = [x[0].__name__ for x in seen.launches]
        assert kernels == ["_classify_kept"]


def test_the_ladder_of_the_softmax():
    """What the chapter says that each version moves less of."""
    thread, warp, block, online, fours = (
        run_softmax((1, 32, 125, 128), v) for v in range(1, 6)
    )
    n, padded = 32 * 125, 32 * 128
    assert warp.reads == block.reads == 3 * n
    assert online.reads == 2 * n
    assert fours.read_bytes == online.read_bytes
    for seen in (thread, warp, block, online, fours):
        assert seen.written_bytes == 4 * padded
    assert thread.sectors > 6 * warp.sectors
    assert online.sectors < 0.8 * block.sectors
    assert online.barriers * 4 == block.barriers
    online, fours = (run_softmax((1, 1, 1021, 1024), v) for v in (4, 5))
    assert fours.requests < 0.3 * online.requests


def test_fusing_saves_lse_and_a_launch():
    """lse is neither written nor read; version 2 reads its row once."""
    shape = 1, 1, 2053, 2112
    parts = run_forward(shape, 2), run_backward(shape, 2)
    twice, once = run_classifier(shape, 1), run_classifier(shape, 2)
    assert len(twice.launches) == len(once.launches) == 1
    written = sum(x.written_bytes for x in parts)
    assert twice.written_bytes == once.written_bytes == written - 4
    reads = once.reads - 3 * 512  # a thread's target, right logit, dloss
    assert once.read_bytes - 4 * 3 * 512 == 4 * 2053 + 4
    assert reads == 2052 // 4 + 2, "the last logit is read twice"


@pytest.mark.parametrize("place", PLACES)
def test_an_array_that_begins_between_vectors(place):
    rng = np.random.default_rng(3)
    flat = rng.normal(size=1 + 2 * 40).astype(np.float32)
    rows = flat[1:].reshape(1, 2, 40)
    want, probs = np.empty_like(rows), place(nothing(1, 2, 40))
    reference.softmax_forward(want, rows, 37)
    with watch() as seen:
        layer.softmax_forward(probs, place(flat)[1:].reshape(1, 2, 40), 37)
    np.testing.assert_allclose(to_host(probs), want, rtol=1e-5)
    if place is simulated:
        assert seen.reads == 2 * 2 * 37, "one by one"


def test_machine_code():
    """No spills; vectors of four where the chapter says so."""
    made = {}
    shape = 1, 1, 2053, 2112
    for run, version in RUNS:
        made |= check_machine_code(run(shape, version))
    for name, compiled in made.items():
        wide = any(x in name for x in ("fours", "kept"))
        assert (compiled.vector_loads > 0) == wide, name
        if wide and name != "_loss_in_fours":
            assert compiled.vector_stores > 0, name
    assert made["_classify_kept"].vector_loads >= 12
    assert made["_softmax_in_fours"].registers <= 64


def test_machine_code_of_the_separate_functions():
    shape = 1, 2, 33, 36
    probs, targets, dlosses, dprobs = (
        simulated(x) for x in probabilities(shape)
    )
    losses = simulated(nothing(1, 2))
    with watch() as seen:
        for version in range(1, len(SOFTMAX_BACKWARD) + 1):
            layer.softmax_backward(dprobs, probs, probs, version=version)
        layer.crossentropy_forward(losses, probs, targets)
        layer.crossentropy_backward(dprobs, dlosses, probs, targets)
    made = check_machine_code(seen)
    assert made["_softmax_back_in_fours"].vector_loads > 0
    assert made["_softmax_back_in_fours"].vector_stores > 0


@pytest.mark.parametrize("place", PLACES)
def test_in_place_and_the_same_bits_again(place):
    shape = 1, 3, 101, 128
    drawn, targets, dlosses, _ = draw(shape)
    targets, dlosses = place(targets), place(dlosses)
    lse = place(row_lse(drawn, 101).astype(np.float32))
    for versions, function in (
        (
            SOFTMAX_FORWARD,
            lambda out, z, v: layer.softmax_forward(out, z, 101, version=v),
        ),
        (
            CROSSENTROPY_SOFTMAX_BACKWARD,
            lambda out, z, v: layer.crossentropy_softmax_backward(
                out, dlosses, z, lse, targets, 101, version=v
            ),
        ),
    ):
        for v in range(1, len(versions) + 1):
            apart, inside = place(drawn), place(drawn)
            function(apart, place(drawn), v)
            function(inside, inside, v)
            np.testing.assert_array_equal(to_host(apart), to_host(inside))


def test_bad_arguments():
    z, n = simulated(np.zeros((1, 2, 4), np.float32)), np.zeros((1, 2))
    r = simulated(n.astype(np.float32))
    k = simulated(n.astype(np.int32))
    calls = {
        layer.softmax_forward: (z, z, 3),
        layer.softmax_backward: (z, z, z),
        layer.crossentropy_forward: (r, z, k),
        layer.crossentropy_backward: (z, r, z, k),
        layer.crossentropy_softmax_forward: (r, r, z, k, 3),
        layer.crossentropy_softmax_backward: (z, r, z, r, k, 3),
        layer.fused_classifier: (r, z, r, k, 3),
    }
    wrong = simulated(np.zeros((1, 3), np.float32)), n
    with watch() as seen:
        for function, args in calls.items():
            for version in (0, 9, "x"):
                with pytest.raises(ValueError, match="version must be in"):
                    function(*args, version=version)
            for i, x in enumerate(args):
                for bad in (0, 5) if x == 3 else wrong:
                    changed = [*args[:i], bad, *args[i + 1 :]]
                    with pytest.raises((TypeError, ValueError)) as error:
                        function(*changed)
                    assert function.__name__ in str(error.value)
    assert not seen.launches
