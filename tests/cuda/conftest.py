"""What all tests of llmnb.cuda want."""

import numpy as np
import pytest
from gpu import SIMULATED


@pytest.fixture(autouse=True)
def begun(monkeypatch):
    """The same numbers for each test, whichever ran before it.

    Where there is no GPU, the simulator is asked for, so that nothing warns.
    """
    monkeypatch.setattr("gpu._rng", np.random.default_rng(0))
    if SIMULATED:
        monkeypatch.setenv("LLMNB_CUDA", "simulator")
