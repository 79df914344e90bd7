"""The quick results of operators on fake tensors beside those of PyTorch's `FakeTensorMode`."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._pytree import tree_leaves

from megatron_longpo.planning import dry_run as dry_run_module
from megatron_longpo.planning.dry_run import dry_run
from megatron_longpo.planning.fake_calls import FakeCalls
from tests.planning.cases import FULL, rows_of, run_config

aten = torch.ops.aten


class _Checked(FakeCalls):
    """Asks the mode too, where calling an operator twice has no effect that lasts."""

    compared: ClassVar[set[str]] = set()

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = super().__call__(func, args, kwargs)
        if result is not NotImplemented and func.namespace == "aten" and func is not aten._local_scalar_dense.default:
            self.compared.add(str(func))
            assert _described(result, args) == _described(func(*args, **kwargs), args), (func, args, kwargs)
        return result


def _described(result: Any, args: Any) -> list[Any]:
    """Everything about the tensors of a result that memory depends on, and what they are views of."""
    given = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
    described: list[Any] = [type(result)]
    for leaf in tree_leaves(result):
        if not isinstance(leaf, torch.Tensor):
            described.append(leaf)
            continue
        storage = leaf.untyped_storage()
        shared = [number for number, each in enumerate(given) if each.untyped_storage()._cdata == storage._cdata]
        same = [number for number, each in enumerate(given) if each is leaf]
        # The stride of a dimension of one is nothing that a step could notice; the mode's differ from the kernels'.
        strides = [stride for size, stride in zip(leaf.shape, leaf.stride(), strict=True) if size > 1]
        layout = (leaf.shape, strides, leaf.storage_offset(), leaf.dtype, leaf.device)
        described.append((*layout, storage.nbytes(), shared, same))
    return described


@pytest.mark.parametrize(
    ("words", "world_size"),
    [
        (f"--bf16 --global-batch-size 2 --use-distributed-optimizer --context-parallel-size 2 {FULL}", 4),
        pytest.param(
            f"{FULL} --recompute-keep-attention --mlp-chunk-tokens 100 --window-size 15,0", 1, marks=pytest.mark.slow
        ),
        pytest.param(
            "--bf16 --tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2",
            4,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "--bf16 --context-parallel-size 4 --cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 2",
            4,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_operator_of_a_step_returns_what_the_mode_returns(
    words: str, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run_module, "FakeCalls", _Checked)
    _Checked.compared.clear()
    config = run_config(words, world_size)
    dry_run(config, world_size, rows_of(config))
    assert len(_Checked.compared) > 40
    assert {"aten.slice.Tensor", "aten.mm.default", "aten.copy_.default"} <= _Checked.compared


def test_a_repeated_call_is_told_by_shapes_dtypes_and_types_of_numbers() -> None:
    with FakeTensorMode() as mode:
        calls = FakeCalls(mode)
        for shape, dtype, number in (((2, 3), torch.int64, 1), ((2, 3), torch.int64, 1.0), ((4, 3), torch.int64, 1)):
            tensor = torch.empty(shape, dtype=dtype)
            first, again = (calls(aten.mul.Tensor, (tensor, number), {}) for _ in range(2))
            expected = tensor * number
            for result in (first, again):
                assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
            assert first.untyped_storage()._cdata != again.untyped_storage()._cdata
        # A transposed argument gives a transposed result.
        turned = calls(aten.neg.default, (torch.empty(3, 4).t(),), {})
        assert turned.stride() == (1, 4) != calls(aten.neg.default, (torch.empty(4, 3),), {}).stride()
        # What depends on values is never answered from memory.
        mask = torch.empty(4, dtype=torch.bool)
        with pytest.raises(DynamicOutputShapeException):
            calls(aten.nonzero.default, (mask,), {})


@pytest.mark.parametrize(("dtype", "number"), [(torch.bool, True), (torch.bfloat16, 1.0), (torch.int64, 1)])
def test_numbers_that_fake_tensors_lack_are_one(dtype: torch.dtype, number: Any) -> None:
    with FakeTensorMode() as mode:
        answer = FakeCalls(mode)(aten._local_scalar_dense.default, (torch.empty((), dtype=dtype),), {})
    assert answer == number and type(answer) is type(number)
