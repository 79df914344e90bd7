"""Documents of real text for the benchmarks: windows of the Python language reference, which every Python carries."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

from transformers import PreTrainedTokenizerFast

_PRIME = 7919


def write_documents(path: Path, num_documents: int, num_chars: int) -> None:
    """Write a jsonl file of documents of equal length that begin at different places of the text."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    text *= 1 + num_chars // len(text)
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_documents):
            start = number * _PRIME % (len(text) - num_chars)
            row = {"id": f"document-{number}", "text": text[start : start + num_chars]}
            file.write(json.dumps(row) + "\n")


def train_tokenizer(folder: Path, vocab_size: int = 4096) -> None:
    """Save a byte-level BPE tokenizer with a chat template, trained on the same text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((topics[name] for name in sorted(topics)), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    fast.save_pretrained(folder)
