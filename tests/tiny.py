"""A tiny dataset and a tiny model that tests share: odd lengths, several turns, real files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_longpo.data.document import Branch, ShortPrompt, TokenizedDocument
from megatron_longpo.data.records import RecordWriter

VOCAB = 203  # odd, so that tensor parallel pads it

MODEL_FLAGS = [
    "--num-layers=4",
    "--hidden-size=32",
    "--ffn-hidden-size=48",
    "--num-attention-heads=4",
    "--group-query-attention",
    "--num-query-groups=2",
    "--kv-channels=16",
    "--swiglu",
    "--disable-bias-linear",
    "--untie-embeddings-and-output-weights",
    f"--vocab-size={VOCAB}",
    "--make-vocab-size-divisible-by=8",
    "--init-method-std=0.2",
]


def tiny_document(number: int, num_turns: int, rng: np.random.Generator) -> TokenizedDocument:
    """A document of random tokens with every kind of conversation."""

    def tokens(low: int, high: int) -> np.ndarray:
        return rng.integers(0, VOCAB, rng.integers(low, high), dtype=np.int32)

    answers = [(tokens(2, 9), tokens(2, 9)) for _ in range(num_turns)]
    instructions = [tokens(2, 5) for _ in range(num_turns)]

    def joint(role: int) -> Branch:
        parts, spans, length = [], [], 0
        for turn in range(num_turns):
            parts += [instructions[turn], answers[turn][role]]
            start = length + len(instructions[turn])
            length = start + len(answers[turn][role])
            spans.append((turn, start, length))
        return Branch(np.concatenate(parts), tuple(spans))

    def alone(turn: int, role: int) -> Branch:
        start = len(instructions[turn])
        both = np.concatenate([instructions[turn], answers[turn][role]])
        return Branch(both, ((turn, start, len(both)),))

    def short(turn: int) -> ShortPrompt:
        responses = [Branch(a, ((turn, 0, len(a)),)) for a in answers[turn]]
        return ShortPrompt(np.concatenate([tokens(5, 12), instructions[turn]]), *responses)

    return TokenizedDocument(
        id=f"tiny-{number}",
        document_tokens=tokens(11, 40),
        joint=(joint(0), joint(1)),
        independent=tuple((alone(turn, 0), alone(turn, 1)) for turn in range(num_turns)),
        short=tuple(short(turn) for turn in range(num_turns)),
    )


def write_tiny_dataset(prefix: Path, num_documents: int = 12, seed: int = 0) -> Path:
    """Write a dataset of `tiny_document`s with one to four turns; returns its prefix."""
    rng = np.random.default_rng(seed)
    with RecordWriter(prefix) as writer:
        for number in range(num_documents):
            writer.add(tiny_document(number, 1 + number % 4, rng))
        writer.finish(tokenizer={"vocab_size": VOCAB, "hash": "tiny", "path": "none"})
    return prefix
