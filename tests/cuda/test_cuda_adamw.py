"""AdamW, the norm and the clip on the GPU."""

import math
import re

import numpy as np
import pytest
from gpu import PLACES, between, check_layer, check_machine_code, single

from llmnb.bench.rungs_adamw import adamw_by_elements
from llmnb.cuda import adamw as cuda
from llmnb.gpu.launch import DeviceArray, simulated, to_device, to_host
from llmnb.gpu.simulator import watch
from llmnb.reference import adamw as reference
from llmnb.reference.adamw import AdamW

SIZES = [1, 3, 4, 5, 33, 100, 1027]
SETTINGS = AdamW(0.01, weight_decay=0.1)


def state(n):
    params, *rest = (single(n, seed=k) for k in range(4))
    grads, m, v = (np.float32(0.1) * x for x in rest)
    return {"params": params, "grads": grads, "m": m, "v": v**2}


def at(step):
    return SETTINGS._replace(step=step)


def by_elements(params, grads, m, v, settings):
    """The plainer version, with the arguments of the layer."""
    there = simulated if isinstance(params, DeviceArray) else to_device
    numbers = there(cuda.adamw_settings(settings))
    adamw_by_elements(params, grads, m, v, numbers)


@pytest.mark.parametrize("run", [cuda.adamw_update, by_elements])
@pytest.mark.parametrize("n", SIZES)
def test_update(n, run):
    for step in (1, 1000):
        arrays = state(n) | {"settings": at(step)}
        check_layer(run, reference.adamw_update, arrays, ["params", "m", "v"])


def test_versions_agree_to_the_bit_in_the_simulator():
    got = []
    for run in (cuda.adamw_update, by_elements):
        arrays = [simulated(x) for x in state(203).values()]
        run(*arrays, at(3))
        got.append([to_host(x) for x in arrays])
    for one, two in zip(*got, strict=True):
        np.testing.assert_array_equal(one, two)


def test_many_steps_follow_the_reference():
    """Gradients of very different sizes, one of them always zero."""
    sizes = np.array([1, 1e-6, 0, 1e6, 1e-12, 0.1, 3], np.float32)
    for place in PLACES:
        p, m, v = single(7, seed=0), *np.zeros((2, 7), np.float32)
        want = [x.astype(np.float64) for x in (p, m, v)]
        p, m, v = map(place, (p, m, v))
        work = place(np.zeros(cuda.adamw_scratch(), np.float32))
        for step in range(1, 31):
            g = single(7, seed=step) * sizes
            wide = g.astype(np.float64)
            reference.adamw_update(want[0], wide, *want[1:], at(step))
            cuda.adamw_update(p, place(g), m, v, at(step), work=work)
        np.testing.assert_allclose(to_host(p), want[0], atol=3e-6)


def test_settings_are_rounded_once():
    """To within half a unit in the last place of the exact numbers."""
    from fractions import Fraction as F

    for step in (1, 2, 7, 1000, 100_000):
        rate, beta1, beta2 = 6e-4, 0.9, 0.999
        got = cuda.adamw_settings(AdamW(rate, beta1, beta2, 1e-8, 0.1, step))
        assert got.dtype == np.float32 and got.shape == (8,)
        power1 = F(beta1) ** min(step, 500)
        power2 = F(beta2) ** step if step <= 1000 else F(0)
        exact = [
            1 - F(rate) * F(0.1), 1 - F(beta1), F(beta2), 1 - F(beta2),
            F(math.sqrt(1 - power2)), F(1e-8), F(rate) / (1 - power1), F(0),
        ]  # fmt: skip
        for x, want in zip(got, exact, strict=True):
            assert abs(F(float(x)) - want) <= want * F(6.0e-8)


