# Written by `make export` from notebooks/2_cpu/07_step.py: edit that file.

"""What the compiled layers ask of a model's memory, and offer it."""

__all__ = ["Backend"]


# imports of the backend
import warnings

from llmnb import backend
from llmnb.cpu.panels import work_shape


# the backend
class Backend(backend.Backend):
    """The host with compiled layers: scratch for products, and bfloat16.

    Derived in chapter 2.7.
    """

    replays = True

    def __init__(self, layers, precision):
        if precision == "bf16" and not layers.has_bf16():
            warnings.warn(
                "GPT2: this processor has no bfloat16 products "
                "(AVX512-BF16); computing in fp32",
                stacklevel=4,
            )
            precision = "fp32"
        super().__init__(layers, precision)

    def groups(self, cfg, batch_size, seq_len):
        """Scratch memory that the products pack their panels into."""
        return {"work": (self.dtype, {"panels": work_shape()})}

    def allocate(self, layout, needed):
        """An Arena; the products take its scratch, and know the precision."""
        memory = super().allocate(layout, needed)
        work = memory["work"]["panels"]
        self.how = {"work": work, "bf16": self.precision == "bf16"}
        return memory
