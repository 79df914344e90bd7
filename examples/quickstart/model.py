"""A small Mistral-shaped model, pre-trained on short rows of the corpus until its log-probs mean something.

Rows are `row_tokens` long while the documents of the preference pairs are two to three times that: the model is, like
the one of the paper, good at short inputs and worse at long ones.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from examples.quickstart.corpus import Document, read_corpus
from examples.quickstart.instructions import draw_exercises
from megatron_longpo.generation.draw import draw


@dataclass(frozen=True)
class ModelSettings:
    """Shape of the model and length of its pre-training."""

    # Two layers learn more in a minute on two cores than four: they see the text twice, four not even once.
    num_layers: int = 2
    hidden_size: int = 128
    ffn_hidden_size: int = 352
    num_heads: int = 4
    num_kv_heads: int = 2
    rope_base: float = 10_000.0
    max_positions: int = 4096
    row_tokens: int = 512
    rows_per_step: int = 2
    num_steps: int = 1000
    max_seconds: float = 120.0  # a slow machine makes fewer steps; the learning rate still ends at 0
    peak_lr: float = 3e-3
    chunks_per_document: int = 4  # two exercises each
    answer_weight: float = 10.0  # of an answer's token in the loss; answers are few beside the text
    seed: int = 0


def pretrain_model(corpus: Path, tokenizer_folder: Path, folder: Path, settings: ModelSettings) -> None:
    """Train the model and save it, with its tokenizer, as a Hugging Face folder."""
    torch.manual_seed(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokens, weights = token_stream([d for d in read_corpus(corpus) if not d.held], tokenizer, settings)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden_size,
            intermediate_size=settings.ffn_hidden_size,
            num_hidden_layers=settings.num_layers,
            num_attention_heads=settings.num_heads,
            num_key_value_heads=settings.num_kv_heads,
            head_dim=settings.hidden_size // settings.num_heads,
            max_position_embeddings=settings.max_positions,
            rope_theta=settings.rope_base,
            sliding_window=None,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    _train(model, tokens, weights, settings)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def token_stream(
    documents: list[Document], tokenizer: PreTrainedTokenizerFast, settings: ModelSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """One epoch of plain documents and of chats about their chunks, in an order drawn by the seed.

    Returns:
        Tokens, int64 `[T]`, and their weights in the loss, fp32 `[T]`.
    """
    pieces: list[tuple[int, str, str]] = []  # place in the order, text of weight 1, text of weight `answer_weight`
    for document in documents:
        plain = f"{tokenizer.bos_token}{document.text}{tokenizer.eos_token}"
        pieces.append((draw(settings.seed, document.id, "order"), plain, ""))
        for number, exercise in enumerate(draw_exercises(document, settings.seed, settings.chunks_per_document)):
            question = [{"role": "user", "content": exercise.message}]
            prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
            order = draw(settings.seed, document.id, number, "order")
            pieces.append((order, prompt, exercise.answer + tokenizer.eos_token))
    tokens: list[int] = []
    weights: list[float] = []
    for _, *texts in sorted(pieces):
        for text, weight in zip(texts, (1.0, settings.answer_weight), strict=True):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            tokens += ids
            weights += [weight] * len(ids)
    return torch.tensor(tokens), torch.tensor(weights)


def _train(model: MistralForCausalLM, tokens: torch.Tensor, weights: torch.Tensor, settings: ModelSettings) -> None:
    """AdamW with warm-up and cosine decay over `num_steps`, or over `max_seconds` where that ends first."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.peak_lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    started = time.monotonic()
    batches = _batches(len(tokens), settings)
    with tqdm(total=settings.num_steps, desc="      pre-training", unit="step") as bar:
        for step in range(settings.num_steps):
            progress = max(step / settings.num_steps, (time.monotonic() - started) / settings.max_seconds)
            if progress >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = (
                    settings.peak_lr * min(1.0, progress / 0.05 + 0.05) * 0.5 * (1 + math.cos(math.pi * progress))
                )
            rows = next(batches)
            logits = model(input_ids=tokens[rows[:, :-1]]).logits
            losses = cross_entropy(logits.flatten(0, 1), tokens[rows[:, 1:]].flatten(), reduction="none")
            weight = weights[rows[:, 1:]].flatten()
            loss = (losses * weight).sum() / weight.sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
            bar.update()


def _batches(num_tokens: int, settings: ModelSettings) -> Iterator[torch.Tensor]:
    """Endless batches of consecutive rows, as indices into the stream: int64 `[rows_per_step, row_tokens + 1]`."""
    row = torch.arange(settings.row_tokens + 1)
    for number in itertools.count():
        first = (number * settings.rows_per_step + torch.arange(settings.rows_per_step)) * settings.row_tokens
        yield (first[:, None] + row) % num_tokens
