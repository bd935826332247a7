# Written by `make export` from notebooks/1_by_hand/18_training.py: edit that file.

"""A text cut into equal parts, one for each row of a batch."""

__all__ = ["Readers"]


# imports of the readers
import numpy as np


# eight readers of one text
class Readers:
    """Row b of each batch reads part b of a text, from its beginning.

    tokens: a 1-D integer array of B * T * n tokens, for n batches, and one
    more, or ValueError is raised. Its next_batch() returns (tokens, targets),
    each int32 (B, T).

    Derived in chapter 1.18.
    """

    def __init__(self, tokens, B, T):
        tokens = np.array(tokens, np.int32)
        if tokens.ndim != 1 or (tokens.size - 1) % (B * T):
            raise ValueError(
                f"Readers: tokens must have shape (n * {B * T} + 1,), "
                f"got {tokens.shape}"
            )
        self.tokens = tokens[:-1].reshape(B, -1, T)
        self.targets = tokens[1:].reshape(B, -1, T)
        self.step = 0

    def next_batch(self):
        """The batch that follows; IndexError after the last."""
        s, self.step = self.step, self.step + 1
        return self.tokens[:, s], self.targets[:, s]
