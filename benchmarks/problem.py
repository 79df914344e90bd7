"""The problem that every variant of the step benchmark solves: one document with two answers, and a tiny model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_longpo.data.document import CHOSEN, REJECTED, Tokens
from megatron_longpo.data.rows import RowBranch, TrainingRow

END = 1  # ends every response
INSTRUCTION_TOKENS = 16  # of every turn but the first, whose instruction is in the prefix


@dataclass(frozen=True)
class Problem:
    """Sizes of the document and of the model; the defaults are the ones that the targets are stated for."""

    prefix_tokens: int = 8192
    response_tokens: int = 128
    turns: int = 1
    num_layers: int = 4
    hidden_size: int = 256
    ffn_hidden_size: int = 704
    num_heads: int = 8
    num_kv_heads: int = 2
    vocab_size: int = 8192

    @property
    def branch_tokens(self) -> int:
        """Tokens behind the prefix in one conversation."""
        return self.turns * self.response_tokens + (self.turns - 1) * INSTRUCTION_TOKENS

    @property
    def conversation_tokens(self) -> int:
        """Tokens of the chosen and the rejected conversation together: the work asked for, however it is done."""
        return 2 * (self.prefix_tokens + self.branch_tokens)

    def row(self) -> TrainingRow:
        """The document as a shared-prefix row, random and the same in every process."""
        random = np.random.default_rng(0)

        def tokens(count: int) -> Tokens:
            return random.integers(2, self.vocab_size, count, dtype=np.int32)

        prefix = tokens(self.prefix_tokens)
        branches = tuple(RowBranch(role, *self._conversation(tokens)) for role in (CHOSEN, REJECTED))
        return TrainingRow("benchmark", 0, prefix, branches, self.turns)

    def _conversation(self, tokens) -> tuple[Tokens, tuple[tuple[int, int, int], ...]]:  # type: ignore[no-untyped-def]
        """The tokens behind the prefix and the span of every response in them."""
        conversation = tokens(self.branch_tokens)
        step = self.response_tokens + INSTRUCTION_TOKENS
        spans = tuple((turn, turn * step, turn * step + self.response_tokens) for turn in range(self.turns))
        for _, _, stop in spans:
            conversation[stop - 1] = END
        return conversation, spans


def write_model(problem: Problem, folder: Path) -> None:
    """Write a Mistral-shaped Hugging Face model with random weights, the one that all variants start from."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=problem.vocab_size,
        hidden_size=problem.hidden_size,
        intermediate_size=problem.ffn_hidden_size,
        num_hidden_layers=problem.num_layers,
        num_attention_heads=problem.num_heads,
        num_key_value_heads=problem.num_kv_heads,
        head_dim=problem.hidden_size // problem.num_heads,
        max_position_embeddings=problem.prefix_tokens + problem.branch_tokens,
        sliding_window=None,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=END,
    )
    MistralForCausalLM(config).save_pretrained(folder)
