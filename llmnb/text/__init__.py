# Written by `make export` from notebooks/*/*.py: edit that file.

"""Tokenizers, texts, shards and batches."""
