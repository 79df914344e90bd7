"""The quickstart's parts, each on real text but small: stages, corpus, tokenizer, exercises, pairs."""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

from examples.quickstart import run
from examples.quickstart.answer import AnswerSettings, answer_held_out
from examples.quickstart.commands import PairsSettings, generate_pairs
from examples.quickstart.corpus import CorpusSettings, Document, read_corpus, write_corpus
from examples.quickstart.instructions import NUM_INSTRUCTIONS, draw_exercises
from examples.quickstart.model import ModelSettings, pretrain_model, token_stream
from examples.quickstart.stages import Stage, run_stages
from examples.quickstart.tokenizer import TokenizerSettings, train_tokenizer
from megatron_longpo.data.dataset import PreferenceDataset
from megatron_longpo.data.outcome import PreprocessOptions
from megatron_longpo.data.preprocess import preprocess
from megatron_longpo.data.tokenizer import TokenizerSpec
from megatron_longpo.generation.instructions import parse_pool
from megatron_longpo.generation.prompts import PHRASES
from megatron_longpo.pairs import PreferenceDocument, Turn, write_pairs

SMALL = CorpusSettings(num_held_documents=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, and a tokenizer trained on a part of it."""
    folder = tmp_path_factory.mktemp("quickstart")
    write_corpus(folder / "documents.jsonl", folder / "held.jsonl", SMALL)
    lines = (folder / "documents.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "part.jsonl").write_text("".join(lines[::8]), encoding="utf-8")
    train_tokenizer(folder / "part.jsonl", folder / "tokenizer", TokenizerSettings(vocab_size=1024))
    return folder


def documents(folder: Path) -> list[Document]:
    return read_corpus(folder / "documents.jsonl")


def copy_stage(source: Path, target: Path, runs: list[str], **settings: int) -> Stage:
    def copy() -> None:
        runs.append(target.name)
        target.write_bytes(source.read_bytes())

    return Stage(target.name, "a copy", copy, inputs=(source,), outputs=(target,), settings=settings)


def test_a_stage_runs_again_only_when_its_inputs_settings_or_outputs_changed(tmp_path: Path) -> None:
    source, middle, last = (tmp_path / name for name in ("source", "middle", "last"))
    source.write_text("1")
    runs: list[str] = []

    def run(**settings: int) -> list[str]:
        runs.clear()
        stages = [copy_stage(source, middle, runs), copy_stage(middle, last, runs, **settings)]
        run_stages(stages, tmp_path / "stamps")
        return list(runs)

    assert run() == ["middle", "last"]
    assert run() == []
    assert run(setting=1) == ["last"]
    source.write_text("2")
    assert run(setting=1) == ["middle", "last"]
    last.unlink()
    assert run(setting=1) == ["last"]


def test_a_stage_that_fails_is_not_taken_for_done(tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "output"
    source.write_text("1")
    run_stages([copy_stage(source, output, [])], tmp_path / "stamps")

    def fail() -> None:
        raise KeyboardInterrupt

    source.write_text("2")
    with pytest.raises(KeyboardInterrupt):
        run_stages([Stage("output", "", fail, inputs=(source,), outputs=(output,))], tmp_path / "stamps")
    source.write_text("1")  # back to what the last finished run was made from
    runs: list[str] = []
    run_stages([copy_stage(source, output, runs)], tmp_path / "stamps")
    assert runs == ["output"]


def test_ctrl_c_ends_the_quickstart_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.chdir(Path(__file__).parents[1])
    monkeypatch.setattr(sys, "argv", ["run.py"])
    monkeypatch.setattr("examples.quickstart.stages.run_stages", interrupted)
    with pytest.raises(SystemExit) as ended:
        run.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == (
        "\nquickstart: stopped; finished stages are kept, the same command goes on behind them\n"
    )


def test_a_stage_that_leaves_an_output_out_is_an_error(tmp_path: Path) -> None:
    stage = Stage("idle", "", lambda: None, inputs=(), outputs=(tmp_path / "never",))
    with pytest.raises(RuntimeError, match=r"stage idle .*never"):
        run_stages([stage], tmp_path / "stamps")


def test_the_corpus_is_real_bounded_and_the_same_every_time(folder: Path, tmp_path: Path) -> None:
    texts = documents(folder)
    assert len(texts) > 200
    assert len({d.id for d in texts}) == len(texts)
    assert max(len(d.text) for d in texts) <= SMALL.max_document_chars
    held = [d for d in texts if d.held]
    assert sorted(d.kind for d in held) == ["reference"] * 3 + ["source"] * 3
    assert all(len(d.text) >= SMALL.min_document_chars for d in held)
    assert read_corpus(folder / "held.jsonl") == held
    write_corpus(tmp_path / "again.jsonl", tmp_path / "held.jsonl", SMALL)
    assert (tmp_path / "again.jsonl").read_bytes() == (folder / "documents.jsonl").read_bytes()


def test_the_fast_tokenizer_is_the_sentencepiece_model(folder: Path) -> None:
    fast = AutoTokenizer.from_pretrained(folder / "tokenizer")
    slow = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer" / "tokenizer.model"))
    assert len(fast) == slow.get_piece_size() == 1024
    differing = 0
    for document in documents(folder):
        ids = fast(document.text, add_special_tokens=False)["input_ids"]
        assert fast.decode(ids) == document.text
        other = slow.encode(document.text)
        # Cuts of a run such as "----------" can be equally probable: 3 + 2 and 4 + 1, or 3 + 2 and 2 + 3.
        assert sum(map(slow.get_score, ids)) == pytest.approx(sum(map(slow.get_score, other)), rel=1e-6)
        differing += ids != other
    assert differing < len(documents(folder)) // 4


def test_unseen_characters_survive_as_bytes(folder: Path) -> None:
    fast = AutoTokenizer.from_pretrained(folder / "tokenizer")
    text = "naïve 漢字 🙂\n\n\tx  y"
    assert fast.decode(fast(text, add_special_tokens=False)["input_ids"]) == text


def test_the_chat_template_only_ever_appends(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    chat = [{"role": role, "content": f"{role} text"} for role in ("user", "assistant") * 2]
    for length in (1, 3):
        prompt = tokenizer.apply_chat_template(chat[:length], tokenize=False, add_generation_prompt=True)
        answered = tokenizer.apply_chat_template(chat[: length + 1], tokenize=False)
        assert answered == prompt + "assistant text<|end|>"


def test_exercises_teach_to_write_instructions_and_to_follow_them(folder: Path) -> None:
    asked = set()
    for document in documents(folder):
        exercises = list(draw_exercises(document, seed=0, num_chunks=2))
        assert exercises == list(draw_exercises(document, seed=0, num_chunks=2))
        for listing, following in zip(exercises[::2], exercises[1::2], strict=True):
            chunk = listing.message.partition("\n\nWrite")[0]
            assert chunk in document.text
            instructions = parse_pool(listing.answer)
            assert len(instructions) == NUM_INSTRUCTIONS
            instruction = following.message.removeprefix(chunk + "\n\n")
            assert any(instruction == phrase + text for phrase in PHRASES for text in instructions)
            verb, _, words = following.answer.rstrip(".").partition(" ")[2].partition(" ")
            if verb in ("uses", "mentions"):
                assert set(re.findall(r"\w+", words)) - {"and"} <= set(re.findall(r"\w+", chunk))
            asked.update(instructions)
    assert len(asked) == 4


def test_answers_weigh_more_than_text(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    settings = ModelSettings(chunks_per_document=1, answer_weight=7.0)
    texts = [d for d in documents(folder) if not d.held][:12]
    tokens, weights = token_stream(texts, tokenizer, settings)
    assert tokens.shape == weights.shape
    heavy = tokenizer.decode(tokens[weights == 7.0])
    answers = [exercise.answer for d in texts for exercise in draw_exercises(d, settings.seed, 1)]
    assert sorted(heavy.split("<|end|>")[:-1]) == sorted(answers)


def test_the_model_is_asked_for_pairs_with_the_command_of_the_user(folder: Path, capfd: pytest.CaptureFixture) -> None:
    settings = ModelSettings(hidden_size=32, ffn_hidden_size=32, row_tokens=32, rows_per_step=1, num_steps=5)
    torch.manual_seed(0)
    pretrain_model(folder / "documents.jsonl", folder / "tokenizer", folder / "model", settings)
    # What so small a model says is no list of instructions.
    with pytest.raises(SystemExit):
        generate_pairs(
            folder / "held.jsonl", folder / "model", folder / "pairs", PairsSettings(max_instruction_tokens=4)
        )
    assert "no document gave a pair" in capfd.readouterr().err
    log = (folder / "pairs" / "state" / "00000" / "log").read_text()
    assert "no_usable_turn" in log


def test_the_exported_folder_answers_a_held_out_document(folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.save_pretrained(tmp_path / "model")
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MistralConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **shape)
    MistralForCausalLM(config).save_pretrained(tmp_path / "model")
    texts = documents(folder)[:4]
    rows = [PreferenceDocument(d.id, d.text, (Turn("Why?", "because", "so", d.text[:50], (0, 50)),)) for d in texts]
    write_pairs(tmp_path / "pairs.jsonl", rows)
    spec = TokenizerSpec(str(tmp_path / "model"))
    preprocess(PreprocessOptions((str(tmp_path / "pairs.jsonl"),), str(tmp_path / "tokens"), spec))
    settings = AnswerSettings(max_new_tokens=3, shown_chars=20)
    places = (tmp_path / "model", tmp_path / "pairs.jsonl", tmp_path / "tokens", "75,25", tmp_path / "answer.txt")
    answer_held_out(*places, settings)
    lines = (tmp_path / "answer.txt").read_text(encoding="utf-8").splitlines()
    dataset = PreferenceDataset(str(tmp_path / "tokens"))
    held_out = dataset[int(dataset.split("75,25")[1][0])].id
    assert lines[0].startswith(f"{held_out}, held out of training, ")
    told = dict(zip(lines[2::2], lines[3::2], strict=True))
    assert told["instruction"] == "    Why?" and "    because" in told.values() and len(told) == 4
