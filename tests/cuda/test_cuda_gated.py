"""SwiGLU and GeGLU on a GPU: what they move.

How they end far from zero, tests/reference/test_gated.py shows.
"""

import pytest
from gpu import check_row


@pytest.mark.parametrize("kind", ["swiglu", "geglu"])
def test_what_gates_move(kind):
    """inp once and out once; three arrays twice as wide on the way back."""
    forward, backward = check_row(kind, 1, 4, 256, tol=2e-6)
    assert forward.sectors == 4 * (64 + 32)
    assert backward.sectors == 4 * (64 + 32 + 64)
    assert forward.requests == forward.sectors // 16
