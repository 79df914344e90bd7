"""Tokenizers: offsets are characters of the text, special tokens come from the text alone, errors name the fix."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from megatron_longpo.data.chat_tokenizer import ChatTokenizer
from megatron_longpo.data.tokenizer import TokenizerSpec, load_tokenizer
from tests.data.conftest import CHATML_TEMPLATE, INST_TEMPLATE

CHAT = [
    {"role": "user", "content": "Where is the wörld? ✓"},
    {"role": "assistant", "content": "Here."},
    {"role": "user", "content": "And now?"},
]

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(text=texts)
def test_offsets_cover_the_text_in_order(tokenizer: ChatTokenizer, text: str) -> None:
    rendered = tokenizer.render([{"role": "user", "content": text}])
    ids, starts, ends = tokenizer.encode(rendered)
    assert ids.dtype == np.int32 and len(ids) == len(starts) == len(ends)
    assert (np.diff(starts) >= 0).all() and (np.diff(ends) >= 0).all() and (starts <= ends).all()
    covered = np.zeros(len(rendered), dtype=bool)
    for start, end in zip(starts, ends, strict=True):
        covered[start:end] = True
    assert covered.all()
    assert ids.min() >= 0 and ids.max() < tokenizer.vocab_size


def test_nothing_is_added(tokenizer: ChatTokenizer) -> None:
    ids, starts, ends = tokenizer.encode("")
    assert len(ids) == len(starts) == len(ends) == 0
    rendered = tokenizer.render(CHAT)
    assert tokenizer.encode(rendered)[0].tolist().count(tokenizer.eos_id) == rendered.count("</s>") + rendered.count(
        "<|im_end|>"
    )


def test_huggingface_agrees_with_transformers(huggingface_tokenizer: ChatTokenizer, huggingface_folder: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(huggingface_folder)
    rendered = huggingface_tokenizer.render(CHAT, add_generation_prompt=True)
    assert rendered == theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    expected = theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert huggingface_tokenizer.encode(rendered)[0].tolist() == expected
    assert huggingface_tokenizer.decode(expected) == rendered
    assert huggingface_tokenizer.vocab_size == len(theirs)


def test_truncation_and_padding_of_the_file_are_switched_off(huggingface_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(huggingface_folder, folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    theirs.backend_tokenizer.enable_truncation(4)
    theirs.backend_tokenizer.enable_padding(length=4)
    theirs.backend_tokenizer.save(str(folder / "tokenizer.json"))
    assert len(load_tokenizer(folder).encode("a much longer text than four tokens")[0]) > 4
    assert len(load_tokenizer(folder).encode("a")[0]) == 1


def test_sentencepiece_control_symbols_become_their_ids(sentencepiece_tokenizer: ChatTokenizer) -> None:
    ids, starts, ends = sentencepiece_tokenizer.encode("<s>Hi✓</s>")
    assert ids[0] == 1 and ids[-1] == 2 == sentencepiece_tokenizer.eos_id
    assert (starts[0], ends[0], starts[-1], ends[-1]) == (0, 3, 6, 10)
    assert sentencepiece_tokenizer.decode(ids) == "<s>Hi✓</s>" and sentencepiece_tokenizer.decode(ids[1:-1]) == "Hi✓"
    inner = sentencepiece_tokenizer.encode("Hi✓")
    assert ids[1:-1].tolist() == inner[0].tolist()
    assert (starts[1:-1] - 3).tolist() == inner[1].tolist()


def test_sentencepiece_renders_its_template(sentencepiece_tokenizer: ChatTokenizer) -> None:
    assert (
        sentencepiece_tokenizer.render(CHAT)
        == "<s>[INST] Where is the wörld? ✓ [/INST] Here.</s>[INST] And now? [/INST]"
    )


def test_a_template_that_refuses_is_an_error(huggingface_folder: Path, sentencepiece_file: Path) -> None:
    system = [{"role": "system", "content": "Be brief."}]
    for path in (huggingface_folder, sentencepiece_file):
        tokenizer = load_tokenizer(path, chat_template=INST_TEMPLATE)
        with pytest.raises(ValueError, match="refuses the conversation: only user and assistant"):
            tokenizer.render(system)


@pytest.mark.parametrize(
    ("template", "rendered"),
    [
        (
            "{% if not date_string is defined %}{% set date_string = strftime_now('%d') %}{% endif %}{{ date_string }}",
            "26 Jul 2024",
        ),
        # Mistral Small's manner; the blanks and line breaks around the first block stay what they are to Jinja.
        ("\n\n  {% set today = strftime_now('%Y-%m-%d') %}\n\n{{ today }}", "\n\n\n2024-07-26"),
        ("{{ strftime_now('%A, %B %-d, %Y, %I:%M %p') }}", "Friday, July 26, 2024, 12:00 AM"),
    ],
)
def test_a_template_that_prints_the_date_renders_the_same_every_day(
    sentencepiece_file: Path, huggingface_folder: Path, template: str, rendered: str
) -> None:
    for path in (sentencepiece_file, huggingface_folder):
        tokenizer = load_tokenizer(path, chat_template=template)
        assert tokenizer.render(CHAT) == rendered
        assert tokenizer.template == template


def test_there_are_no_tools(sentencepiece_file: Path, huggingface_folder: Path) -> None:
    """Mistral's templates list the tools unless they are none, which transformers says of them and of documents."""
    template = "{% if tools is not none or documents is not none %}[TOOLS]{% endif %}{{ messages[0].content }}"
    for path in (sentencepiece_file, huggingface_folder):
        assert load_tokenizer(path, chat_template=template).render(CHAT) == CHAT[0]["content"]


