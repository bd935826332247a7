# Written by `make export` from notebooks/1_by_hand/12_adamw.py: edit that file.

"""The learning rate of each step: warm-up, then a decline."""

__all__ = ["KINDS", "check_schedule", "learning_rate"]


# imports of the schedule
import math


# the schedule
KINDS = ("cosine", "linear", "constant", "wsd")


def learning_rate(step, peak, warmup, total, kind="cosine", final=0.0):
    """The learning rate of a step, counted from 0, of `total` steps.

    For `warmup` steps it climbs in equal stairs to `peak`. Then it falls to
    `final * peak` along half a cosine ("cosine") or a line ("linear"), stays
    ("constant"), or stays until 80 % of `total` and falls as 1 - sqrt
    ("wsd"). Raises ValueError for an unknown kind and numbers out of range.

    Derived in chapter 1.12.
    """
    check_schedule(step, peak, warmup, total, kind, final)
    if step < warmup:
        return peak * (step + 1) / warmup
    start = max(warmup, int(0.8 * total)) if kind == "wsd" else warmup
    u = min(1, (max(step, start) - start) / max(1, total - start))
    left = {
        "cosine": (1 + math.cos(math.pi * u)) / 2,
        "linear": 1 - u,
        "constant": 1,
        "wsd": 1 - math.sqrt(u),
    }
    return peak * (final + (1 - final) * left[kind])


# check a schedule
def check_schedule(step, peak, warmup, total, kind, final):
    """Raise ValueError unless `learning_rate` can work with these.

    Derived in chapter 1.12.
    """
    if kind not in KINDS:
        known = ", ".join(KINDS)
        raise ValueError(f"learning_rate: no kind {kind!r}, only {known}")
    limits = [
        ("step", step, step >= 0, "at least 0"),
        ("peak", peak, peak >= 0, "at least 0"),
        ("total", total, total >= 1, "at least 1"),
        ("warmup", warmup, 0 <= warmup <= total, f"in [0, {total}]"),
        ("final", final, 0 <= final <= 1, "in [0, 1]"),
    ]
    for name, value, ok, limit in limits:
        if not ok:
            raise ValueError(
                f"learning_rate: {name} must be {limit}, got {value}"
            )
