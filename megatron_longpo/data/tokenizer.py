"""Tokenizers with a chat template: Hugging Face folders, and bare SentencePiece models with a template beside them."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_longpo.data.chat_template import (
    TEMPLATE_DATE,
    compile_template,
    read_template,
    template_errors,
    with_fixed_date,
)
from megatron_longpo.data.document import Tokens
from megatron_longpo.data.stored_tokenizer import require_tekken_s_words, stored_backend

HUGGING_FACE = "HuggingFaceTokenizer"
SENTENCE_PIECE = "SentencePieceTokenizer"

ChatMessage = Mapping[str, str]
"""``{"role": …, "content": …}``."""

Offsets = NDArray[np.int64]


class ChatTokenizer(Protocol):
    """What the rest of the project needs from a tokenizer."""

    path: str
    template: str
    vocab_size: int
    eos_id: int
    pad_id: int
    symbol_ids: frozenset[int]
    """Tokens that are one symbol of the template each, ``<s>`` say; the text between two of them is encoded alone."""

    @property
    def hash(self) -> str:
        """SHA-256 of everything that decides the tokens of a text."""

    @property
    def template_hash(self) -> str:
        """SHA-256 of the chat template."""

    def render(self, messages: Sequence[ChatMessage], add_generation_prompt: bool = False) -> str:
        """The text of a conversation, special tokens spelled out."""

    def encode(self, text: str) -> tuple[Tokens, Offsets, Offsets]:
        """Token ids int32 ``[T]`` of a rendered text, and the characters ``[start, end)`` of each, int64 ``[T]``.

        Nothing is added: special tokens come from the text alone.
        """

    def decode(self, tokens: Sequence[int] | Tokens, special: bool = True) -> str:
        """The text of tokens, special ones included where the tokenizer can show them and ``special`` asks for it."""


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


class HuggingFaceChatTokenizer:
    """A fast tokenizer of a folder, with the folder's chat template or another one."""

    def __init__(self, path: Path, template: str | None, trust_remote_code: bool = False) -> None:
        if not path.is_dir():
            raise ValueError(
                f"--tokenizer-model {path} is a file: give the folder, or --tokenizer-type {SENTENCE_PIECE}"
            )
        try:
            self._tokenizer = _loader(path, trust_remote_code).from_pretrained(
                str(path), trust_remote_code=trust_remote_code, local_files_only=True
            )
        except Exception as error:  # transformers raises nearly every type, down to bare Exception
            reason = " ".join(str(error).split())
            raise ValueError(
                f"--tokenizer-model {path}: transformers cannot load a tokenizer from this folder "
                f"({type(error).__name__}: {reason}); it needs tokenizer.json and tokenizer_config.json. For a bare "
                f"SentencePiece model give the .model file itself"
            ) from error
        if not getattr(self._tokenizer, "is_fast", False):  # mistral-common's has no such property
            raise ValueError(
                f"--tokenizer-model {path} is a slow tokenizer, which gives no character offsets: save it with a "
                f"tokenizer.json (AutoTokenizer.from_pretrained(…).save_pretrained(…))"
            )
        self.path = str(path)
        self.template = template or self._own_template()
        self.template_hash = _sha256(self.template)
        self._dated_template = with_fixed_date(self.template)
        self._backend = stored_backend(self._tokenizer, path)
        require_tekken_s_words(self._backend, path)
        # tokenizer.json may carry both; a cut document or a padded one would be silently wrong here.
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocab_size = int(self._backend.get_vocab_size())
        eos, pad = self._tokenizer.eos_token, self._tokenizer.pad_token
        self.eos_id = _first_id(self._backend.token_to_id(eos) if eos else None)
        self.pad_id = _first_id(self._backend.token_to_id(pad) if pad else None, self.eos_id)
        self.symbol_ids = frozenset(self._backend.get_added_tokens_decoder())

    def _own_template(self) -> str:
        template = getattr(self._tokenizer, "chat_template", None)
        if isinstance(template, Mapping):
            template = template.get("default")
        if not template:
            raise ValueError(
                f"--tokenizer-model {self.path} has no chat template: pass one with --chat-template FILE.jinja, or put "
                "it there as chat_template.jinja (a base model's tokenizer takes that of the instruct model)"
            )
        return str(template)

    @property
    def hash(self) -> str:
        """SHA-256 of tokenizer.json as the tokenizers library writes it."""
        return _sha256(self._backend.to_str())

    def render(self, messages: Sequence[ChatMessage], add_generation_prompt: bool = False) -> str:
        """The text of a conversation by transformers' template engine, on a fixed date."""
        with template_errors():
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages),
                    chat_template=self._dated_template,
                    add_generation_prompt=add_generation_prompt,
                    tokenize=False,
                    date_string=TEMPLATE_DATE,
                )
            )

    def encode(self, text: str) -> tuple[Tokens, Offsets, Offsets]:
        """As `ChatTokenizer.encode`, by the fast tokenizer, which knows special tokens in the text."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        return _as_arrays(encoding.ids, encoding.offsets)

    def decode(self, tokens: Sequence[int] | Tokens, special: bool = True) -> str:
        """As `ChatTokenizer.decode`, by the fast tokenizer."""
        return str(self._backend.decode([int(token) for token in tokens], skip_special_tokens=not special))


def _loader(path: Path, trust_remote_code: bool) -> Any:
    """The class that loads a folder.

    Where mistral-common is installed, ``AutoTokenizer`` makes a tokenizer of tekken.json, whatever else is in the
    folder: it gives no character offsets, and does not know special tokens in a text.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    both = all((path / name).is_file() for name in ("tekken.json", "tokenizer.json"))
    return PreTrainedTokenizerFast if both and not trust_remote_code else AutoTokenizer