def test_tokens_are_those_of_tokenizer_json_whatever_class_the_folder_names(tmp_path: Path, text: str) -> None:
    """Llama 2's: a normalizer puts a blank before every text, and "legacy": false makes transformers forget it."""
    stored = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    stored.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    stored.train_from_iterator(text[:50_000].splitlines(), trainer)
    stored.pre_tokenizer = None
    stored.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    stored.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "chat_template": INST_TEMPLATE}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))

    tokenizer = load_tokenizer(tmp_path)
    rendered = tokenizer.render(CHAT)
    assert rendered.startswith("<s>[INST] Where")
    ids, starts, ends = tokenizer.encode(rendered)
    assert ids.tolist() == stored.encode(rendered, add_special_tokens=False).ids
    assert [stored.id_to_token(int(token)) for token in ids[:3]] == ["<s>", "▁", "["]
    assert (starts[2], ends[2]) == (3, 4)
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (2, 300)


TEKKEN = r"[^\r\n\p{L}\p{N}]?\p{Lu}*\p{Ll}+|[^\r\n\p{L}\p{N}]?\p{Lu}+\p{Ll}*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s+"
LLAMA3 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"


def tekken_folder(folder: Path, pattern: str) -> Path:
    """A folder as Mistral publishes them since Nemo, with this pattern in its tokenizer.json."""
    folder.mkdir()
    stored = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(pattern), "isolated")
    stored.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    stored.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    symbols = ["<s>", "</s>", "[INST]", "[/INST]"]
    trainer = trainers.BpeTrainer(special_tokens=symbols, initial_alphabet=alphabet, show_progress=False)
    stored.train_from_iterator(["eBay eBay eBay"], trainer)
    stored.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": INST_TEMPLATE}
    settings |= {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tekken.json").write_text(json.dumps({"config": {"pattern": TEKKEN}}))
    return folder


def test_a_folder_with_tekken_json_is_loaded_from_tokenizer_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where mistral-common is installed, `AutoTokenizer` answers with an object that gives no offsets."""
    folder = tekken_folder(tmp_path / "nemo", TEKKEN)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: object())
    tokenizer = load_tokenizer(folder)
    assert tokenizer.render(CHAT).startswith("<s>[INST] Where")
    ids, starts, ends = tokenizer.encode("[INST]eBay")
    assert [(start, end) for start, end in zip(starts, ends, strict=True)] == [(0, 6), (6, 7), (7, 10)]
    assert tokenizer.decode(ids) == "[INST]eBay"
    (folder / "tokenizer.json").rename(folder / "away.json")
    with pytest.raises(ValueError, match=r"is a slow tokenizer, which gives no character offsets: save it with a"):
        load_tokenizer(folder)


def test_words_other_than_those_of_tekken_json_are_refused(tmp_path: Path) -> None:
    folder = tekken_folder(tmp_path / "wrong", LLAMA3)
    with pytest.raises(ValueError, match=r"other words than tekken.json, .* at 'eBay N': put \"fix_mistral"):
        load_tokenizer(folder)
    (folder / "tekken.json").write_text("{}")
    assert len(load_tokenizer(folder).encode("eBay")[0]) == 1


def test_hashes_tell_tokenizers_and_templates_apart(
    huggingface_folder: Path,
    huggingface_tokenizer: ChatTokenizer,
    sentencepiece_tokenizer: ChatTokenizer,
    tmp_path: Path,
) -> None:
    elsewhere = tmp_path / "copy"
    shutil.copytree(huggingface_folder, elsewhere)
    copy = load_tokenizer(elsewhere)
    assert (copy.hash, copy.template_hash) == (huggingface_tokenizer.hash, huggingface_tokenizer.template_hash)
    other = load_tokenizer(huggingface_folder, chat_template=INST_TEMPLATE)
    assert other.hash == copy.hash and other.template_hash != copy.template_hash
    assert sentencepiece_tokenizer.hash != copy.hash
    assert sentencepiece_tokenizer.template_hash == other.template_hash


def test_the_kind_is_told_by_the_path(sentencepiece_file: Path, huggingface_folder: Path) -> None:
    assert TokenizerSpec(str(huggingface_folder)).load().template == CHATML_TEMPLATE
    assert TokenizerSpec(str(sentencepiece_file), chat_template=INST_TEMPLATE).load().template == INST_TEMPLATE
    with pytest.raises(ValueError, match="is a folder"):
        load_tokenizer(huggingface_folder, "SentencePieceTokenizer", INST_TEMPLATE)
    with pytest.raises(ValueError, match="is a file"):
        load_tokenizer(sentencepiece_file, "HuggingFaceTokenizer")
    with pytest.raises(ValueError, match="--tokenizer-type GPT2BPETokenizer is unknown"):
        load_tokenizer(sentencepiece_file, "GPT2BPETokenizer", INST_TEMPLATE)


def test_unusable_tokenizers_are_named_with_the_fix(
    sentencepiece_file: Path, huggingface_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="--tokenizer-model nowhere: there is no such folder or file"):
        load_tokenizer("nowhere")
    with pytest.raises(ValueError, match="has no chat template: pass one with --chat-template"):
        load_tokenizer(sentencepiece_file)
    base = tmp_path / "base"
    shutil.copytree(huggingface_folder, base)
    (base / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="has no chat template: pass one with --chat-template"):
        load_tokenizer(base)
    (base / "chat_template.jinja").write_text(INST_TEMPLATE)
    assert load_tokenizer(base).template == INST_TEMPLATE, "as the message says"
    (base / "chat_template.jinja").unlink()
    assert load_tokenizer(base, chat_template=INST_TEMPLATE).template == INST_TEMPLATE
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"^[^\n]*cannot load a tokenizer[^\n]*tokenizer\.json[^\n]*$"):
        load_tokenizer(empty)
    broken = tmp_path / "broken.model"
    for content in (b"not a model", b""):
        broken.write_bytes(content)
        with pytest.raises(ValueError, match="is not a SentencePiece model"):
            load_tokenizer(broken, chat_template=INST_TEMPLATE)
