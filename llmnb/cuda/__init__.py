# Written by `make export` from notebooks/*.py: edit that file.

"""The cuda backend."""

from llmnb.cuda.attention import (
    ATTENTION_BACKWARD,
    ATTENTION_FORWARD,
    WIDEST_HEAD,
    attention_backward,
    attention_forward,
    attention_scratch,
)
from llmnb.cuda.launch import (
    ALIGN,
    DeviceArray,
    Kernel,
    check_device,
    device,
    empty,
    kernel,
    missing,
    simulated,
    stream,
    to_device,
    to_host,
)
from llmnb.cuda.matmul import (
    MATMUL_BACKWARD,
    MATMUL_FORWARD,
    matmul_backward,
    matmul_forward,
    matmul_scratch,
)
from llmnb.cuda.ptx import (
    Compiled,
    compile_kernel,
    no_compiler,
)
from llmnb.cuda.simulator import (
    Seen,
    cuda,
    load4,
    record,
    simulate,
    store4,
    watch,
)
from llmnb.cuda.warp import (
    block_max,
    block_sum,
    warp_max,
    warp_sum,
)

__all__ = [
    "ALIGN",
    "ATTENTION_BACKWARD",
    "ATTENTION_FORWARD",
    "Compiled",
    "DeviceArray",
    "Kernel",
    "MATMUL_BACKWARD",
    "MATMUL_FORWARD",
    "Seen",
    "WIDEST_HEAD",
    "attention_backward",
    "attention_forward",
    "attention_scratch",
    "block_max",
    "block_sum",
    "check_device",
    "compile_kernel",
    "cuda",
    "device",
    "empty",
    "kernel",
    "load4",
    "matmul_backward",
    "matmul_forward",
    "matmul_scratch",
    "missing",
    "no_compiler",
    "record",
    "simulate",
    "simulated",
    "store4",
    "stream",
    "to_device",
    "to_host",
    "warp_max",
    "warp_sum",
    "watch",
]
