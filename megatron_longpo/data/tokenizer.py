"""Loading a tokenizer with its chat template, by its path."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_longpo.data.chat_template import read_template
from megatron_longpo.data.chat_tokenizer import ChatTokenizer
from megatron_longpo.data.huggingface_tokenizer import HuggingFaceChatTokenizer
from megatron_longpo.data.sentencepiece_tokenizer import SentencePieceChatTokenizer

HUGGING_FACE = "HuggingFaceTokenizer"
SENTENCE_PIECE = "SentencePieceTokenizer"


@dataclass(frozen=True)
class TokenizerSpec:
    """What it takes to load a tokenizer, small enough to send to worker processes.

    Args:
        path: ``--tokenizer-model``: a Hugging Face tokenizer folder or a SentencePiece ``.model`` file.
        tokenizer_type: ``--tokenizer-type``; None decides by the path.
        chat_template: ``--chat-template``: a Jinja file, or the template itself; None uses the tokenizer's own.
        trust_remote_code: Run Python code that lies in the folder.
    """

    path: str
    tokenizer_type: str | None = None
    chat_template: str | None = None
    trust_remote_code: bool = False

    def load(self) -> ChatTokenizer:
        """The tokenizer; see `load_tokenizer`."""
        return load_tokenizer(self.path, self.tokenizer_type, self.chat_template, self.trust_remote_code)


def load_tokenizer(
    path: str | Path,
    tokenizer_type: str | None = None,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
) -> ChatTokenizer:
    """Load a tokenizer and its chat template from the local disk.

    Raises:
        ValueError: There is no tokenizer at the path, it gives no character offsets, or it has no chat template.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(
            f"--tokenizer-model {path}: there is no such folder or file; download the tokenizer first, names of a hub "
            f"are not looked up"
        )
    template = read_template(chat_template)
    kind = tokenizer_type or (HUGGING_FACE if path.is_dir() else SENTENCE_PIECE)
    if kind == HUGGING_FACE:
        return HuggingFaceChatTokenizer(path, template, trust_remote_code)
    if kind == SENTENCE_PIECE:
        return SentencePieceChatTokenizer(path, template)
    raise ValueError(f"--tokenizer-type {kind} is unknown: choose {HUGGING_FACE} or {SENTENCE_PIECE}")
