"""The fast tokenizer that a folder's tokenizer.json describes, which is the one that its model was trained with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PROBE = "eBay NaOH iPhone HELLO World don't 1234567 3.14 a/b\n\n  x = y\t日本語 Straße ÄÖ"
"""Words that the patterns of different tokenizers cut in different places."""


def stored_backend(tokenizer: Any, folder: str | Path) -> Any:
    """The ``tokenizers.Tokenizer`` of a folder whose tokenizer transformers has loaded.

    transformers 5 takes no more than the vocabulary from tokenizer.json for some classes (LlamaTokenizer,
    Qwen2Tokenizer) and makes normalizer and pre-tokenizer anew: Llama 2 then has no blank behind ``<s>``.

    Args:
        tokenizer: What ``AutoTokenizer`` made of the folder.
        folder: Where it lies. Without a tokenizer.json, or with Python code of its own, transformers' stays.
    """
    from transformers import PreTrainedTokenizerFast

    own = type(tokenizer)
    # The classes of transformers 4 are called …Fast and take the file as it is.
    whole = own is PreTrainedTokenizerFast or own.__name__.endswith("Fast")
    if not whole and own.__module__.startswith("transformers.") and Path(folder, "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True).backend_tokenizer
    return tokenizer.backend_tokenizer


def require_tekken_s_words(backend: Any, folder: str | Path) -> None:
    """Raise a ValueError if tokenizer.json cuts a text into other words than tekken.json, with which Mistral trains.

    Some conversions have another model's pattern, and a text then becomes tokens that the model rarely saw
    (huggingface/transformers#42299). Without a tekken.json there is nothing to compare with.
    """
    from tokenizers import Regex, pre_tokenizers

    path = Path(folder, "tekken.json")
    try:
        pattern = json.loads(path.read_text(encoding="utf-8"))["config"]["pattern"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if backend.pre_tokenizer is None:
        return
    trained = pre_tokenizers.Split(Regex(pattern), "isolated")
    ours, theirs = ([span for _, span in words.pre_tokenize_str(PROBE)] for words in (backend.pre_tokenizer, trained))
    if ours != theirs:
        start, _ = min(set(ours) ^ set(theirs))
        raise ValueError(
            f"--tokenizer-model {folder}: tokenizer.json cuts texts into other words than tekken.json, which Mistral "
            f'trains with, for example at {PROBE[start : start + 6]!r}: put "fix_mistral_regex": true into '
            "tokenizer_config.json, or replace the first pattern in tokenizer.json by config.pattern of tekken.json"
        )
