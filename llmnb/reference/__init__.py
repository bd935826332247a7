# Written by `make export` from notebooks/*/*.py: edit that file.

"""The layers in NumPy, forward and backward."""

from llmnb.reference.adamw import (
    ADAMW_LIMITS,
    AdamW,
    Factors,
    adamw_update,
    clip_gradients,
    global_norm,
)
from llmnb.reference.attention import (
    Heads,
    attention_backward,
    attention_forward,
    count_heads,
    masked_scores,
    split_heads,
    split_qkv,
)
from llmnb.reference.bfloat16 import (
    from_bfloat16,
    to_bfloat16,
)
from llmnb.reference.crossentropy import (
    crossentropy_softmax_backward,
    crossentropy_softmax_forward,
)
from llmnb.reference.encoder import (
    encoder_backward,
    encoder_forward,
)
from llmnb.reference.gelu import (
    gelu_backward,
    gelu_forward,
)
from llmnb.reference.layernorm import (
    layernorm_backward,
    layernorm_forward,
)
from llmnb.reference.matmul import (
    matmul_backward,
    matmul_forward,
)
from llmnb.reference.residual import (
    residual_backward,
    residual_forward,
)

__all__ = [
    "ADAMW_LIMITS",
    "AdamW",
    "Factors",
    "Heads",
    "adamw_update",
    "attention_backward",
    "attention_forward",
    "clip_gradients",
    "count_heads",
    "crossentropy_softmax_backward",
    "crossentropy_softmax_forward",
    "encoder_backward",
    "encoder_forward",
    "from_bfloat16",
    "gelu_backward",
    "gelu_forward",
    "global_norm",
    "layernorm_backward",
    "layernorm_forward",
    "masked_scores",
    "matmul_backward",
    "matmul_forward",
    "residual_backward",
    "residual_forward",
    "split_heads",
    "split_qkv",
    "to_bfloat16",
]
