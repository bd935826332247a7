# Written by `make export` from notebooks/*/*.py: edit that file.

"""The layers compiled by numba for the processor's cores."""

from llmnb.cpu.adamw import (
    adamw_update,
    clip_gradients,
    global_norm,
)
from llmnb.cpu.attention import (
    attention_backward,
    attention_forward,
)
from llmnb.cpu.backend import (
    Backend,
)
from llmnb.cpu.bfloat16 import (
    has_bf16,
)
from llmnb.cpu.compiled import (
    KernelCache,
    cache_folder,
)
from llmnb.cpu.crossentropy import (
    crossentropy_softmax_backward,
    crossentropy_softmax_forward,
)
from llmnb.cpu.decode import (
    cache_attention,
    cache_shapes,
    embed_forward,
    pack_weight,
    panels_forward,
    panels_shape,
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
    inlined,
    inner,
    routine,
    share,
    team,
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
from llmnb.cpu.panels import (
    DEPTH,
    HEIGHT,
    SPARE,
    WIDTH,
    WORK,
    check_bf16,
    scratch,
    work_shape,
)
from llmnb.cpu.residual import (
    residual_backward,
    residual_forward,
)
from llmnb.cpu.tile import (
    COLS,
    LANES,
    ROWS,
    VECTORS,
    cpu_features,
    tile_shape,
)

__all__ = [
    "Backend",
    "COLS",
    "DEPTH",
    "HEIGHT",
    "KernelCache",
    "LANES",
    "ROWS",
    "SPARE",
    "VECTORS",
    "WIDTH",
    "WORK",
    "adamw_update",
    "attention_backward",
    "attention_forward",
    "cache_attention",
    "cache_folder",
    "cache_shapes",
    "check_bf16",
    "clip_gradients",
    "cpu_features",
    "crossentropy_softmax_backward",
    "crossentropy_softmax_forward",
    "embed_forward",
    "encoder_backward",
    "encoder_forward",
    "fast_exp",
    "gelu_backward",
    "gelu_forward",
    "global_norm",
    "has_bf16",
    "inlined",
    "inner",
    "layernorm_backward",
    "layernorm_forward",
    "matmul_backward",
    "matmul_forward",
    "pack_weight",
    "panels_forward",
    "panels_shape",
    "residual_backward",
    "residual_forward",
    "routine",
    "scratch",
    "share",
    "team",
    "tile_shape",
    "work_shape",
]
