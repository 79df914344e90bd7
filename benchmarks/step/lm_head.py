"""The LM head alone on a long row: its peak memory must not grow with vocabulary times length."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.step.case import StepCase
from benchmarks.step.clock import StepClock
from megatron_longpo import platform
from megatron_longpo.config import TrainingConfig
from megatron_longpo.objective.logprobs import linear_logprobs

NUM_TOKENS, VOCAB_SIZE = 16384, 32768


def weights_gib(case: StepCase) -> float:
    """Size of the weights."""
    return VOCAB_SIZE * case.hidden_size * (2 if case.bf16 else 4) / 2**30


def run_lm_head(case: StepCase, folder: Path, num_steps: int, clock: StepClock) -> list[float]:
    """Log-probs of every token of a row and all gradients; returns the mean negative log-prob of every step."""
    platform.prepare(use_cpu=case.device == "cpu")
    torch.manual_seed(case.seed)
    dtype, device = torch.bfloat16 if case.bf16 else torch.float32, platform.device()
    weight = torch.empty(VOCAB_SIZE, case.hidden_size, dtype=dtype, device=device).normal_(std=0.02).requires_grad_()
    hidden = torch.randn(NUM_TOKENS, case.hidden_size, dtype=dtype, device=device).requires_grad_()
    targets = torch.randint(VOCAB_SIZE, (NUM_TOKENS,), device=device)
    losses = []
    for _ in range(num_steps):
        weight.grad = hidden.grad = None
        with clock.step():
            loss = -linear_logprobs(
                hidden,
                weight,
                torch.arange(NUM_TOKENS, device=device),
                targets,
                vocab_size=VOCAB_SIZE,
                chunk_tokens=TrainingConfig().logits_chunk_tokens,
            ).mean()
            loss.backward()
        losses.append(loss.item())
    return losses
