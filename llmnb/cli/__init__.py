# Written by `make export` from notebooks/*/*.py: edit that file.

"""The command line, a file a command."""
