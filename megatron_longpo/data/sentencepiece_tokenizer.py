"""Bare SentencePiece models, with a chat template beside them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_longpo.data.chat_template import TEMPLATE_DATE, compile_template, template_errors
from megatron_longpo.data.chat_tokenizer import ChatMessage, Offsets, as_arrays, first_id, sha256
from megatron_longpo.data.document import Tokens


class SentencePieceChatTokenizer:
    """A SentencePiece model with a Jinja chat template.

    SentencePiece never produces control symbols (``<s>``, ``</s>``, …) from text, so the rendered text is split at
    them: the pieces between are encoded one by one, the symbols become their ids.
    """

    def __init__(self, path: Path, template: str | None) -> None:
        import sentencepiece

        if path.is_dir():
            raise ValueError(
                f"--tokenizer-model {path} is a folder: give the .model file, or --tokenizer-type HuggingFaceTokenizer"
            )
        self.path = str(path)
        try:
            self._model = sentencepiece.SentencePieceProcessor()
            self._model.LoadFromSerializedProto(path.read_bytes())  # given to the line above, an empty file is none
        except (RuntimeError, OSError) as error:
            raise ValueError(f"--tokenizer-model {path} is not a SentencePiece model ({error})") from error
        if template is None:
            raise ValueError(
                f"--tokenizer-model {path}: a SentencePiece model has no chat template: pass one with --chat-template "
                "FILE.jinja"
            )
        self.template = template
        self.template_hash = sha256(template)
        self.vocab_size = int(self._model.piece_size())
        self.eos_id = first_id(self._model.eos_id())
        self.pad_id = first_id(self._model.pad_id(), self.eos_id)
        self._symbols = {self._model.id_to_piece(i): i for i in range(self.vocab_size) if self._model.is_control(i)}
        self.symbol_ids = frozenset(self._symbols.values())
        model = self._model
        names = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "pad_token": model.pad_id()}
        self._variables = {name: self._model.id_to_piece(i) for name, i in names.items() if i >= 0}
        alternatives = sorted(self._symbols, key=len, reverse=True)
        self._splitter = re.compile("|".join(map(re.escape, alternatives))) if alternatives else None
        self._render = compile_template(template)

    @property
    def hash(self) -> str:
        """SHA-256 of the ``.model`` file's content."""
        return sha256(self._model.serialized_model_proto())

    def render(self, messages: Sequence[ChatMessage], add_generation_prompt: bool = False, **variables: object) -> str:
        """The text of a conversation by Jinja alone, on a fixed date."""
        with template_errors():
            return str(
                self._render(
                    messages=[dict(message) for message in messages],
                    add_generation_prompt=add_generation_prompt,
                    date_string=TEMPLATE_DATE,
                    tools=None,  # transformers gives them too, and templates ask whether they are none
                    documents=None,
                    **self._variables,
                    **variables,
                )
            )

    def encode(self, text: str) -> tuple[Tokens, Offsets, Offsets]:
        """As `ChatTokenizer.encode`; control symbols in the text become their ids."""
        parts = []
        at = 0
        for match in self._splitter.finditer(text) if self._splitter else ():
            parts.append(self._encode_piece(text[at : match.start()], at))
            parts.append(as_arrays([self._symbols[match.group()]], [match.span()]))
            at = match.end()
        parts.append(self._encode_piece(text[at:], at))
        ids, starts, ends = (np.concatenate(column) for column in zip(*parts, strict=True))
        return ids, starts, ends

    def decode(self, tokens: Sequence[int] | Tokens, special: bool = True) -> str:
        """As `ChatTokenizer.decode`; control symbols are spelled out."""
        # SentencePiece leaves control symbols out, and the blank before a text behind one: the mirror of `encode`.
        # A model's vocabulary may be padded; a padding id has no text, as in Hugging Face's tokenizers.
        ids = [int(token) for token in tokens if int(token) < self.vocab_size]
        symbols = [at for at, token in enumerate(ids) if self._model.is_control(token)]
        parts = []
        for start, end in itertools.pairwise([-1, *symbols, len(ids)]):
            parts.append(self._model.decode(ids[start + 1 : end]))
            parts.append(self._model.id_to_piece(ids[end]) if special and end < len(ids) else "")
        return "".join(parts)

    def _encode_piece(self, text: str, at: int) -> tuple[Tokens, Offsets, Offsets]:
        if not text:
            return as_arrays([], [])
        encoding = self._model.encode_as_offset_mapping(text)
        ids, starts, ends = as_arrays(encoding["ids"], encoding["offsets"])
        return ids, starts + at, ends + at
