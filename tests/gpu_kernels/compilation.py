"""Compile every kernel for some GPUs, without one: python -m tests.gpu_kernels.compilation

In a process of its own: Triton decides when it is imported whether it compiles or interprets.
"""

from __future__ import annotations

import json
import re

from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_longpo.gpu_kernels import rotation, softmax, swiglu

POINTER, INTEGER = "*bf16", "i32"
ROW = {"row_stride": INTEGER}
VOCABULARY = {"WIDTH": 151936, "BLOCK": 4096}
KERNELS = [
    (swiglu._forward, {"rows": POINTER, "result": POINTER, **ROW, "width": INTEGER}, {"BLOCK": 1024}),
    (
        swiglu._backward,
        {"grads": POINTER, "rows": POINTER, "result": POINTER, "grad_stride": INTEGER, **ROW, "width": INTEGER},
        {"BLOCK": 1024},
    ),
    (softmax._logsumexp, {"logits": "*fp32", "result": "*fp32", **ROW}, VOCABULARY),
    (softmax._error, {"logits": "*fp32", "log_total": "*fp32", "target": "*i64", "out": POINTER, **ROW}, VOCABULARY),
    (
        rotation._rotate,
        {"heads": POINTER, "cosines": "*fp32", "sines": "*fp32", "result": POINTER}
        | {"token_stride": INTEGER, "head_stride": INTEGER, "num_heads": INTEGER},
        {"HALF": 64, "BLOCK": 64, "HEADS": 16},
    ),
]


def main() -> None:
    """Print per kernel and architecture how many loads it has, and how many of 16 bytes."""
    for kernel, arguments, constants in KERNELS:
        signature = arguments | dict.fromkeys(constants, "constexpr")
        # As of tensors from torch's allocator, and of real models' sizes.
        aligned = {(index,): [["tt.divisibility", 16]] for index in range(len(arguments))}
        for architecture in (80, 90, 100):
            source = ASTSource(kernel, signature, constants, attrs=aligned)
            ptx = compile_kernel(source, target=GPUTarget("cuda", architecture, 32)).asm["ptx"]
            wide = len(re.findall(r"ld\.global(\.\w+)*\.v4\.b32", ptx))
            print(json.dumps([kernel.__name__, architecture, len(re.findall(r"ld\.global", ptx)), wide]))


if __name__ == "__main__":
    main()
