# Written by `make export` from notebooks/*/*.py: edit that file.

"""What readers of a chapter see, and how the book is built."""
