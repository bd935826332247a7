# Written by `make export` from notebooks/*/*.py: edit that file.

"""Models on disk: llm.c's .bin, safetensors, Hugging Face's."""
