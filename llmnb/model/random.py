# Written by `make export` from notebooks/appendix/01_random.py: edit that file.

"""Random numbers, bit for bit and draw for draw PyTorch's."""

__all__ = [
    "Generator", "MersenneTwister", "ScalarNormals", "box_muller",
    "seed_state",
]


# imports
import math

import numpy as np

from llmnb.checks import check_array
from llmnb.shapes import check_number


# the seed becomes 624 words
def seed_state(seed):
    """The 624 words of MT19937's state that a seed stands for.

    seed: an integer in [0, 2**32), else TypeError or ValueError. Returns a
    list of 624 integers below 2**32.

    Derived in chapter A.1.
    """
    if not isinstance(seed, (int, np.integer)) or isinstance(seed, bool):
        raise TypeError(f"seed must be an integer, got {seed!r}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must lie in [0, 2**32), got {seed}")
    state = [int(seed)]
    for i in range(1, 624):
        last = state[-1]
        state.append(1812433253 * (last ^ last >> 30) + i & 0xFFFFFFFF)
    return state


# the stream of bits
class MersenneTwister:
    """MT19937 seeded as PyTorch seeds its CPU generator.

    Derived in chapter A.1.
    """

    def __init__(self, seed):
        key = np.array(seed_state(seed), np.uint32)
        self._core = np.random.MT19937()
        state = {"key": key, "pos": 624}
        self._core.state = {"bit_generator": "MT19937", "state": state}

    def uint32(self, n):
        """The next n words, a uint32 array."""
        return self._core.random_raw(n).astype(np.uint32)

    def uniform(self, n):
        """n float32 numbers in [0, 1): 24 bits of one word each."""
        bits = self.uint32(n) & np.uint32(2**24 - 1)
        return bits.astype(np.float32) * np.float32(2**-24)

    def uniform64(self):
        """One float in [0, 1): 53 bits of two words."""
        high, low = (int(word) for word in self.uint32(2))
        return ((high << 32 | low) & 2**53 - 1) * 2**-53


# sixteen uniforms become sixteen normals
def box_muller(uniforms, mean, std):
    """Turn uniforms into normals, in blocks of 16 as PyTorch does.

    uniforms: float32 (n), n a multiple of 16. In each block, number j < 8
    gives the radius and number j + 8 the angle of one pair, whose cosine
    goes to place j and whose sine to place j + 8. Returns float32 (n).

    Derived in chapter A.1.
    """
    u = uniforms.reshape(-1, 2, 8)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - u[:, 0]))
    angle = np.float32(2 * np.pi) * u[:, 1]
    normals = np.empty_like(u)
    np.multiply(radius, np.cos(angle), out=normals[:, 0])
    np.multiply(radius, np.sin(angle), out=normals[:, 1])
    normals *= np.float32(std)
    normals += np.float32(mean)
    return normals.reshape(-1)


# one normal at a time
class ScalarNormals(MersenneTwister):
    """MT19937 with the draws PyTorch makes for fewer than 16 numbers.

    Derived in chapter A.1.
    """

    def __init__(self, seed):
        super().__init__(seed)
        self._spare = None

    def normal(self):
        """One standard normal float; every second one was kept in store."""
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        angle = 2 * math.pi * self.uniform64()
        radius = math.sqrt(-2 * math.log1p(-self.uniform64()))
        self._spare = radius * math.sin(angle)
        return radius * math.cos(angle)


# how many at a time
AT_ONCE = 2**14  # numbers drawn at a time: they stay in the cache


# the generator
class Generator(ScalarNormals):
    """Normal numbers as torch.Generator draws them on the CPU.

    Derived in chapter A.1.
    """

    def normal_(self, array, mean=0.0, std=1.0):
        """Fill a C-contiguous float array in place with N(mean, std**2).

        float64 gets the float32 draws. Raises TypeError or ValueError.
        """
        check_array("normal_: array", array, written=True)
        check_number("normal_: std", std, "at least 0")
        flat, n = array.reshape(-1), array.size
        if n < 16:
            few = [self.normal() * std + mean for _ in range(n)]
            flat[:] = np.array(few, np.float32)
            return
        for start in range(0, n - n % 16, AT_ONCE):
            u = self.uniform(min(AT_ONCE, n - n % 16 - start))
            flat[start : start + len(u)] = box_muller(u, mean, std)
        if n % 16:
            self.uint32(n % 16)
            flat[-16:] = box_muller(self.uniform(16), mean, std)
