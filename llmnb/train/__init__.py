# Written by `make export` from notebooks/*/*.py: edit that file.

"""The training loop, its runs, and what a model has learnt."""
