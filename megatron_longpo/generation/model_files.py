"""The files of ``--model`` and ``--tokenizer-model``, looked at before a run begins and opened by what uses them."""

from __future__ import annotations

from pathlib import Path

from megatron_longpo.data.chat_template import NO_TEMPLATE
from megatron_longpo.data.chat_tokenizer import ChatTokenizer
from megatron_longpo.data.tokenizer import load_tokenizer
from megatron_longpo.generation.settings import OPENAI, TRANSFORMERS, GenerationSettings


def require_model_files(settings: GenerationSettings) -> None:
    """Raise ValueError where the model's folder or the tokenizer cannot be what a run starts with."""
    model_folder(settings)
    run_tokenizer(settings)


def model_folder(settings: GenerationSettings) -> Path:
    """The folder of the embedded engine's model; of a served model, its name.

    Raises:
        ValueError: The folder holds no model.
    """
    folder = Path(settings.model)
    if settings.engine == TRANSFORMERS and not (folder / "config.json").is_file():
        raise ValueError(f"--model {folder} is no folder of a Hugging Face model: it has no config.json")
    return folder


def run_tokenizer(settings: GenerationSettings) -> ChatTokenizer:
    """The tokenizer that counts tokens; of the embedded engine, also the one that renders prompts.

    Raises:
        ValueError: There is none, or the embedded engine's has no chat template.
    """
    # A server renders the messages itself.
    template = NO_TEMPLATE if settings.engine == OPENAI else settings.chat_template
    return load_tokenizer(settings.tokenizer_model or settings.model, chat_template=template)
