# Written by `make export` from notebooks/*.py: edit that file.

"""The cpu backend."""

from llmnb.cpu.adamw import (
    adamw_update,
    check_flat,
    clip_gradients,
    global_norm,
)
from llmnb.cpu.attention import (
    attention_backward,
    attention_forward,
)
from llmnb.cpu.crossentropy import (
    crossentropy_backward,
    crossentropy_forward,
    crossentropy_softmax_backward,
    crossentropy_softmax_forward,
    softmax_backward,
    softmax_forward,
)
from llmnb.cpu.encoder import (
    encoder_backward,
    encoder_forward,
)
from llmnb.cpu.gelu import (
    gelu_backward,
    gelu_forward,
)
from llmnb.cpu.jit import (
    cache_folder,
    inner,
    kernel,
)
from llmnb.cpu.layernorm import (
    layernorm_backward,
    layernorm_forward,
)
from llmnb.cpu.math import (
    fast_exp,
)
from llmnb.cpu.matmul import (
    matmul_backward,
    matmul_forward,
)
from llmnb.cpu.residual import (
    residual_backward,
    residual_forward,
)

__all__ = [
    "adamw_update",
    "attention_backward",
    "attention_forward",
    "cache_folder",
    "check_flat",
    "clip_gradients",
    "crossentropy_backward",
    "crossentropy_forward",
    "crossentropy_softmax_backward",
    "crossentropy_softmax_forward",
    "encoder_backward",
    "encoder_forward",
    "fast_exp",
    "gelu_backward",
    "gelu_forward",
    "global_norm",
    "inner",
    "kernel",
    "layernorm_backward",
    "layernorm_forward",
    "matmul_backward",
    "matmul_forward",
    "residual_backward",
    "residual_forward",
    "softmax_backward",
    "softmax_forward",
]
