"""Enumerations of Transformer Engine's compiled library, and what stands for everything else that it names."""

from __future__ import annotations

import enum
import zlib
from typing import Any


class Name:
    """Something that modules name when they are imported."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Name(f"{self._name}.{name}")

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"transformer_engine_torch.{self._name} has no formula in {__package__}.extension")

    def __int__(self) -> int:
        return zlib.crc32(self._name.encode())  # members of enumerations are told apart by it

    def __or__(self, other: Any) -> Any:
        return Any

    __ror__ = __or__


class DType(enum.IntEnum):
    """Numbered as in ``transformer_engine.h``; those that ``pybind.cpp`` has."""

    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


class FP8FwdTensors(enum.IntEnum):
    """Numbered as in ``common.h``."""

    GEMM1_INPUT = 0
    GEMM1_WEIGHT = 1
    GEMM1_OUTPUT = 2
    GEMM2_INPUT = 3
    GEMM2_WEIGHT = 4
    GEMM2_OUTPUT = 5
    GEMM3_INPUT = 6
    GEMM3_WEIGHT = 7
    GEMM3_OUTPUT = 8


class FP8BwdTensors(enum.IntEnum):
    """Numbered as in ``common.h``."""

    GRAD_OUTPUT1 = 0
    GRAD_INPUT1 = 1
    GRAD_OUTPUT2 = 2
    GRAD_INPUT2 = 3
    GRAD_OUTPUT3 = 4
    GRAD_INPUT3 = 5


class _AttentionBackends(enum.EnumMeta):
    def __getattr__(cls, name: str) -> Any:
        return Name(name)


class NVTE_Fused_Attn_Backend(enum.IntEnum, metaclass=_AttentionBackends):
    """Numbered as in ``fused_attn.h``; an older Transformer Engine names more."""

    NVTE_No_Backend = -1
    NVTE_F16_arbitrary_seqlen = 1
    NVTE_FP8 = 2
