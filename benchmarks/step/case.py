"""What the step benchmark computes: one document of random tokens, random reference log-probs, random weights.

All variants of one case read the same files, so that their losses can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_longpo.data.document import CHOSEN, REJECTED, Branch, TokenizedDocument
from megatron_longpo.data.predictions import ReferenceTurns
from megatron_longpo.data.records import RecordWriter

END_TOKEN = 0
INSTRUCTION_TOKENS = 16
"""Length of the instructions between the answers of a conversation of several turns."""
WEIGHTS, DATASET = "weights", "data/pair"
"""Where `write_files` puts them in the folder of a case."""


@dataclass(frozen=True)
class StepCase:
    """One document and one model. The default model is the smallest whose step still resembles a large one's."""

    prefix_tokens: int = 8192
    response_tokens: int = 128
    turns: int = 1
    num_layers: int = 4
    hidden_size: int = 256
    ffn_hidden_size: int = 896  # 3.5 times the width, as in Mistral 7B and Llama 3
    num_attention_heads: int = 8
    num_query_groups: int = 2
    vocab_size: int = 8192
    device: str = "cpu"
    bf16: bool = False
    seed: int = 0

    @property
    def branch_tokens(self) -> int:
        """Tokens of one conversation behind the shared prefix."""
        return self.turns * (self.response_tokens + INSTRUCTION_TOKENS) - INSTRUCTION_TOKENS

    @property
    def pair_tokens(self) -> int:
        """Tokens of both conversations. Every variant trains on these, however often it computes the prefix."""
        return 2 * (self.prefix_tokens + self.branch_tokens)

    def check(self) -> None:
        """Raise a ValueError where the sizes make no model or no document."""
        positive = ("prefix_tokens", "response_tokens", "turns", "num_layers", "hidden_size", "ffn_hidden_size")
        for name in (*positive, "num_attention_heads", "num_query_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"--hidden-size {self.hidden_size} must be a multiple of 2 * --num-attention-heads = "
                f"{2 * self.num_attention_heads}: RoPE turns pairs of a head's dimensions"
            )
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"--num-attention-heads {self.num_attention_heads} must be a multiple of --num-query-groups "
                f"{self.num_query_groups}"
            )
        if self.vocab_size < 2:
            raise ValueError(f"--vocab-size {self.vocab_size} must be at least 2")
        if self.bf16 and self.device == "cpu":
            raise ValueError("--bf16 is for --device cuda: CPUs are measured in fp32")

    def document(self) -> TokenizedDocument:
        """The document with one conversation per role; every answer ends in `END_TOKEN`."""
        rng = np.random.default_rng(self.seed)

        def tokens(count: int) -> NDArray[np.int32]:
            return rng.integers(END_TOKEN + 1, self.vocab_size, count, dtype=np.int32)

        prefix = tokens(self.prefix_tokens)
        instructions = [tokens(INSTRUCTION_TOKENS if turn else 0) for turn in range(self.turns)]
        branches = []
        for _ in (CHOSEN, REJECTED):
            pieces: list[NDArray[np.int32]] = []
            spans = []
            for turn, instruction in enumerate(instructions):
                answer = tokens(self.response_tokens)
                answer[-1] = END_TOKEN
                start = sum(map(len, pieces)) + len(instruction)
                spans.append((turn, start, start + len(answer)))
                pieces += [instruction, answer]
            branches.append(Branch(np.concatenate(pieces), tuple(spans)))
        return TokenizedDocument(
            f"pair of {self.prefix_tokens}", prefix, joint=(branches[0], branches[1]), independent=(), short=()
        )


@dataclass(frozen=True)
class ReferenceNumbers:
    """Log-probs of a reference model that was never run; without a term of its own no loss could be told from 0.69."""

    case: StepCase

    def of(self, number: int) -> ReferenceTurns:
        """Near those of the policy, which guesses, and different for chosen and rejected."""
        rng = np.random.default_rng(self.case.seed + 1)
        guess = -np.log(self.case.vocab_size)

        def draw(shift: float) -> NDArray[np.float32]:
            noise = 0.1 * rng.standard_normal(self.case.response_tokens)
            return np.asarray(guess + noise + shift / self.case.response_tokens, dtype=np.float32)

        return [(draw(0.0), draw(4.0)) for _ in range(self.case.turns)]


def write_files(case: StepCase, folder: Path) -> None:
    """Write the dataset and the model (a Hugging Face folder) that all variants read."""
    write_document(case, folder)
    write_weights(case, folder)


def write_document(case: StepCase, folder: Path, *more: StepCase) -> None:
    """Write the dataset: the document of a case, and those of more."""
    with RecordWriter(folder / DATASET) as writer:
        for each in (case, *more):
            writer.add(each.document())
        writer.finish(tokenizer={"vocab_size": case.vocab_size, "hash": "random", "path": "none"})


def write_weights(case: StepCase, folder: Path) -> None:
    """Write the model, whose weights do not depend on the document; it takes any up to this case's length."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(case.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=case.vocab_size,
            hidden_size=case.hidden_size,
            intermediate_size=case.ffn_hidden_size,
            num_hidden_layers=case.num_layers,
            num_attention_heads=case.num_attention_heads,
            num_key_value_heads=case.num_query_groups,
            max_position_embeddings=case.prefix_tokens + case.branch_tokens,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=END_TOKEN,
            pad_token_id=END_TOKEN,
        )
    )
    model.save_pretrained(folder / WEIGHTS)
