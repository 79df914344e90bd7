"""A SentencePiece unigram tokenizer with a chat template, trained on the corpus and saved as a Hugging Face folder.

The folder holds `tokenizer.model` (SentencePiece's own file) and the same vocabulary as a fast tokenizer, which gives
character offsets. The two agree id by id, except that equally probable cuts of a run of one character may differ.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from examples.quickstart.corpus import read_corpus

UNKNOWN, BEGIN, PAD, USER, ASSISTANT, END = "<unk>", "<s>", "<pad>", "<|user|>", "<|assistant|>", "<|end|>"

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class TokenizerSettings:
    """What the tokenizer depends on, apart from the corpus."""

    vocab_size: int = 2048


def train_tokenizer(corpus: Path, folder: Path, settings: TokenizerSettings) -> None:
    """Train SentencePiece on every document and save the tokenizer folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    documents = read_corpus(corpus)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(
            line for d in tqdm(documents, desc="      texts", unit="text") for line in d.text.splitlines()
        ),
        model_writer=model,
        model_type="unigram",
        vocab_size=settings.vocab_size,
        byte_fallback=True,
        character_coverage=0.9995,
        # Program text: every space counts, and a run of them is one piece.
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        unk_piece=UNKNOWN,
        bos_piece=BEGIN,
        eos_piece=END,
        pad_piece=PAD,
        control_symbols=[USER, ASSISTANT],
        user_defined_symbols=["\n"],
        num_threads=2,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    as_fast_tokenizer(folder / "tokenizer.model").save_pretrained(folder)


def as_fast_tokenizer(model: Path) -> PreTrainedTokenizerFast:
    """The same unigram model as a fast tokenizer, with the chat template.

    Args:
        model: A SentencePiece unigram model with byte fallback, no dummy prefix and no normalisation.
    """
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    ids = range(pieces.get_piece_size())
    tokenizer = Tokenizer(
        models.Unigram(
            [(pieces.id_to_piece(i), pieces.get_score(i)) for i in ids], unk_id=pieces.unk_id(), byte_fallback=True
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()],
    )
    special = [pieces.id_to_piece(i) for i in ids if pieces.is_control(i) or pieces.is_unknown(i)]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False) for piece in special])
    tokenizer.add_tokens([AddedToken("\n", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
