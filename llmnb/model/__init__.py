# Written by `make export` from notebooks/*/*.py: edit that file.

"""The tensors of a model, its blocks, the model, its writing."""
