"""Rotary frequencies against transformers' own, bit for bit."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import megatron_longpo.platform  # noqa: F401  # isort: skip
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

from megatron_longpo.config import ModelConfig
from megatron_longpo.model.rope import attention_factor, inverse_frequencies, rotary_angles, rotate
from megatron_longpo.training.fingerprint import rope_scaling_mark

HEADS, HIDDEN = 4, 256
SHAPE = {"num_layers": 1, "hidden_size": HIDDEN, "num_attention_heads": HEADS, "kv_channels": HIDDEN // HEADS}


def huggingface(rope_type: str, base: float, **parameters: float | bool) -> tuple[torch.Tensor, float]:
    config = LlamaConfig(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        max_position_embeddings=int(parameters.pop("max_position_embeddings", 131072)),
        rope_parameters={"rope_type": rope_type, "rope_theta": base, **parameters},
    )
    if rope_type == "default":
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        return LlamaRotaryEmbedding(config).inv_freq, 1.0
    return ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"))


@pytest.mark.parametrize("base", [10000.0, 1e6, 1e7])
def test_plain(base: float) -> None:
    theirs, _ = huggingface("default", base)
    assert torch.equal(inverse_frequencies(ModelConfig(**SHAPE, rotary_base=base)), theirs)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3(factor: float) -> None:
    theirs, _ = huggingface(
        "llama3",
        500000.0,
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    model = ModelConfig(**SHAPE, rotary_base=500000.0, use_rope_scaling=True, rope_scaling_factor=factor)
    torch.testing.assert_close(inverse_frequencies(model), theirs, rtol=3e-7, atol=0)


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn(truncate: bool) -> None:
    theirs, their_factor = huggingface(
        "yarn",
        1e6,
        factor=4.0,
        original_max_position_embeddings=32768,
        beta_fast=32.0,
        beta_slow=1.0,
        truncate=truncate,
    )
    model = ModelConfig(
        **SHAPE,
        rotary_base=1e6,
        position_embedding_type="yarn",
        yarn_rotary_scaling_factor=4.0,
        yarn_original_max_position_embeddings=32768,
        yarn_correction_range_round_to_int=truncate,
    )
    torch.testing.assert_close(inverse_frequencies(model), theirs, rtol=3e-7, atol=0)
    assert math.isclose(attention_factor(model), their_factor, rel_tol=1e-12)


def test_yarn_temperature_from_mscale() -> None:
    scaled = dict(SHAPE, position_embedding_type="yarn", yarn_rotary_scaling_factor=40.0)
    equal = ModelConfig(**scaled, yarn_mscale=1.0, yarn_mscale_all_dim=1.0)
    assert attention_factor(equal) == 1.0
    for one in ({}, {"yarn_mscale": 0.7}, {"yarn_mscale_all_dim": 0.7}):
        assert attention_factor(ModelConfig(**scaled, **one)) == 0.1 * math.log(40) + 1, "both count or none"
    other = ModelConfig(**scaled, yarn_mscale=0.7, yarn_mscale_all_dim=1.0)
    assert attention_factor(other) == pytest.approx((0.07 * math.log(40) + 1) / (0.1 * math.log(40) + 1))


def test_angles_follow_position_ids() -> None:
    inverse = inverse_frequencies(ModelConfig(**SHAPE))
    angles = rotary_angles(torch.tensor([0, 1, 2, 1, 2]), inverse)
    assert angles.shape == (5, 1, 1, HIDDEN // HEADS) and angles.dtype == torch.float32
    assert torch.equal(angles[1:3], angles[3:5])
    assert torch.equal(angles[2, 0, 0, : len(inverse)], 2 * inverse)


def test_rotation_equals_megatrons_and_keeps_only_the_angles() -> None:
    heads = torch.randn(7, 1, 3, 10, dtype=torch.float64)[..., :8].requires_grad_()
    angles = rotary_angles(torch.tensor([0, 1, 5, 5, 100_000, 2, 3]), 10.0 ** -torch.arange(4, dtype=torch.float32))
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        ours = rotate(heads, angles)
    assert [x.data_ptr() for x in saved] == [angles.data_ptr()]
    theirs = _apply_rotary_pos_emb_bshd(heads, angles)
    grad = torch.randn(ours.shape, dtype=torch.float64)
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(
        torch.autograd.grad(ours, heads, grad), torch.autograd.grad(theirs, heads, grad), rtol=1e-14, atol=1e-14
    )


def test_the_weights_key_of_a_scaled_rope_has_all_of_its_numbers() -> None:
    marks = [
        rope_scaling_mark(ModelConfig(**model))
        for model in (
            {},
            {"use_rope_scaling": True},
            {"use_rope_scaling": True, "rope_scaling_factor": 4.0},
            {"use_rope_scaling": True, "rope_original_max_position_embeddings": 4096},
            {"position_embedding_type": "yarn"},
            {"position_embedding_type": "yarn", "yarn_beta_fast": 16.0},
            {"position_embedding_type": "yarn", "yarn_correction_range_round_to_int": False},
        )
    ]
    assert marks[0] == "" and len(set(marks)) == len(marks)
    assert [mark.split("-")[1] for mark in marks[1:]] == ["llama3"] * 3 + ["yarn"] * 3
