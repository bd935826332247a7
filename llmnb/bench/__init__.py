# Written by `make export` from notebooks/*/*.py: edit that file.

"""Time: stopwatch, race, ladders, report."""
