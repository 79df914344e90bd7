"""The CPU adapters: scoped to Megatron's modules, and tied to the versions they were checked on."""

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version

import megatron_longpo
from megatron_longpo import platform
from megatron_longpo.arguments import parse_arguments
from megatron_longpo.model.specs import block_spec
from megatron_longpo.platform import transfers
from megatron_longpo.platform.megatron_core import require_checked_version
from megatron_longpo.platform.optimizer_shards import blocks
from tests.tiny import MODEL_FLAGS

cpu_only = pytest.mark.skipif(platform.has_cuda(), reason="the adapters are for machines without CUDA")


def test_installed_megatron_core_was_checked() -> None:
    import megatron.core

    installed = Version(megatron.core.__version__)
    assert f"{installed.major}.{installed.minor}" in platform.CHECKED_VERSIONS, (
        f"megatron-core {installed} is new here: run the whole suite, then add it to platform.CHECKED_VERSIONS"
    )
    # 0.19 adds the commit of the repository that its folder lies in: with .venv in a clone, that of the clone.
    assert version("megatron-core") == megatron.core.__version__.partition("+")[0]


@cpu_only
def test_unchecked_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.core.__version__", "0.99.0")
    with pytest.raises(RuntimeError, match=r"megatron-core 0\.99\.0 was not checked on a CPU.*0\.16"):
        require_checked_version()


def test_megatron_core_is_imported_without_triton() -> None:
    import megatron.core

    if not Path(megatron.core.__file__).with_name("transformer").joinpath("moe/ops/paged_stash.py").exists():
        pytest.skip("this Megatron-Core does not ask for it")
    without = "import sys; sys.modules['triton'] = None; "
    lines = f"{without} import megatron_longpo.platform; from megatron.core.models.gpt import GPTModel"
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@cpu_only
def test_torch_itself_is_untouched() -> None:
    platform.prepare()
    from megatron.core.tensor_parallel import mappings

    assert mappings.torch is not torch
    assert mappings.torch.empty(1, device=mappings.torch.cuda.current_device()).device.type == "cpu"
    assert mappings.torch.zeros(2, device="cuda").device.type == "cpu"
    assert mappings.torch.Tensor is torch.Tensor
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(2, device="cuda")


@cpu_only
def test_type_names_say_cuda_only_during_construction() -> None:
    tensor = torch.zeros(1)
    with platform.construction():
        assert tensor.type() == "torch.cuda.FloatTensor"
        assert tensor.bfloat16().type() == "torch.cuda.BFloat16Tensor"
        assert tensor.cuda() is tensor
    assert tensor.type() == "torch.FloatTensor"


@cpu_only
def test_gradient_clipping_scales_to_the_norm() -> None:
    platform.prepare()
    from megatron.core.optimizer import clip_grads

    parameter = torch.nn.Parameter(torch.zeros(4))
    parameter.grad = torch.full((4,), 3.0)
    clip_grads.clip_grad_by_total_norm_fp32([parameter], max_norm=1.0, total_norm=6.0)
    assert parameter.grad.norm().item() == pytest.approx(1.0)
    clip_grads.clip_grad_by_total_norm_fp32([parameter], max_norm=10.0, total_norm=1.0)
    assert parameter.grad.norm().item() == pytest.approx(1.0)


@cpu_only
def test_random_state_fork_is_repeatable_and_restores() -> None:
    platform.prepare()
    from megatron.core.tensor_parallel import random

    tracker = type(random.get_cuda_rng_tracker())()
    tracker.reset()
    tracker.add("here", 7)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with tracker.fork("here"):
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), first)


def test_cuda_is_named_nowhere_else() -> None:
    package, here = Path(megatron_longpo.__file__).parent, Path(platform.__file__).parent
    named = re.compile(r"torch\.cuda\.|\.cuda\(")
    naming = {path for path in package.rglob("*.py") if named.search(path.read_text())}
    assert here / "devices.py" in naming
    assert not [str(path.relative_to(package)) for path in naming if path.parent != here]


@cpu_only
def test_an_attention_backend_needs_its_device_and_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    platform.use_attention_backend("flash")
    with pytest.raises(ValueError, match="--attention-backend fused needs a GPU"):
        platform.use_attention_backend("fused")
    monkeypatch.setattr("megatron_longpo.platform.attention.has_cuda", lambda: True)
    platform.use_attention_backend("fused")
    with pytest.raises(ValueError, match=r"flash3 needs the package flash_attn_3.*fused needs no package"):
        platform.use_attention_backend("flash3")


@pytest.mark.parametrize("num_bytes", [1, 2**20, 2**28, 2**28 - 1, 3 * 2**28 + 5 * 2**20 + 17, 132_096 * 4096 * 2])
def test_pinned_pieces_are_powers_of_two_but_the_last(num_bytes: int) -> None:
    pieces = transfers.piece_bytes(num_bytes)
    assert sum(pieces) == num_bytes and max(pieces) <= 2**28
    rounded = sum(1 << (piece - 1).bit_length() for piece in pieces)
    assert rounded - num_bytes < 2**20
    assert len(pieces) <= num_bytes // 2**28 + 9


def test_pieces_hold_a_tensor() -> None:
    tensor = torch.randn(3, 200_001).bfloat16()
    pieces = transfers.pieces_of(tensor)
    assert len(pieces) == 2 and torch.equal(torch.cat(pieces).view(torch.bfloat16).view_as(tensor), tensor)


def test_a_block_that_recomputes_itself_is_asked() -> None:
    platform.prepare()
    from megatron.core.transformer import transformer_block

    if not hasattr(transformer_block, "checkpointed_forward"):
        pytest.skip("this Megatron-Core asks the block itself")

    class Block:
        def _checkpointed_forward(self, hidden_states: int, **_: int) -> int:
            return hidden_states + 1

    assert transformer_block.checkpointed_forward(Block(), hidden_states=1, padding_mask=0) == 2


def test_layers_of_a_missing_transformer_engine_are_refused() -> None:
    platform.prepare()
    from megatron.core.extensions import transformer_engine

    if transformer_engine.HAVE_TE:
        pytest.skip("it is installed")
    with pytest.raises(ValueError, match=r"--transformer-impl transformer_engine needs Transformer Engine"):
        block_spec(parse_arguments(MODEL_FLAGS).model, "transformer_engine", 1)


@given(st.lists(st.integers(1, 5), max_size=4), st.data())
def test_blocks_of_a_range_are_its_elements_in_order(shape: list[int], data: st.DataObject) -> None:
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
    start = data.draw(st.integers(0, whole.numel()))
    stop = data.draw(st.integers(start, whole.numel()))
    found = []
    for offset, size in blocks(start, stop, shape):
        block = whole
        for axis, (first, length) in enumerate(zip(offset, size, strict=True)):
            block = block.narrow(axis, first, length)
        found.append(block.flatten())
    assert [element for block in found for element in block.tolist()] == list(range(start, stop))
    assert len(found) <= max(1, 2 * len(shape) - 1)
