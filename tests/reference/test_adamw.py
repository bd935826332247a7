"""AdamW, the global norm and clipping: PyTorch's numbers, threads, errors.

The golden values were computed by torch.optim.AdamW (PyTorch 2.13.0, CPU,
foreach=False) and torch.nn.utils.clip_grad_norm_.
"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import assert_threads_change_no_bit

from llmnb.cpu import adamw as cpu
from llmnb.reference import adamw as reference
from llmnb.reference.adamw import AdamW

DTYPES = {np.float32: 1e-6, np.float64: 1e-13}
BOTH = (reference, cpu)
BACKENDS = pytest.mark.parametrize("backend", BOTH)
NUMBERS = (1e-2, 0.9, 0.95, 1e-8, 0.1)

# exact in float32: seven parameters, their gradients, and by what the
# gradients are multiplied in each of six steps
START = [1.0, -0.5, 0.03125, -2.0, 0.0, 8.0, 0.25]
SLOPE = [0.5, -0.25, 2.0**-10, 0.0, -8.0, 2.0**-20, 0.125]
FACTORS = [1.0, -0.5, 2.0, 0.25, -1.0, 1.5]

# settings -> the parameters after steps 1, 3, 6, then m and v
FIRST = (1e-2, 0.9, 0.999, 1e-8, 0.1)
SECOND = (3e-2, 0.8, 0.95, 1e-6, 0.0)
GOLDEN = {
    FIRST: [
        [0.9890000002, -0.48950000039999997, 0.021218852398951434, -1.998,
         0.0099999999875, 7.982103769497949, 0.23975000079999995],
        [0.9777811663376385, -0.4792796672040285, 0.01193469827986484,
         -1.994005998, 0.019221833005852354, 7.956992294911622,
         0.2300289181868087],
        [0.9618985060667378, -0.4648910166476362, -0.0010532051555053666,
         -1.988029960029988, 0.03211647449987729, 7.920308854785162,
         0.21638727282067885],
        [0.12614699999999998, -0.06307349999999999, 0.00024638085937499996,
         0.0, -2.0183519999999997, 2.406063079833984e-07,
         0.031536749999999995],
        [0.0021358496368763143, 0.0005339624092190786, 8.147619769578225e-09,
         0.0, 0.5467775070403365, 7.770175714090562e-15,
         0.00013349060230476964],
    ],
    SECOND: [
        [0.97000005999988, -0.47000011999952, 0.0012806885748993004, -2.0,
         0.02999999625000047, 7.985355681214658, 0.22000023999808002],
        [0.9431094809874979, -0.44310958780522547, -0.02558598903768181,
         -2.0, 0.056890619154497696, 7.9711090559145354,
         0.19310980143943893],
        [0.9065282169209012, -0.40652838641712347, -0.06213525237376916,
         -2.0, 0.09347194198237818, 7.9518360914029245, 0.1565287254076813],
        [0.20068799999999998, -0.10034399999999999, 0.00039196874999999996,
         0.0, -3.2110079999999996, 3.8278198242187496e-07,
         0.050171999999999994],
        [0.09579142187500007, 0.02394785546875002, 3.654152750968936e-07,
         0.0, 24.52260400000002, 3.484871626824318e-13,
         0.005986963867187505],
    ],
}  # fmt: skip


def six_steps(backend, numbers, dtype):
    params = np.array(START, dtype)
    m, v = np.zeros((2, len(START)), dtype)
    history = []
    for step, factor in enumerate(FACTORS, 1):
        grads = np.array(SLOPE, dtype) * dtype(factor)
        backend.adamw_update(params, grads, m, v, AdamW(*numbers, step))
        history.append(params.copy())
    return [history[0], history[2], history[5], m, v]


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numbers", GOLDEN)
def test_equals_recorded_torch(backend, numbers, dtype):
    got = six_steps(backend, numbers, dtype)
    names = "step 1", "step 3", "step 6", "m", "v"
    for name, x, want in zip(names, got, GOLDEN[numbers], strict=True):
        assert x.dtype == dtype
        # a difference of 1e-8 in float32 is the rounding of a number near 1
        close = {"rtol": DTYPES[dtype], "atol": DTYPES[dtype] / 100}
        if name in "mv":
            close["atol"] = 0
        np.testing.assert_allclose(x, want, err_msg=name, **close)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    n=st.sampled_from([0, 1, 2, 7, 255, 257, 16383, 16385, 40001]),
    step=st.integers(1, 2000),
    decay=st.sampled_from([0.0, 0.1]),
    dtype=st.sampled_from(list(DTYPES)),
    seed=st.integers(0, 99),
)
def test_kernels_equal_reference(n, step, decay, dtype, seed):
    rng = np.random.default_rng(seed)
    params, grads, m = rng.normal(size=(3, n)).astype(dtype)
    v = rng.uniform(0, 2, n).astype(dtype)
    settings = AdamW(1e-2, weight_decay=decay, step=step)
    both = []
    for backend in BOTH:
        state = [x.copy() for x in (params, grads, m, v)]
        backend.adamw_update(*state, settings)
        norm = backend.global_norm(grads)
        clipped = grads.copy()
        assert backend.clip_gradients(clipped, 1.0) == norm
        both.append([*state, np.array(norm), clipped])
    tol = DTYPES[dtype]
    for want, got in zip(*both, strict=True):
        np.testing.assert_allclose(got, want, rtol=4 * tol, atol=4 * tol)
    np.testing.assert_allclose(both[1][4], both[0][4], rtol=1e-12)


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
def test_clipping_equals_recorded_torch(backend, dtype):
    grads = np.array([3.0, -4.0, 12.0, 0.0, 0.5], dtype)
    norm = backend.clip_gradients(grads, 1.0)
    assert norm == pytest.approx(13.009612083435059, rel=1e-7)
    want = [0.23059871793, -0.30746495724, 0.92239487171, 0, 0.03843311965]
    np.testing.assert_allclose(grads, want, rtol=3e-7)


@BACKENDS
def test_short_gradients_stay(backend):
    grads = np.array([0.3, 0.4], np.float32)
    before = grads.copy()
    assert backend.clip_gradients(grads, 1.0) == pytest.approx(0.5)
    assert np.array_equal(grads, before)


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 17, 5001, 9999])
def test_broken_gradients_stay_and_are_reported(backend, dtype, bad, where):
    grads = np.ones(10_000, dtype)
    grads[where] = bad
    before = grads.copy()
    norm = backend.clip_gradients(grads, 1.0)
    assert not math.isfinite(norm)
    assert math.isnan(norm) == math.isnan(bad)
    assert np.array_equal(grads, before, equal_nan=True)


@BACKENDS
def test_large_float32_gradients_do_not_overflow(backend):
    grads = np.full(300, 1e30, np.float32)
    norm = backend.clip_gradients(grads, 1.0)
    assert norm == pytest.approx(1e30 * math.sqrt(300), rel=1e-6)
    assert backend.global_norm(grads) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_element_gets_the_same_bits_wherever_it_stands(dtype):
    """In a vector, in the rest after the vectors, or alone."""
    start = np.random.default_rng(4).uniform(0.1, 2, (4, 200)).astype(dtype)
    whole = start.copy()
    cpu.adamw_update(*whole, AdamW(*NUMBERS, 3))
    for n in range(1, 70):
        part = start[:, :n].copy()
        cpu.adamw_update(*part, AdamW(*NUMBERS, 3))
        np.testing.assert_array_equal(part, whole[:, :n])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [3, 1000, 16385, 100_003])
def test_threads_change_no_bit(dtype, n):
    def work():
        p, g = np.random.default_rng(5).normal(size=(2, n)).astype(dtype)
        m, v = np.zeros((2, n), dtype)
        norms = []
        for step in range(1, 4):
            norms.append(cpu.clip_gradients(g, 1.0))
            cpu.adamw_update(p, g, m, v, AdamW(*NUMBERS, step))
            g += p
        return p, g, m, v, np.array(norms)

    assert_threads_change_no_bit(work)


@BACKENDS
@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, -0.1, "learning_rate must be at least 0, got -0.1"),
        (1, 1.0, r"beta1 must be in \[0, 1\), got 1.0"),
        (1, -0.5, r"beta1 must be in \[0, 1\), got -0.5"),
        (2, 1.5, r"beta2 must be in \[0, 1\), got 1.5"),
        (3, 0.0, "eps must be above 0, got 0.0"),
        (4, -1.0, "weight_decay must be at least 0, got -1.0"),
        (5, 0, "step must be at least 1, got 0"),
        (0, math.nan, "learning_rate must be at least 0, got nan"),
    ],
)
def test_bad_settings(backend, position, value, message):
    arrays = [np.ones(4) for _ in range(4)]
    numbers = [*NUMBERS, 1]
    backend.adamw_update(*arrays, AdamW(*numbers))
    before = arrays[0].copy()
    numbers[position] = value
    with pytest.raises(ValueError, match="adamw_update: " + message):
        backend.adamw_update(*arrays, AdamW(*numbers))
    assert np.array_equal(arrays[0], before)