def wide(n, seed=4):
    """n numbers of sizes from 1e-4 to 1."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n) * 10.0 ** rng.uniform(-4, 0, n)
    return x.astype(np.float32)


@pytest.mark.parametrize("blocks", [cuda.NORM_BLOCKS, 2])
@pytest.mark.parametrize("n", [*SIZES, 1024, 1025, 5003])
def test_norm(n, blocks, monkeypatch):
    """Few blocks take several sweeps, as many do for a million gradients."""
    monkeypatch.setattr(cuda, "NORM_BLOCKS", blocks)
    g = wide(n)
    for place in PLACES:
        there = place(g)
        with watch():
            norm = cuda.global_norm(there)
            # an unaligned sum has the same bits
            assert cuda.global_norm(between(g, place)) == norm
        assert norm == pytest.approx(reference.global_norm(g), rel=1e-6)
        np.testing.assert_array_equal(to_host(there), g)


def test_a_sum_of_many_blocks():
    """The second kernel takes four turns for 1024 sums."""
    sums = np.abs(wide(1025))
    work = simulated(sums)
    with watch():
        cuda._root_of_sum[1, 256](work, 1024)
    exact = math.sqrt(sums[1:].astype(np.float64).sum())
    assert to_host(work)[0] == pytest.approx(exact, rel=1e-6)
    np.testing.assert_array_equal(to_host(work)[1:], sums[1:])


@pytest.mark.parametrize("where", [simulated, between])
@pytest.mark.parametrize("n", SIZES)
def test_clip(n, where):
    g = 5 * single(n, seed=0)
    norm = reference.global_norm(g)
    for factor in (0.5, 2.0):
        want = g.astype(np.float64)
        reference.clip_gradients(want, factor * norm)
        for place in {where, *PLACES[1:]}:
            there = place(g)
            with watch():
                got = cuda.clip_gradients(there, factor * norm)
            assert got == pytest.approx(norm, rel=1e-6)
            np.testing.assert_allclose(to_host(there), want, rtol=1e-6)
            if factor > 1:
                np.testing.assert_array_equal(to_host(there), g)


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("at", [0, 77, 1026])
def test_a_broken_gradient_is_left_alone(bad, at):
    """In a vector or in the rest; 1e30 has a square beyond float32."""
    g = single(1027)
    g[at] = bad
    for place in PLACES:
        for skip in (False, True):
            there = between(g, place) if skip else place(g)
            norm = cuda.clip_gradients(there, 0.5)
            assert not math.isfinite(norm)
            np.testing.assert_array_equal(to_host(there), g)


@pytest.mark.filterwarnings("ignore:overflow")
def test_the_largest_norm():
    """Up to 1.8e19 the norm is right; above, it is infinite."""
    g = np.full(4, 9.2e18, np.float32)
    assert cuda.global_norm(simulated(g)) == pytest.approx(1.84e19)
    assert cuda.global_norm(simulated(g * np.float32(1.01))) == math.inf


@pytest.mark.parametrize(
    ("scale", "most"), [(1, math.inf), (1, 1e300), (1, 3.4e38), (0, 1.0)]
)
def test_a_limit_that_no_norm_reaches(scale, most):
    g = single(9) * np.float32(scale)
    there = simulated(g)
    assert (cuda.clip_gradients(there, most) > 0) == scale
    np.testing.assert_array_equal(to_host(there), g)


def test_empty_arrays():
    """As on the CPU: nothing to update, and a norm of 0."""
    none = [simulated(np.empty(0, np.float32)) for _ in range(4)]
    with watch() as seen:
        cuda.adamw_update(*none, SETTINGS)
    assert not seen.launches
    assert cuda.global_norm(none[0]) == 0
    with watch() as seen:
        assert cuda.clip_gradients(none[0], 1.0) == 0
    assert all(0 not in launch[1:3] for launch in seen.launches)


def launched():
    arrays = [simulated(x) for x in state(33).values()]
    with watch() as seen:
        cuda.adamw_update(*arrays, SETTINGS)
        by_elements(*arrays, SETTINGS)
        cuda.clip_gradients(arrays[1], 0.01)
        cuda.clip_gradients(simulated(single(34))[1:], 0.01)
    return seen


def test_machine_code():
    made = check_machine_code(launched(), registers=64)
    assert made["_adamw_by_elements"].vector_loads == 0
    assert made["_adamw_by_fours"].vector_loads == 6
    assert made["_adamw_by_fours"].vector_stores == 3
    assert made["_squares"].vector_loads >= 1  # its loop is unrolled
    assert made["_shrink"].vector_loads == 1
    assert made["_shrink"].vector_stores == 1


def asks_whether_finite(text):
    """Whether PTX compares with the largest float32, and NaN fails."""
    largest = [x for x in text.splitlines() if x.endswith(", 0f7F7FFFFF;")]
    return len(largest) == 1 and re.search("setp.(gtu|le).f32", largest[0])


def test_the_norm_is_compiled_without_fastmath():
    """No flush to zero, no approximation, and the question is asked."""
    made = check_machine_code(launched())
    for name in ("_squares", "_root_of_sum", "_shrink"):
        text = made[name].ptx
        assert ".ftz" not in text and ".approx" not in text, name
    assert "sqrt.rn.f32" in made["_root_of_sum"].ptx
    assert "div.rn.f32" in made["_shrink"].ptx
    assert asks_whether_finite(made["_shrink"].ptx)


def test_what_is_refused():
    """Settings out of range, and scratch that is too short."""
    arrays = [simulated(x) for x in state(1030).values()]
    with pytest.raises(ValueError, match="adamw_update: beta1 must be"):
        cuda.adamw_update(*arrays, SETTINGS._replace(beta1=1))
    grads, work = arrays[1], simulated(np.zeros(1024, np.float32))
    with pytest.raises(ValueError, match="adamw_update: work must hold 8 fl"):
        cuda.adamw_update(*arrays, SETTINGS, work=work[:7])
    for place in PLACES:  # a GPU would stop at such an address
        there = [place(x) for x in state(9).values()]
        off = place(np.zeros(9, np.float32))[1:]
        for run, *how in (
            (cuda.adamw_update, SETTINGS, off), (cuda.adamw_apply, off),
        ):  # fmt: skip
            with pytest.raises(ValueError, match="a multiple of 16 bytes"):
                run(*there, *how)
    for run, *given in (
        (cuda.global_norm, grads),
        (cuda.clip_gradients, grads, 1.0),
        (cuda.clip_apply, grads, 1.0),
    ):
        with pytest.raises(ValueError, match="_\\w+: work must hold 1025 fl"):
            run(*given, work)
