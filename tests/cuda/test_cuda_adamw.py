"""AdamW, the norm and the clip on the GPU."""

import math

import numpy as np
import pytest
from gpu import PLACES, check_layer, check_machine_code

from llmnb.bench.rungs_adamw import adamw_by_elements
from llmnb.cuda import adamw as cuda
from llmnb.gpu.launch import (
    DeviceArray,
    simulated,
    to_device,
    to_host,
)
from llmnb.gpu.simulator import watch
from llmnb.reference import adamw as reference
from llmnb.reference.adamw import AdamW

SIZES = [1, 3, 4, 5, 33, 100, 1027]
SETTINGS = AdamW(0.01, weight_decay=0.1)


def draw(n, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(scale=scale, size=n).astype(np.float32)


def state(n):
    return {
        "params": draw(n),
        "grads": draw(n, 0.1, 1),
        "m": draw(n, 0.1, 2),
        "v": draw(n, 0.1, 3) ** 2,
    }


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
        p = draw(7)
        want = [p.astype(np.float64), np.zeros(7), np.zeros(7)]
        there = [place(p), place(np.zeros(7, np.float32))]
        there.append(place(np.zeros(7, np.float32)))
        work = place(np.zeros(cuda.adamw_scratch(), np.float32))
        for step in range(1, 31):
            g = draw(7, seed=step) * sizes
            wide = g.astype(np.float64)
            reference.adamw_update(want[0], wide, *want[1:], at(step))
            cuda.adamw_update(
                there[0], place(g), *there[1:], at(step), work=work
            )
        np.testing.assert_allclose(to_host(there[0]), want[0], atol=3e-6)


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
            1 - F(rate) * F(0.1),
            1 - F(beta1),
            F(beta2),
            1 - F(beta2),
            F(math.sqrt(1 - power2)),
            F(1e-8),
            F(rate) / (1 - power1),
            F(0),
        ]
        for x, want in zip(got, exact, strict=True):
            assert abs(F(float(x)) - want) <= want * F(6.0e-8)


def test_new_settings_reach_the_same_launch():
    """What a captured graph does: the same arrays, other contents."""
    arrays = {k: simulated(v) for k, v in state(37).items()}
    settings = simulated(np.zeros(8, np.float32))
    want = {k: v.astype(np.float64) for k, v in state(37).items()}
    launches = []
    for step, rate in ((1, 0.01), (2, 0.5)):
        numbers = AdamW(rate, 0.9, 0.99, 1e-8, 0.1, step)
        settings.copy_to_device(cuda.adamw_settings(numbers))
        with watch() as seen:
            cuda.adamw_apply(*arrays.values(), settings)
        launches.append(seen.launches)
        reference.adamw_update(*want.values(), numbers)
    assert launches[0] == launches[1]
    for name in ("params", "m", "v"):
        got = to_host(arrays[name])
        np.testing.assert_allclose(got, want[name], atol=2e-6)


