"""The generator; chapter A.1 compares it with PyTorch's recorded draws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from measure import peak

from llmnb.model.random import (
    AT_ONCE,
    Generator,
    MersenneTwister,
    box_muller,
)


def drawn(generator, n, mean=0.0, std=1.0):
    array = np.empty(n, np.float32)
    generator.normal_(array, mean, std)
    return array


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_words_are_those_of_numpys_seeding_by_an_integer(seed):
    want = np.random.RandomState(seed).randint(0, 2**32, 700, np.uint32)
    assert (MersenneTwister(seed).uint32(700) == want).all()


def test_uniforms_at_the_ends_of_the_words():
    twister = MersenneTwister(0)
    for word, want in ((0, 0.0), (2**32 - 1, 1 - 2**-24), (2**24, 0.0)):
        twister.uint32 = lambda n, word=word: np.full(n, word, np.uint32)
        assert twister.uniform(2).tolist() == [want, want]
        assert 0 <= twister.uniform64() < 1
    normals = box_muller(np.full(16, 1 - 2**-24, np.float32), 0.0, 1.0)
    assert np.isfinite(normals).all()


@pytest.mark.parametrize(
    "n", [AT_ONCE - 16, AT_ONCE, AT_ONCE + 16, 2 * AT_ONCE + 5]
)
def test_chunks_do_not_show(n):
    words = MersenneTwister(8).uniform(n + 16)
    want = box_muller(words[: n - n % 16], 0.0, 1.0)
    if n % 16:
        want = np.concatenate([want, np.zeros(n % 16, np.float32)])
        want[-16:] = box_muller(words[n:], 0.0, 1.0)
    generator = Generator(8)
    assert (drawn(generator, n) == want).all()
    # and the stream goes on where it should
    after = MersenneTwister(8).uint32(n + 16 * (n % 16 > 0) + 3)[-3:]
    assert (generator.uint32(3) == after).all()


def test_no_large_temporaries():
    array = np.empty(1 << 22, np.float32)
    assert peak(lambda: Generator(0).normal_(array)) < 1_000_000


@pytest.mark.parametrize("seed", [-1, 2**32, 10**30, 1.0, "1", None, True])
def test_a_seed_that_is_none(seed):
    whole = type(seed) is int
    message = (
        rf"seed must lie in .* got {seed}" if whole else "an integer, got"
    )
    with pytest.raises(ValueError if whole else TypeError, match=message):
        Generator(seed)


@pytest.mark.parametrize(
    ("array", "error", "message"),
    [
        (np.empty(20, np.int32), TypeError, "float32 or float64"),
        (np.empty((8, 8), np.float32)[:, :4], ValueError, "C-contiguous"),
        (np.broadcast_to(np.float32(0), 1), ValueError, "writeable"),
    ],
)
def test_an_array_that_cannot_be_filled(array, error, message):
    with pytest.raises(error, match=f"normal_: array must be .*{message}"):
        Generator(0).normal_(array)


@pytest.mark.parametrize("std", [-0.1, float("nan")])
def test_a_std_out_of_range(std):
    with pytest.raises(ValueError, match="std must be at least 0, got"):
        Generator(0).normal_(np.empty(16, np.float32), std=std)


def test_live_draws():
    torch = pytest.importorskip("torch")
    theirs, ours = torch.Generator().manual_seed(11), Generator(11)
    uniforms = torch.rand(1000, generator=theirs).numpy()
    assert (ours.uniform(1000) == uniforms).all()
    for n in (1, 15, 16, 17, 2, 31, 1000, 7, 1 << 20):
        want = torch.empty(n).normal_(0.1, 0.5, generator=theirs).numpy()
        got = drawn(ours, n, 0.1, 0.5)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
