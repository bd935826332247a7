"""Rotary positions on a GPU: what they move."""

from gpu import check_row


def test_what_it_moves():
    """x in and out, and a row of the table for each head that turns."""
    seen, _ = check_row("rotary", 1, 4, 32, 4, 2, 0, tol=5e-7)
    assert seen.sectors == 4 * 4 * (2 * 8 + 8)
    assert seen.barriers == seen.exchanges == 0
    assert len(seen.launches) == 1
