"""The optimizer on the host resumes as if never stopped: Megatron's hybrid optimizer, with a CPU in the GPU's place.

Its code is the real one. Only what names CUDA is answered for: parameters say that they are on the device unless they
were copied to the host, and streams do nothing.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.optimizer.cpu_offloading import hybrid_optimizer
from torch.overrides import TorchFunctionMode

from megatron_longpo.arguments import parse_arguments
from megatron_longpo.config import RunConfig
from megatron_longpo.data.dataset import PreferenceDataset
from megatron_longpo.model.build import unwrap
from megatron_longpo.training.checkpoint import Progress
from megatron_longpo.training.checkpoint_folder import find_checkpoint
from megatron_longpo.training.data import MicroBatches, training_batches
from megatron_longpo.training.loop import Trainer
from tests.tiny import MODEL_FLAGS, write_tiny_dataset


class HostAndDevice(TorchFunctionMode):
    """``cpu()`` makes a copy that knows where it is; every other tensor says that it is on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.on_host: set[int] = set()
        self.kept: list[torch.Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__self__", None) is torch.Tensor.is_cuda:
            return id(args[0]) not in self.on_host
        if func is torch.Tensor.pin_memory:
            return args[0]
        result = args[0].clone() if func is torch.Tensor.cpu else func(*args, **(kwargs or {}))
        copies = func in (torch.Tensor.detach, torch.Tensor.clone, torch.Tensor.float)
        if func is torch.Tensor.cpu or (copies and id(args[0]) in self.on_host):
            self.on_host.add(id(result))
            self.kept.append(result)
        return result


class Stream:
    """Work in order, as on a CPU."""

    def wait_stream(self, other: Any) -> None: ...

    def record_event(self) -> Stream:
        return self

    def wait(self, other: Any) -> None: ...

    def synchronize(self) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def emulated() -> Iterator[None]:
    hybrid = hybrid_optimizer.HybridDeviceOptimizer
    choose = hybrid._get_sub_optimizer_param_groups

    def choose_places(self: Any, fraction: float) -> Any:
        with HostAndDevice():
            return choose(self, fraction)

    def empty(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return torch.empty(*args, **kwargs)

    cuda = types.SimpleNamespace(current_stream=Stream, Stream=Stream, stream=lambda stream: stream)

    class Torch(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            return {"cuda": cuda, "empty": empty}.get(name) or getattr(torch, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hybrid, "_get_sub_optimizer_param_groups", choose_places)
        patch.setattr(hybrid_optimizer, "torch", Torch("torch"))
        yield


def trainer(config: RunConfig) -> Trainer:
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        # Asked for by `build_optimizer` alone: everything else was decided when the process was prepared.
        patch.setattr("megatron_longpo.training.optimizer.platform.has_cuda", lambda: True)
        return Trainer(config, PreferenceDataset(config.data.data_path, config.model.vocab_size))


def steps(of: Trainer, batches: list[Any]) -> list[float]:
    return [of._step(batch)[0]["loss"] for batch in batches]


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--overlap-cpu-optimizer-d2h-h2d"], id="overlapped"),
        pytest.param(["--optimizer-offload-fraction=0.5"], id="half"),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    world_of_one: None, emulated: None, tmp_path: Path, flags: list[str]
) -> None:
    data = write_tiny_dataset(tmp_path / "tiny", num_documents=8)
    fixed = ["--global-batch-size=2", "--train-iters=4", "--split=100,0", "--seq-length=512", "--num-workers=0"]
    more = ["--objective=sft-chosen", "--bf16", "--use-distributed-optimizer", "--optimizer-cpu-offload", "--lr=1e-2"]
    save = [f"--data-path={data}", f"--save={tmp_path / 'save'}", "--lr-warmup-fraction=0"]
    config = parse_arguments([*MODEL_FLAGS, *fixed, *more, *save, *flags]).with_device_defaults("local", "gloo")
    whole = trainer(config)
    source = training_batches(MicroBatches(config, whole.dataset, None), whole._sampler())
    batches = [next(source) for _ in range(4)]
    steps(whole, batches[:2])
    whole.checkpointer.save(Progress(iteration=2))
    expected = steps(whole, batches[2:])
    resumed = trainer(config)
    found = find_checkpoint(tmp_path / "save")
    assert found is not None
    resumed.checkpointer.load(found)
    assert steps(resumed, batches[2:]) == expected
    for ours, theirs in zip(*(unwrap(t.chunks[0]).parameters() for t in (resumed, whole)), strict=True):
        assert torch.equal(ours, theirs)
    subs = resumed.optimizer.chained_optimizers[0].optimizer.sub_optimizers
    # Transformer Engine's counts steps in its groups, torch's in every state, none of which shares a count.
    torch_states = [state for sub in subs if isinstance(sub, torch.optim.AdamW) for state in sub.state.values()]
    groups = [group for sub in subs if not isinstance(sub, torch.optim.AdamW) for group in sub.param_groups]
    assert len({id(state["step"]) for state in torch_states}) == len(torch_states)
    assert {float(counts["step"]) for counts in [*torch_states, *groups]} == {4.0}
