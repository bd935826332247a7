# Written by `make export` from notebooks/*/*.py: edit that file.

"""The layers as kernels for a GPU, or for the simulator."""

from llmnb.cuda.adamw import (
    adamw_apply,
    adamw_scratch,
    adamw_settings,
    adamw_update,
    clip_apply,
    clip_gradients,
    clip_scratch,
    global_norm,
)
from llmnb.cuda.attention import (
    WIDEST_HEAD,
    attention_forward,
    check_heads,
)
from llmnb.cuda.crossentropy import (
    crossentropy_softmax_backward,
    crossentropy_softmax_forward,
)
from llmnb.cuda.cublas import (
    Plan,
    cublas_backward,
    cublas_forward,
    cublas_scratch,
    dinp_plan,
    dweight_plan,
    forward_plan,
    no_cublas,
)
from llmnb.cuda.elementwise import (
    BLOCK,
    elementwise,
)
from llmnb.cuda.encoder import (
    encoder_backward,
    encoder_forward,
)
from llmnb.cuda.gelu import (
    gelu_backward,
    gelu_forward,
)
from llmnb.cuda.layernorm import (
    layernorm_backward,
    layernorm_forward,
    layernorm_scratch,
)
from llmnb.cuda.matmul import (
    matmul_backward,
    matmul_forward,
    matmul_scratch,
)
from llmnb.cuda.model import (
    Backend,
    LAYERS,
    fill,
    gpu,
    model_layers,
    model_layout,
    no_gpu,
    products,
    zeros,
)
from llmnb.cuda.residual import (
    residual_backward,
    residual_forward,
)
from llmnb.cuda.walks import (
    attention_backward,
    attention_scratch,
)
from llmnb.gpu.graph import (
    Graph,
)
from llmnb.gpu.launch import (
    ALIGN,
    DEVICE,
    DeviceArray,
    Kernel,
    address,
    aligned,
    check_device,
    device,
    device_kind,
    empty,
    kernel,
    missing,
    numbered,
    overlap,
    simulated,
    stream,
    stream_address,
    to_device,
    to_host,
)
from llmnb.gpu.ptx import (
    Compiled,
    assemble,
    compile_kernel,
    no_compiler,
)
from llmnb.gpu.simulator import (
    BarrierError,
    RaceError,
    Seen,
    cuda,
    load4,
    record,
    simulate,
    store4,
    watch,
)
from llmnb.gpu.warp import (
    block_max,
    block_sum,
    warp_max,
    warp_sum,
)

__all__ = [
    "ALIGN",
    "BLOCK",
    "Backend",
    "BarrierError",
    "Compiled",
    "DEVICE",
    "DeviceArray",
    "Graph",
    "Kernel",
    "LAYERS",
    "Plan",
    "RaceError",
    "Seen",
    "WIDEST_HEAD",
    "adamw_apply",
    "adamw_scratch",
    "adamw_settings",
    "adamw_update",
    "address",
    "aligned",
    "assemble",
    "attention_backward",
    "attention_forward",
    "attention_scratch",
    "block_max",
    "block_sum",
    "check_device",
    "check_heads",
    "clip_apply",
    "clip_gradients",
    "clip_scratch",
    "compile_kernel",
    "crossentropy_softmax_backward",
    "crossentropy_softmax_forward",
    "cublas_backward",
    "cublas_forward",
    "cublas_scratch",
    "cuda",
    "device",
    "device_kind",
    "dinp_plan",
    "dweight_plan",
    "elementwise",
    "empty",
    "encoder_backward",
    "encoder_forward",
    "fill",
    "forward_plan",
    "gelu_backward",
    "gelu_forward",
    "global_norm",
    "gpu",
    "kernel",
    "layernorm_backward",
    "layernorm_forward",
    "layernorm_scratch",
    "load4",
    "matmul_backward",
    "matmul_forward",
    "matmul_scratch",
    "missing",
    "model_layers",
    "model_layout",
    "no_compiler",
    "no_cublas",
    "no_gpu",
    "numbered",
    "overlap",
    "products",
    "record",
    "residual_backward",
    "residual_forward",
    "simulate",
    "simulated",
    "store4",
    "stream",
    "stream_address",
    "to_device",
    "to_host",
    "warp_max",
    "warp_sum",
    "watch",
    "zeros",
]
