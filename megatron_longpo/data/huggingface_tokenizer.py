"""Tokenizers in the folders of Hugging Face models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_longpo.data.chat_template import TEMPLATE_DATE, template_errors, with_fixed_date
from megatron_longpo.data.chat_tokenizer import ChatMessage, Offsets, as_arrays, first_id, sha256
from megatron_longpo.data.document import Tokens
from megatron_longpo.data.stored_tokenizer import require_tekken_s_words, stored_backend


class HuggingFaceChatTokenizer:
    """A fast tokenizer of a folder, with the folder's chat template or another one."""

    def __init__(self, path: Path, template: str | None, trust_remote_code: bool = False) -> None:
        if not path.is_dir():
            raise ValueError(
                f"--tokenizer-model {path} is a file: give the folder, or --tokenizer-type SentencePieceTokenizer"
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
        self.template_hash = sha256(self.template)
        self._dated_template = with_fixed_date(self.template)
        self._backend = stored_backend(self._tokenizer, path)
        require_tekken_s_words(self._backend, path)
        # tokenizer.json may carry both; a cut document or a padded one would be silently wrong here.
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocab_size = int(self._backend.get_vocab_size())
        eos, pad = self._tokenizer.eos_token, self._tokenizer.pad_token
        self.eos_id = first_id(self._backend.token_to_id(eos) if eos else None)
        self.pad_id = first_id(self._backend.token_to_id(pad) if pad else None, self.eos_id)
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
        return sha256(self._backend.to_str())

    def render(self, messages: Sequence[ChatMessage], add_generation_prompt: bool = False, **variables: object) -> str:
        """The text of a conversation by transformers' template engine, on a fixed date."""
        with template_errors():
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages),
                    chat_template=self._dated_template,
                    add_generation_prompt=add_generation_prompt,
                    tokenize=False,
                    date_string=TEMPLATE_DATE,
                    **variables,
                )
            )

    def encode(self, text: str) -> tuple[Tokens, Offsets, Offsets]:
        """As `ChatTokenizer.encode`, by the fast tokenizer, which knows special tokens in the text."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        return as_arrays(encoding.ids, encoding.offsets)

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
