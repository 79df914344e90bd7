"""The fast tokenizer that a folder's tokenizer.json describes, which is the one that its model was trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any


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
