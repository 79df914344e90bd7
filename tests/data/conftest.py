"""Real tokenizers for the data tests, trained once per session on text that every Python carries."""

from __future__ import annotations

import io
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_longpo.data.chat_tokenizer import ChatTokenizer
from megatron_longpo.data.tokenizer import load_tokenizer

INST_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% elif message.role == 'assistant' %} {{ message.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant roles') }}{% endif %}{% endfor %}"
)
"""Mistral's manner: no separate generation prompt, a blank before the answer, control symbols as markers."""

CHATML_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen's manner: a line break behind the end-of-turn marker belongs to the answer's rendering."""

FORGETFUL_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and loop.last %}<think>\n\n</think>\n{% endif %}"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen3's manner: an earlier answer is rendered without its thoughts once another turn follows."""

THINKING_TEMPLATE = FORGETFUL_TEMPLATE.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n{% endif %}"
    "{% endif %}",
)
"""With Qwen3's switch: without thinking, the prompt of an answer ends in an empty thought."""


@pytest.fixture(scope="session")
def text() -> str:
    """Some 500,000 characters of English, tables and code."""
    return "\n\n".join(topics[name] for name in sorted(topics))


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    """A BPE model with byte fallback and a leading blank, as Llama's and Mistral's are."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text[:200_000].splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        character_coverage=0.999,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def inst_template_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`INST_TEMPLATE` as a file."""
    path = tmp_path_factory.mktemp("template") / "inst.jinja"
    path.write_text(INST_TEMPLATE)
    return path


@pytest.fixture(scope="session")
def huggingface_folder(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    """A byte-level BPE tokenizer with ChatML, as Qwen's are."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text[:200_000].splitlines(), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHATML_TEMPLATE
    folder = tmp_path_factory.mktemp("huggingface")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sentencepiece_tokenizer(sentencepiece_file: Path) -> ChatTokenizer:
    return load_tokenizer(sentencepiece_file, chat_template=INST_TEMPLATE)


@pytest.fixture(scope="session")
def huggingface_tokenizer(huggingface_folder: Path) -> ChatTokenizer:
    return load_tokenizer(huggingface_folder)


@pytest.fixture(params=["sentencepiece", "huggingface"])
def tokenizer(request: pytest.FixtureRequest) -> ChatTokenizer:
    """Both tokenizers, one after the other."""
    return request.getfixturevalue(f"{request.param}_tokenizer")
