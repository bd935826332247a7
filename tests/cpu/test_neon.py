"""The tile of NEON, run by an emulator where the processor has none.

LLMNB_ARM names a Python for 64-bit ARM; `python tests/arm.py FOLDER` makes it.
It takes minutes: the emulator runs LLVM, too.
"""

import json
import os
import platform
from functools import partial
from pathlib import Path

import pytest
from processes import output, python
from test_tile import AT_A_SHAPE, CHOSEN

from llmnb.cpu.tile import cpu_features

TESTS = Path(__file__).parents[1]
ARM = os.environ.get("LLMNB_ARM")
MACHINE = platform.machine().lower()
pytestmark = [
    pytest.mark.skipif(
        MACHINE in ("arm64", "aarch64"), reason="all tests run on NEON here"
    ),
    pytest.mark.skipif(
        not ARM,
        reason="LLMNB_ARM names no Python for ARM; see tests/arm.py",
    ),
]
# a kernel that is compiled while hypothesis draws is no fault of the test
SLOW = """
from hypothesis import HealthCheck, settings
settings.register_profile("slow", suppress_health_check=list(HealthCheck))
settings.load_profile("slow")
"""
PRODUCTS = """
import hashlib, json, random
import numpy as np
from layers import NAMED, draw, passed, results
from llmnb import cpu

def digest(x):
    return hashlib.sha256(x.tobytes()).hexdigest()[:12]

pick, found = random.Random(0), {}
sizes = [*range(1, 14), 16, 17, 37, 48, 49, 51, 97]
shapes = [tuple(pick.choices(sizes, k=3)) for _ in range(150)]
for T, C, OC in [*shapes, (50, 801, 49), (300, 40, 41), (13, 2100, 33)]:
    absent = ("residual", *(("bias", "dbias") * (1 - T % 2)))
    p = draw("matmul", 1, T, C, OC, dtype=np.float32, absent=absent)
    p = passed(NAMED["matmul"], cpu, p)
    found[f"{T} {C} {OC}"] = [
        *map(digest, results(NAMED["matmul"], p).values())
    ]
print(json.dumps(found))
"""


# run a program on ARM
emulated = partial(
    python, program=ARM, cwd=TESTS, without=("LLMNB", "NUMBA"), timeout=7200
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("kernels"))


def test_neon_computes_what_the_reference_does(cache):
    """Chosen by the processor, not by LLMNB_TILE."""
    done = emulated(SLOW + AT_A_SHAPE, "6x4x4", *CHOSEN, LLMNB_CACHE=cache)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif("fma" not in cpu_features(), reason="rounds twice")
def test_products_have_the_bits_of_other_processors(cache):
    done = emulated(PRODUCTS, LLMNB_CACHE=cache)
    assert done.returncode == 0, done.stderr
    theirs, ours = json.loads(done.stdout), output(PRODUCTS, cwd=TESTS)
    assert theirs == json.loads(ours)
