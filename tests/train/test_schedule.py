"""Learning rate schedules."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmnb.train.schedule import KINDS, learning_rate


@pytest.mark.parametrize("kind", KINDS)
def test_warm_up_is_a_staircase(kind):
    rates = [learning_rate(s, 0.3, 3, 10, kind) for s in range(4)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.3])
    assert learning_rate(0, 0.7, 0, 100, kind, 0.1) == pytest.approx(0.7)


@pytest.mark.parametrize(("kind", "step", "final", "rate"), [
    ("cosine", 40, 0.0, 1 + math.cos(math.pi / 4)),
    ("cosine", 60, 0.5, 1.5),  # half way down, and so between the two
    ("linear", 40, 0.0, 1.5), ("linear", 60, 0.5, 1.5),
    ("constant", 20, 0.1, 2.0), ("constant", 120, 0.1, 2.0),
    ("wsd", 80, 0.0, 2.0), ("wsd", 85, 0.0, 1.0),
    ("wsd", 90, 0.1, 2.0 * (0.1 + 0.9 * (1 - math.sqrt(0.5)))),
])  # fmt: skip
def test_the_way_down(kind, step, final, rate):
    found = learning_rate(step, 2.0, 20, 100, kind, final)
    assert found == pytest.approx(rate)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    warmup=st.integers(0, 40),
    rest=st.integers(0, 100),
    final=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_shape(kind, warmup, rest, final):
    """It climbs, never climbs again, and ends where it should."""
    total = max(1, warmup + rest)
    rates = [
        learning_rate(s, 0.5, warmup, total, kind, final)
        for s in range(total + 3)
    ]
    climb, fall = rates[:warmup], rates[warmup:]
    assert climb == sorted(climb)
    assert all(a >= b - 1e-15 for a, b in zip(fall, fall[1:], strict=False))
    assert all(0 <= r <= 0.5 + 1e-15 for r in rates)
    if rest:
        end = 0.5 if kind == "constant" else 0.5 * final
        assert rates[total] == pytest.approx(end)
        assert rates[total + 2] == rates[total]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint64, np.int32])
def test_steps_may_be_numbers_of_numpy(kind, dtype):
    """Those without a sign, too: 3 - 5 is a large one."""
    plain = [learning_rate(s, 0.5, 3, 40, kind, 0.1) for s in range(44)]
    steps = np.arange(44, dtype=dtype)
    assert [learning_rate(s, 0.5, 3, 40, kind, 0.1) for s in steps] == plain


@pytest.mark.parametrize(("change", "message"), [
    ({"step": -1}, "step must be at least 0, got -1"),
    ({"peak": -0.5}, "peak must be at least 0, got -0.5"),
    ({"peak": math.nan}, "peak must be at least 0, got nan"),
    ({"warmup": 11}, r"warmup must be in \[0, 10\], got 11"),
    ({"warmup": -1}, r"warmup must be in \[0, 10\], got -1"),
    ({"total": 0, "warmup": 0}, "total must be at least 1, got 0"),
    ({"final": 1.5}, r"final must be in \[0, 1\], got 1.5"),
    ({"kind": "cos"}, "no kind 'cos', only cosine, linear, constant"),
])  # fmt: skip
def test_bad_numbers(change, message):
    good = {"step": 0, "peak": 1.0, "warmup": 2, "total": 10}
    learning_rate(**good)
    with pytest.raises(ValueError, match="learning_rate: " + message):
        learning_rate(**(good | change))
