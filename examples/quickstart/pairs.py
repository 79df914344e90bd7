"""Preference pairs from the model's own greedy answers: short prompt → chosen, long prompt → rejected.

Each held-back document gets one or two turns. A turn is a chunk of the document and an instruction about it, both
drawn by (seed, document id). The model answers once with only the chunk before it and once with the whole document.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from examples.quickstart.corpus import Document, draw, read_corpus
from examples.quickstart.instructions import MAX_CHUNK_CHARS, Exercise, draw_exercise
from megatron_longpo.pairs import PreferenceDocument, Turn, write_pairs


@dataclass(frozen=True)
class PairsSettings:
    """How pairs are drawn and answered."""

    max_turns: int = 2
    max_new_tokens: int = 48
    max_document_tokens: int = 1500
    batch_size: int = 16
    seed: int = 0


@dataclass(frozen=True)
class Prompt:
    """One turn of one document, to be answered from its chunk and from the whole document."""

    document: Document
    exercise: Exercise

    def text(self, *, long: bool) -> str:
        """The user message; the document or the chunk first, as `tools/preprocess_pairs.py` writes it by default."""
        context = self.document.text if long else self.document.text[slice(*self.exercise.chunk_span)]
        return f"{context}\n\n{self.exercise.instruction}"


def make_pairs(corpus: Path, model_folder: Path, output: Path, settings: PairsSettings) -> None:
    """Answer every prompt twice and write the pairs file."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    held = [d for d in read_corpus(corpus) if d.held]
    held = [d for d in held if len(tokenizer(d.text)["input_ids"]) <= settings.max_document_tokens]
    prompts = [prompt for document in held for prompt in _prompts(document, settings)]
    requests = [(number, long) for number in range(len(prompts)) for long in (False, True)]
    answers = _answer(
        {request: prompts[request[0]].text(long=request[1]) for request in requests}, model, tokenizer, settings
    )
    dropped: Counter[str] = Counter()
    turns: dict[str, list[Turn]] = {}
    for number, prompt in enumerate(prompts):
        chosen, rejected = answers[number, False], answers[number, True]
        if not chosen or not rejected:
            dropped["an empty answer"] += 1
        elif chosen == rejected:
            dropped["equal answers"] += 1
        else:
            span = prompt.exercise.chunk_span
            chunk = prompt.document.text[slice(*span)]
            turn = Turn(prompt.exercise.instruction, chosen, rejected, chunk, span)
            turns.setdefault(prompt.document.id, []).append(turn)
    provenance = {
        "model": "quickstart",
        "sampling": {"method": "greedy", "max_new_tokens": settings.max_new_tokens},
        "seed": settings.seed,
    }
    documents = [
        PreferenceDocument(id=d.id, document=d.text, turns=tuple(turns[d.id]), provenance=provenance)
        for d in held
        if d.id in turns
    ]
    if not documents:
        raise RuntimeError("every answer was empty or equal to its twin; train the model for longer (ModelSettings)")
    write_pairs(output, documents)
    reasons = ", ".join(f"{count} with {reason}" for reason, count in dropped.items()) or "none"
    print(f"      {sum(map(len, turns.values()))} turns of {len(documents)} documents; dropped: {reasons}")


def _prompts(document: Document, settings: PairsSettings) -> Iterator[Prompt]:
    """One prompt for each part of the document, so that chunks do not overlap; none where no instruction fits."""
    num_turns = 1 + draw(settings.seed, document.id, "turns") % settings.max_turns
    num_turns = min(num_turns, max(1, len(document.text) // (2 * MAX_CHUNK_CHARS)))
    part = len(document.text) // num_turns
    for number in range(num_turns):
        exercise = draw_exercise(document, settings.seed, number, (number * part, (number + 1) * part))
        if exercise is not None:
            yield Prompt(document, exercise)


@torch.inference_mode()
def _answer(
    texts: dict[tuple[int, bool], str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    settings: PairsSettings,
) -> dict[tuple[int, bool], str]:
    """Greedy answers by request, in batches of prompts of like length."""
    rendered = {
        request: tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
        for request, text in texts.items()
    }
    by_length = sorted(rendered, key=lambda request: len(rendered[request]))
    answers: dict[tuple[int, bool], str] = {}
    with tqdm(total=len(by_length), desc="      answers", unit="answer") as bar:
        for first in range(0, len(by_length), settings.batch_size):
            requests = by_length[first : first + settings.batch_size]
            batch = tokenizer(
                [rendered[r] for r in requests], padding=True, add_special_tokens=False, return_tensors="pt"
            )
            generated = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=settings.max_new_tokens,
                do_sample=False,
            )
            for request, row in zip(requests, generated[:, batch["input_ids"].shape[1] :], strict=True):
                answers[request] = tokenizer.decode(row, skip_special_tokens=True).strip()
            bar.update(len(requests))
    return answers
