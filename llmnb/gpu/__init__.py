# Written by `make export` from notebooks/*/*.py: edit that file.

"""The machine under `llmnb.cuda`: simulator, launch, PTX, graphs."""