class SentencePieceChatTokenizer:
    """A SentencePiece model with a Jinja chat template.

    SentencePiece never produces control symbols (``<s>``, ``</s>``, …) from text, so the rendered text is split at
    them: the pieces between are encoded one by one, the symbols become their ids.
    """

    def __init__(self, path: Path, template: str | None) -> None:
        import sentencepiece

        if path.is_dir():
            raise ValueError(
                f"--tokenizer-model {path} is a folder: give the .model file, or --tokenizer-type {HUGGING_FACE}"
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
        self.template_hash = _sha256(template)
        self.vocab_size = int(self._model.piece_size())
        self.eos_id = _first_id(self._model.eos_id())
        self.pad_id = _first_id(self._model.pad_id(), self.eos_id)
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
        return _sha256(self._model.serialized_model_proto())

    def render(self, messages: Sequence[ChatMessage], add_generation_prompt: bool = False) -> str:
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
                )
            )

    def encode(self, text: str) -> tuple[Tokens, Offsets, Offsets]:
        """As `ChatTokenizer.encode`; control symbols in the text become their ids."""
        parts = []
        at = 0
        for match in self._splitter.finditer(text) if self._splitter else ():
            parts.append(self._encode_piece(text[at : match.start()], at))
            parts.append(_as_arrays([self._symbols[match.group()]], [match.span()]))
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
            return _as_arrays([], [])
        encoding = self._model.encode_as_offset_mapping(text)
        ids, starts, ends = _as_arrays(encoding["ids"], encoding["offsets"])
        return ids, starts + at, ends + at


def _as_arrays(ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> tuple[Tokens, Offsets, Offsets]:
    places = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    return np.array(ids, dtype=np.int32), places[:, 0], places[:, 1]


def _first_id(*ids: int | None) -> int:
    """The first id that a tokenizer defines, or 0."""
    return next((token for token in ids if token is not None and token >= 0), 0)


def _sha256(content: str | bytes) -> str:
    return hashlib.sha256(content.encode("utf-8") if isinstance(content, str) else content).hexdigest()
