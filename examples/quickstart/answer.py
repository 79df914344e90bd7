"""The end of the way: the exported folder, opened with transformers as any other model, answers a held-out document."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_longpo.data.dataset import PreferenceDataset
from megatron_longpo.pairs import PreferenceDocument, read_pairs


@dataclass(frozen=True)
class AnswerSettings:
    """How the answer is made and how much of the document is shown."""

    max_new_tokens: int = 48
    shown_chars: int = 240


def answer_held_out(
    model_folder: Path, pairs: Path, prefix: Path, split: str, output: Path, settings: AnswerSettings
) -> None:
    """Let the model answer the first question about a document that training held out, and write it all down.

    Args:
        model_folder: What `tools/convert_checkpoint.py megatron-to-hf` wrote.
        pairs: The pairs file.
        prefix: Its tokens.
        split: The trainer's ``--split``, which decides what is held out.
        output: Text file to write.
        settings: Length of the answer and of what is shown.
    """
    document = _first_held_out(pairs, prefix, split)
    turn = document.turns[0]
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    message = {"role": "user", "content": f"{document.document}\n\n{turn.instruction}"}
    prompt = tokenizer.apply_chat_template(
        [message], add_generation_prompt=True, tokenize=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        row = model.generate(
            input_ids=prompt["input_ids"],
            attention_mask=prompt["attention_mask"],
            max_new_tokens=settings.max_new_tokens,
            do_sample=False,
        )[0]
    num_prompt_tokens = prompt["input_ids"].shape[1]
    answer = tokenizer.decode(row[num_prompt_tokens:], skip_special_tokens=True).strip()
    told = {
        f"{document.id}, held out of training, {num_prompt_tokens} tokens with the instruction": (
            document.document[: settings.shown_chars] + " …"
        ),
        "instruction": turn.instruction,
        "before training, from the chunk (chosen)": turn.chosen,
        "before training, from the document (rejected)": turn.rejected,
        "after training, from the document": answer,
    }
    output.write_text("".join(f"{name}\n{_indented(value)}\n" for name, value in told.items()), encoding="utf-8")


def _indented(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 100, initial_indent="    ", subsequent_indent="    ")


def _first_held_out(pairs: Path, prefix: Path, split: str) -> PreferenceDocument:
    dataset = PreferenceDataset(str(prefix))
    _, held_out = dataset.split(split)
    wanted = dataset[int(held_out[0])].id
    (found,) = (row for row in read_pairs(pairs) if row.id == wanted)
    assert isinstance(found, PreferenceDocument)
    return found
