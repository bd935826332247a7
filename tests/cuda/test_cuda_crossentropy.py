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
from llmnb.gpu.launch import simulated, to_host
from llmnb.gpu.simulator import watch
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
    [(run_forward, 2), (run_backward, 2), (run_classifier, 2)],
)
def test_a_row_of_gpt2(run, version):
    """An odd number of logits in a row that is padded to a multiple of 128.

    Each logit is read once or twice, in vectors of four but the last.
    """
    seen = run(GPT2, version)
    V, Vp = GPT2[2:]
    reads = 2 * V - 24576 if run is run_classifier else V
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
    thread, warp = (run_softmax((1, 32, 125, 128), v) for v in (1, 2))
    assert thread.reads == warp.reads == 3 * 32 * 125
    assert thread.written_bytes == warp.written_bytes == 4 * 32 * 128
    assert thread.sectors > 6 * warp.sectors
    block, online, fours = (
        run_softmax((1, 1, 1021, 1024), v) for v in (3, 4, 5)
    )
    assert block.reads == 3 * 1021
    assert online.reads == 2 * 1021
    assert fours.read_bytes == online.read_bytes
    for seen in (block, online, fours):
        assert seen.written_bytes == 4 * 1024
    assert online.sectors < 0.8 * block.sectors
    assert online.barriers * 4 == block.barriers
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


def every_call(shape, place, between=False):
    """(name, function, arguments, version) of all versions, newly placed.

    between: whether the arrays begin between two vectors of four.
    """
    B, T, V, Vp = shape
    logits, targets, dlosses, other = draw(shape)
    probs = probabilities(shape)[0]
    lse = row_lse(logits, V).astype(np.float32)

    def there(array):
        if not between:
            return place(array)
        flat = np.append(array.ravel()[:1], array)
        return place(flat)[1:].reshape(*array.shape)

    n, w = nothing(B, T), nothing(B, T, Vp)
    calls = {
        "softmax_forward": ((w, logits, V), SOFTMAX_FORWARD),
        "softmax_backward": ((other, other, probs), SOFTMAX_BACKWARD),
        "crossentropy_forward": ((n, probs, targets), (1,)),
        "crossentropy_backward": ((other, dlosses, probs, targets), (1,)),
        "crossentropy_softmax_forward": (
            (n, n, logits, targets, V),
            CROSSENTROPY_SOFTMAX_FORWARD,
        ),
        "crossentropy_softmax_backward": (
            (w, dlosses, logits, lse, targets, V),
            CROSSENTROPY_SOFTMAX_BACKWARD,
        ),
        "fused_classifier": (
            (n, logits, dlosses, targets, V),
            FUSED_CLASSIFIER,
        ),
    }
    for name, (args, versions) in calls.items():
        for version in range(1, len(versions) + 1):
            placed = [x if x is V else there(x) for x in args]
            yield name, getattr(layer, name), placed, version


def results(calls):
    for name, function, args, version in calls:
        function(*args, version=version)
        yield f"{name} {version}", [to_host(x) for x in args[:2]]


@pytest.mark.parametrize("place", PLACES)
def test_the_same_bits_again_and_between_vectors(place):
    """A kept row, and others; vectors change the order of the sums."""
    for shape in ((1, 1, 2053, 2056), (1, 2, 37, 40)):
        once = results(every_call(shape, place))
        again = results(every_call(shape, place))
        moved = results(every_call(shape, place, between=True))
        for (name, a), (_, b), (_, c) in zip(once, again, moved, strict=True):
            for x, y, z in zip(a, b, c, strict=True):
                np.testing.assert_array_equal(x, y, name)
                np.testing.assert_allclose(z, x, 1e-5, 1e-6, err_msg=name)


def test_no_vectors_between_vectors():
    for _, function, args, version in every_call(
        (1, 1, 37, 40), simulated, True
    ):
        with watch() as seen:
            function(*args, version=version)
        assert seen.read_bytes == 4 * seen.reads
        assert seen.written_bytes == 4 * seen.writes


def test_machine_code(monkeypatch):
    """No spills; vectors of four where the chapter says so."""
    monkeypatch.setattr("llmnb.gpu.launch.simulate", lambda *args: None)
    with watch() as seen:
        for _, function, args, version in every_call(
            (1, 1, 2053, 2112), simulated
        ):
            function(*args, version=version)
    made = check_machine_code(seen)
    assert len(made) == 15
    for name, compiled in made.items():
        wide = any(x in name for x in ("fours", "kept"))
        assert (compiled.vector_loads > 0) == wide, name
        stores = wide and name != "_loss_in_fours"
        assert (compiled.vector_stores > 0) == stores, name
        exponentials = "surprise" not in name and "_back_" not in name
        assert ("ex2.approx" in compiled.ptx) == exponentials, name
    kept = made["_classify_kept"]
    assert kept.vector_loads >= 12
    assert 64 < kept.registers <= 128, "one block a multiprocessor"
    assert made["_classify_in_fours"].registers <= 64
    assert made["_softmax_in_fours"].registers <= 64


@pytest.mark.parametrize("place", PLACES)
def test_in_place(place):
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
    n = np.zeros((1, 2))
    x, y, z = (simulated(np.zeros((1, 2, 4), "f4")) for _ in range(3))
    r, s = (simulated(n.astype(np.float32)) for _ in range(2))
    k = simulated(n.astype(np.int32))
    calls = {
        layer.softmax_forward: (z, z, 3),
        layer.softmax_backward: (x, y, z),
        layer.crossentropy_forward: (r, z, k),
        layer.crossentropy_backward: (y, r, z, k),
        layer.crossentropy_softmax_forward: (r, s, z, k, 3),
        layer.crossentropy_softmax_backward: (z, r, z, s, k, 3),
        layer.fused_classifier: (r, z, s, k, 3),
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
