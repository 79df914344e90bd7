"""Formulas with the signatures of Transformer Engine's compiled library: what each of its kernels computes.

The signatures are those of ``transformer_engine/pytorch/csrc/extensions/pybind.cpp``. What no test calls is only a
name.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from tests.te_on_cpu.names import (  # noqa: F401
    DType,
    FP8BwdTensors,
    FP8FwdTensors,
    Name,
    NVTE_Fused_Attn_Backend,
)


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return Name(name)


_TORCH_DTYPE = {
    DType.kByte: torch.uint8,
    DType.kInt32: torch.int32,
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
    DType.kFloat8E4M3: torch.float8_e4m3fn,
    DType.kFloat8E5M2: torch.float8_e5m2,
}


def get_cublasLt_version() -> int:
    """CUDA 13's."""
    return 130000


def get_cudnn_version() -> int:
    """cuDNN 9.13."""
    return 91300


def get_num_cublas_streams() -> int:
    """Streams of grouped products."""
    return 4


def device_supports_multicast(device: int = -1) -> bool:
    """Of NVLink."""
    return False


def generic_gemm(
    a: torch.Tensor,
    trans_a: bool,
    b: torch.Tensor,
    trans_b: bool,
    out: torch.Tensor | None,
    quantizer: Any,
    out_dtype: DType | None,
    bias: torch.Tensor | None,
    bias_dtype: DType,
    gelu: bool,
    gelu_in: torch.Tensor | None,
    grad: bool,
    workspace: torch.Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Any = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
    """``op(b) @ op(a)``, for column-major cuBLAS ``op(a) op(b)``; ``+ bias``, or with ``grad`` the bias's gradient."""
    assert quantizer is None and not gelu and comm_overlap is None
    matrix_a, matrix_b = _matrix(a, rows=trans_a), _matrix(b, rows=not trans_b)
    assert matrix_a.dtype == matrix_b.dtype, (matrix_a.dtype, matrix_b.dtype)
    left, right = matrix_b.T if trans_b else matrix_b, matrix_a.T if trans_a else matrix_a
    dtype = out.dtype if out is not None else a.dtype if out_dtype is None else _TORCH_DTYPE[out_dtype]
    product = left.to(dtype) @ right.to(dtype)
    bias_grad = None
    if bias is not None and grad:
        bias_grad = matrix_b.sum(0).to(bias.dtype)
    elif bias is not None:
        product = product + bias
    if not trans_b:
        product = product.view(*b.shape[:-1], product.shape[-1])
    if out is None:
        return product, bias_grad, None, None
    out.add_(product.view_as(out)) if accumulate else out.copy_(product.view_as(out))
    return out, bias_grad, None, None


def _matrix(operand: Any, rows: bool) -> torch.Tensor:
    """A product's operand as a matrix. Hopper multiplies fp8 along rows only: the other way needs a transposed copy."""
    if isinstance(operand, torch.Tensor) and not hasattr(operand, "_fp8_dtype"):
        return operand.reshape(-1, operand.shape[-1])
    dtype = _TORCH_DTYPE[operand._fp8_dtype]
    if rows:
        data = operand._data.view(dtype).flatten(0, -2)
    else:
        assert not operand._transpose_invalid, "fp8 without the transposed copy that this product reads"
        data = operand._transpose.view(dtype).flatten(1).T
    assert all(size % 16 == 0 for size in data.shape), f"cuBLAS multiplies no fp8 matrix of {tuple(data.shape)}"
    return data.float() * operand._scale_inv


def quantize(tensor: torch.Tensor, quantizer: Any, output: Any = None, noop: torch.Tensor | None = None) -> Any:
    """One factor for the whole tensor: that of earlier steps (delayed scaling), or of its own largest value.

    ``noop`` is set where weights did not change since the last micro-batch.
    """
    dtype = _TORCH_DTYPE[quantizer.dtype]
    largest = torch.finfo(dtype).max
    if noop is not None and bool(noop):
        return output
    amax = tensor.detach().abs().amax().float()
    if type(quantizer).__name__ == "Float8CurrentScalingQuantizer":
        if quantizer.with_amax_reduction:
            dist.all_reduce(amax, dist.ReduceOp.MAX, group=quantizer.amax_reduction_group)
        scale = largest / amax if amax > 0 else torch.ones(())
    else:
        scale = quantizer.scale
        quantizer.amax.copy_(amax.reshape(quantizer.amax.shape))
    data = (tensor.detach().float() * scale).clamp(-largest, largest).to(dtype).view(torch.uint8)
    if output is None:
        output = quantizer.make_empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    if output._data is not None:
        output._data.copy_(data)
    if output._transpose is not None:
        output._transpose.copy_(data.movedim(-1, 0))
        output._transpose_invalid = False
    output._scale_inv.copy_(1 / scale)
    return output


def create_empty_quantized_tensor(
    quantizer: Any, shape: list[int], dtype: torch.dtype, device: torch.device, pin_memory: bool
) -> Any:
    """An fp8 tensor that `quantize` fills: rows, columns (the transposed copy that Hopper multiplies) or both."""
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    transposed = [shape[-1], *shape[:-1]]
    parts = {
        "data": torch.empty(shape, dtype=torch.uint8) if quantizer.rowwise_usage else None,
        "data_transpose": torch.empty(transposed, dtype=torch.uint8) if quantizer.columnwise_usage else None,
        "fp8_scale_inv": torch.empty(1),
        "fp8_dtype": quantizer.dtype,
        "quantizer": quantizer,
    }
    if quantizer.internal:
        return Float8TensorStorage(**parts, fake_dtype=dtype)
    return Float8Tensor(**parts, shape=shape, dtype=dtype, device=device)


def bgrad_quantize(tensor: torch.Tensor, quantizer: Any) -> tuple[torch.Tensor, Any]:
    """The gradient of a bias, and `quantize`."""
    return tensor.flatten(0, -2).sum(0), quantize(tensor, quantizer)


def fp8_transpose(data: torch.Tensor, dtype: DType, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """The last dimension first."""
    transposed = data.movedim(-1, 0).contiguous()
    return transposed if out is None else out.copy_(transposed)


def rmsnorm_fwd(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor | None,
    quantizer: Any,
    out_dtype: DType,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[torch.Tensor, None, torch.Tensor]:
    """``hidden * rsqrt(mean(hidden^2) + eps) * weight`` and the fp32 reciprocal root of every row."""
    assert quantizer is None and out is None
    wide = hidden.float()
    rsigma = torch.rsqrt(wide.square().mean(-1) + eps)
    normed = wide * rsigma[:, None] * _gamma(weight, zero_centered_gamma)
    return normed.to(_TORCH_DTYPE[out_dtype]), None, rsigma


def rmsnorm_bwd(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    rsigma: torch.Tensor,
    weight: torch.Tensor,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of ``hidden`` and ``weight``."""
    normed = hidden.float() * rsigma[:, None]
    scaled = grad.float() * _gamma(weight, zero_centered_gamma)
    grad_hidden = (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * rsigma[:, None]
    return grad_hidden.to(grad.dtype), (grad.float() * normed).sum(0).to(weight.dtype)


def _gamma(weight: torch.Tensor, zero_centered: bool) -> torch.Tensor:
    return weight.float() + 1 if zero_centered else weight.float()


def multi_tensor_scale(chunk: int, noop: torch.Tensor, lists: list[list[torch.Tensor]], scale: float) -> None:
    """``lists[1] = lists[0] * scale``."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_scale_tensor(chunk: int, noop: torch.Tensor, lists: list[list[torch.Tensor]], scale: Any) -> None:
    """`multi_tensor_scale` by a tensor."""
    multi_tensor_scale(chunk, noop, lists, scale)


def multi_tensor_l2norm(
    chunk: int, noop: torch.Tensor, lists: list[list[torch.Tensor]], per_tensor: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of all tensors together ``[1]``, and of each."""
    norms = torch.stack([x.float().norm() for x in lists[0]])
    return norms.norm().reshape(1), norms if per_tensor else norms[:0]


def multi_tensor_adam(
    chunk: int,
    noop: torch.Tensor,
    lists: list[list[torch.Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """AdamW (``mode`` 1) of gradients, weights and both moments, with master weights as a fifth list."""
    assert mode == 1
    correction1 = 1 - beta1**step if bias_correction else 1.0
    correction2 = 1 - beta2**step if bias_correction else 1.0
    for grad, weight, first, second, *master in zip(*lists, strict=True):
        wide = master[0] if master else weight
        first.lerp_(grad.to(first.dtype), 1 - beta1)
        second.mul_(beta2).addcmul_(grad.to(second.dtype), grad.to(second.dtype), value=1 - beta2)
        update = (first / correction1) / ((second / correction2).sqrt() + eps) + weight_decay * wide
        wide.sub_(lr * update)
        if master:
            weight.copy_(wide)