def test_counts_of_the_text():
    n = 2048 + 3
    arrays = [simulated(x) for x in state(n).values()]
    settings = simulated(cuda.adamw_settings(SETTINGS))
    found = []
    for run in (adamw_by_elements, cuda.adamw_apply):
        with watch() as seen:
            run(*arrays, settings)
        found.append(seen)
    one, two = found
    data = 7 * -(-n // 8)
    warps = -(-n // 32), 2048 // 4 // 32 + 1
    assert one.sectors == data + 7 * warps[0]
    assert two.sectors == data + 2 * warps[1]
    assert one.requests == 14 * warps[0]
    # the last warp holds the rest alone, or the last fours as well
    assert two.requests == 9 * warps[1]


def wide(n, seed=4):
    """n numbers of sizes from 1e-4 to 1."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n) * 10.0 ** rng.uniform(-4, 0, n)
    return x.astype(np.float32)


@pytest.mark.parametrize("n", [*SIZES, 1024, 1025, 5003])
def test_norm(n):
    g = wide(n)
    for place in PLACES:
        there = place(g)
        with watch():
            norm = cuda.global_norm(there)
        assert norm == pytest.approx(reference.global_norm(g), rel=1e-6)
        np.testing.assert_array_equal(to_host(there), g)


def in_block(x):
    x = x.reshape(-1, 8, 32)
    for step in (16, 8, 4, 2, 1):
        x = x + x[..., np.arange(32) ^ step]
    total = np.zeros(len(x), np.float32)
    for warp in range(8):
        total += x[:, warp, 0]
    return total


def norm_in_order(g):
    """What the kernels compute, addition for addition, in NumPy."""
    blocks = min(cuda.NORM_BLOCKS, -(-g.size // 1024))
    threads, whole = 256 * blocks, g.size // 4 * 4
    squares = np.zeros(-(-g.size // (4 * threads)) * 4 * threads, np.float32)
    squares[:whole] = g[:whole] * g[:whole]
    sums = np.zeros((threads, 4), np.float32)
    for sweep in squares.reshape(-1, threads, 4):
        sums += sweep
    total = (sums[:, 0] + sums[:, 1]) + (sums[:, 2] + sums[:, 3])
    total[: g.size - whole] += g[whole:] ** 2
    parts = np.zeros((4, 256), np.float32)
    parts.reshape(-1)[:blocks] = in_block(total)
    sums = np.zeros(256, np.float32)
    for row in parts:
        sums += row
    return np.sqrt(in_block(sums)[0])


def test_norm_of_many():
    """3e4 numbers of mixed sizes on the simulator; more in its order.

    The bound is the chapter's: the longest chain of additions, halved by
    the root.
    """
    g = wide(30_003)
    exact = reference.global_norm(g)
    norm = cuda.global_norm(simulated(g))
    assert norm == norm_in_order(g)
    assert abs(norm / exact - 1) < 2e-7
    for n in (100_003, 1 << 21):
        g = wide(n)
        chain = n / (4 * 262_144) + 2 + 13 + 4 + 13
        error = abs(norm_in_order(g) / reference.global_norm(g) - 1)
        assert error < min(chain * 2.0**-25, 2e-7)


def test_several_sweeps(monkeypatch):
    """What more than a million gradients do, with fewer blocks."""
    monkeypatch.setattr(cuda, "NORM_BLOCKS", 2)
    g = wide(5003)
    there = simulated(g)
    with watch():
        norm = cuda.global_norm(there)
    assert norm == norm_in_order(g)
    assert norm == pytest.approx(reference.global_norm(g), rel=1e-6)


def test_a_sum_of_many_blocks():
    """The second kernel takes four turns for 1024 sums."""
    sums = np.abs(wide(1025))
    work = simulated(sums)
    with watch():
        cuda._root_of_sum[1, 256](work, 1024)
    exact = math.sqrt(sums[1:].astype(np.float64).sum())
    assert to_host(work)[0] == pytest.approx(exact, rel=1e-6)
    np.testing.assert_array_equal(to_host(work)[1:], sums[1:])


def test_the_order_depends_on_the_length_alone():
    """More blocks than there are do not change what each one sums."""
    with watch() as seen:
        cuda.global_norm(simulated(wide(5003)))
    assert [launch[1] for launch in seen.launches] == [5, 1]
    assert all(launch[2] == 256 for launch in seen.launches)
    again = {cuda.global_norm(simulated(wide(5003))) for _ in range(3)}
    assert len(again) == 1


@pytest.mark.parametrize("n", SIZES)
def test_clip(n):
    g = draw(n, 5)
    norm = reference.global_norm(g)
    for factor in (0.5, 2.0):
        want = g.astype(np.float64)
        reference.clip_gradients(want, factor * norm)
        for place in PLACES:
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
    g = draw(1027)
    g[at] = bad
    for place in PLACES:
        for skip in (0, 1):
            there = place(np.concatenate([g[:skip], g]))[skip:]
            norm = cuda.clip_gradients(there, 0.5)
            assert not math.isfinite(norm)
            np.testing.assert_array_equal(to_host(there), g)


def test_every_bad_norm_is_seen_by_its_bits():
    """NaN of either sign and with any payload; infinity; the largest number.

    A norm that is put into work[0], not computed.
    """
    bits = [0x7F800000, 0xFF800000, 0x7F800001, 0x7FC00000, 0xFFFFFFFF]
    bits += [0x7F7FFFFF, 0x5F800000]  # finite: the gradients do shrink
    for pattern in bits:
        work = simulated(np.array([pattern], np.uint32).view(np.float32))
        good = pattern in bits[5:]
        for vectors in (0, 1):
            g, half = simulated(np.ones(5, np.float32)), np.float32(0.5)
            with watch():
                bits_of = work.view(np.int32)
                cuda._shrink[1, 32](g, work, bits_of, half, vectors)
            assert (to_host(g) < 1e-19).all() == good
            assert (to_host(g) == 1).all() != good


@pytest.mark.filterwarnings("ignore:overflow")
def test_the_largest_norm():
    """Up to 1.8e19 the norm is right; above, it is infinite."""
    g = np.full(4, 9.2e18, np.float32)
    assert cuda.global_norm(simulated(g)) == pytest.approx(1.84e19)
    assert cuda.global_norm(simulated(g * np.float32(1.01))) == math.inf


def test_a_limit_that_no_norm_reaches():
    g = draw(9)
    for most in (math.inf, 1e300, 3.4e38):
        there = simulated(g)
        cuda.clip_gradients(there, most)
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


def test_zero_gradients():
    for place in PLACES:
        there = place(np.zeros(9, np.float32))
        assert cuda.clip_gradients(there, 1.0) == 0
        assert not to_host(there).any()


def test_the_norm_stays_on_the_device():
    """Launches alone, and work[0] holds what they found."""
    g, work = wide(1027), simulated(np.zeros(2000, np.float32))
    there = simulated(g)
    with watch() as seen:
        cuda.clip_apply(there, 0.1, work)
    names = [launch[0].__name__ for launch in seen.launches]
    assert names == ["_squares", "_root_of_sum", "_shrink"]
    norm = reference.global_norm(g)
    assert to_host(work)[0] == pytest.approx(norm, rel=1e-6)
    got = reference.global_norm(to_host(there))
    assert got == pytest.approx(0.1, rel=1e-4)


def test_views_that_are_not_aligned():
    arrays = state(40)
    want = {k: v[1:].astype(np.float64) for k, v in arrays.items()}
    reference.adamw_update(*want.values(), SETTINGS)
    norm = reference.global_norm(want["grads"])
    for place in PLACES:
        there = {k: place(v)[1:] for k, v in arrays.items()}
        with watch():
            cuda.adamw_update(*there.values(), SETTINGS)
            got = cuda.clip_gradients(there["grads"], norm / 3)
        assert got == pytest.approx(norm, rel=1e-6)
        for name in ("params", "m", "v"):
            got = to_host(there[name])
            np.testing.assert_allclose(got, want[name], atol=2e-6)
        got = to_host(there["grads"])
        np.testing.assert_allclose(got, want["grads"] / 3, rtol=3e-6)


def test_an_unaligned_sum_has_the_same_bits():
    g = wide(1027)
    shifted = simulated(np.concatenate([g[:1], g]))[1:]
    assert cuda.global_norm(shifted) == cuda.global_norm(simulated(g))


def launched():
    arrays = [simulated(x) for x in state(33).values()]
    with watch() as seen:
        cuda.adamw_update(*arrays, SETTINGS)
        by_elements(*arrays, SETTINGS)
        cuda.clip_gradients(arrays[1], 0.01)
        shifted = simulated(draw(34))[1:]
        cuda.clip_gradients(shifted, 0.01)
    return seen


def test_machine_code():
    made = check_machine_code(launched())
    assert made["_adamw_by_elements"].vector_loads == 0
    assert made["_adamw_by_fours"].vector_loads == 6
    assert made["_adamw_by_fours"].vector_stores == 3
    assert made["_adamw_by_fours"].registers <= 64
    # the compiler unrolls the loop
    assert made["_squares"].vector_loads >= 1
    assert made["_squares"].registers <= 64
    assert made["_shrink"].vector_loads == 1
    assert made["_shrink"].vector_stores == 1


def asks_the_bits(text):
    """Whether PTX masks the exponent of a float32 and compares it."""
    mask, bits = ", 2139095040;", text.splitlines()
    masked = [x for x in bits if "and.b32" in x and x.endswith(mask)]
    asked = [x for x in bits if "setp.eq.s32" in x or "setp.ne.s32" in x]
    return len(masked) == 1 and sum(x.endswith(mask) for x in asked) == 1


def test_the_norm_is_compiled_without_fastmath():
    """No flush to zero, no approximation, and a question to the bits."""
    seen = launched()
    made = check_machine_code(seen)
    for name in ("_squares", "_root_of_sum", "_shrink"):
        text = made[name].ptx
        assert ".ftz" not in text and ".approx" not in text, name
    assert "sqrt.rn.f32" in made["_root_of_sum"].ptx
    text = made["_shrink"].ptx
    assert "div.rn.f32" in text
    assert asks_the_bits(text)


def test_settings_out_of_range():
    arrays = [simulated(x) for x in state(5).values()]
    with pytest.raises(ValueError, match="adamw_update: beta1 must be"):
        cuda.adamw_update(*arrays, SETTINGS._replace(beta1=1))


def test_scratch_that_is_too_short():
    arrays = [simulated(x) for x in state(12).values()]
    short = simulated(np.zeros(7, np.float32))
    with pytest.raises(ValueError, match=r"work must have shape \(8,\)"):
        cuda.adamw_update(*arrays, SETTINGS, work=short)
    with pytest.raises(ValueError, match=r"settings must have shape \(8,\)"):
        cuda.adamw_apply(*arrays, short)
    with pytest.raises(ValueError, match=r"work must have shape \(1025,\)"):
        cuda.global_norm(arrays[0], work=short)
