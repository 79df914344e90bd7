"""Preprocessing as a whole: any number of workers, drops with reasons, and nothing half-written."""

from __future__ import annotations

import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_longpo.data.dataset import PreferenceDataset
from megatron_longpo.data.outcome import PreprocessOptions
from megatron_longpo.data.preprocess import preprocess, summary_table
from megatron_longpo.data.tokenize import DocumentTokenizer
from megatron_longpo.data.tokenizer import TokenizerSpec
from megatron_longpo.files import file_hash
from megatron_longpo.pairs import PreferenceDocument, Turn, write_pairs
from tests.tokenized_rows import text_document, token_row

SCRIPT = Path(__file__).parents[2] / "tools" / "preprocess_pairs.py"


def pairs(text: str, num_documents: int = 6) -> list[PreferenceDocument]:
    """Documents of 1,000 to 6,000 characters with one to three turns."""
    documents = []
    for number in range(num_documents):
        document = text[number * 7_000 : number * 7_000 + 1_000 * (number % 6 + 1)]
        turns = tuple(
            Turn(
                f"What is {i}?",
                f"It is {i} of {number}.",
                f"Not {i}.",
                document[100 * i : 100 * i + 200],
                (100 * i, 100 * i + 200),
            )
            for i in range(number % 3 + 1)
        )
        documents.append(PreferenceDocument(f"document {number}", document, turns))
    return documents


@pytest.fixture
def pairs_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "pairs.jsonl"
    write_pairs(path, pairs(text))
    return path


@pytest.fixture
def options(pairs_file: Path, sentencepiece_file: Path, inst_template_file: Path, tmp_path: Path) -> PreprocessOptions:
    # Not the Hugging Face tokenizer: every worker process would import transformers, which takes seconds.
    tokenizer = TokenizerSpec(str(sentencepiece_file), chat_template=str(inst_template_file))
    return PreprocessOptions((str(pairs_file),), str(tmp_path / "out" / "pairs"), tokenizer)


def outputs(options: PreprocessOptions) -> set[str]:
    folder = Path(options.output_prefix).parent
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def test_documents_arrive_in_order_with_a_full_manifest(
    options: PreprocessOptions, pairs_file: Path, text: str
) -> None:
    manifest = preprocess(options, progress=False)
    dataset = PreferenceDataset(options.output_prefix)
    assert outputs(options) == {"pairs.bin", "pairs.idx", "pairs.manifest.json"}
    assert [dataset[n].id for n in range(len(dataset))] == [document.id for document in pairs(text)]
    assert [dataset[n].num_turns for n in range(len(dataset))] == [1, 2, 3, 1, 2, 3]
    tokenizer = options.tokenizer.load()
    assert pairs(text)[4].document in tokenizer.decode(dataset[4].document_tokens)
    assert manifest.tokenizer["hash"] == tokenizer.hash
    assert manifest.tokenizer["template_hash"] == tokenizer.template_hash
    assert manifest.tokenizer["vocab_size"] == tokenizer.vocab_size
    size = pairs_file.stat().st_size
    assert manifest.source == [{"file": str(pairs_file), "bytes": size, "hash": file_hash(pairs_file), "rows": 6}]
    assert manifest.settings["turns"] == "joint"
    assert manifest.dropped == {} and manifest.truncated == []


def test_rows_of_packed_files_are_not_counted_from_outside(options: PreprocessOptions, pairs_file: Path) -> None:
    packed = pairs_file.with_name("pairs.jsonl.gz")
    packed.write_bytes(gzip.compress(pairs_file.read_bytes()))
    manifest = preprocess(replace(options, inputs=(str(packed),)), progress=False)
    assert manifest.num_documents == 6 and manifest.source[0]["rows"] is None


def test_a_json_file_with_a_list_gives_the_same_tokens(options: PreprocessOptions, pairs_file: Path) -> None:
    expected = preprocess(options, progress=False).dataset_hash
    listed = pairs_file.with_suffix(".json")
    listed.write_text(json.dumps([json.loads(line) for line in pairs_file.read_text().splitlines()], indent=1))
    manifest = preprocess(replace(options, inputs=(str(listed),)), progress=False)
    assert manifest.dataset_hash == expected and manifest.source[0]["rows"] is None


def test_workers_do_not_change_a_byte(options: PreprocessOptions) -> None:
    one = preprocess(options, progress=False)
    several = replace(options, output_prefix=options.output_prefix + "-several", num_workers=2)
    assert preprocess(several, progress=False) == one
    for suffix in (".bin", ".idx", ".manifest.json"):
        assert file_hash(options.output_prefix + suffix) == file_hash(several.output_prefix + suffix)


def test_long_documents_are_dropped_and_named(options: PreprocessOptions) -> None:
    lengths = [document.longest_sequence_tokens for document in _read(options)]
    limit = sorted(lengths)[2]
    manifest = preprocess(replace(options, max_seq_length=limit), progress=False)
    kept = [number for number, length in enumerate(lengths) if length <= limit]
    dataset = PreferenceDataset(options.output_prefix)
    assert [dataset[n].id for n in range(len(dataset))] == [f"document {number}" for number in kept]
    assert manifest.longest_sequence_tokens == limit
    assert [(d["id"], d["line"], d["num_tokens"]) for d in manifest.dropped["too_long"]] == [
        (f"document {number}", number + 1, length) for number, length in enumerate(lengths) if length > limit
    ]
    table = summary_table(manifest)
    assert [line.split()[-1] for line in table.splitlines() if "--max-seq-length" in line] == ["3"]


def test_long_documents_are_cut_instead_if_asked(options: PreprocessOptions) -> None:
    whole = _read(options)
    limit = sorted(document.longest_sequence_tokens for document in whole)[2]
    manifest = preprocess(replace(options, max_seq_length=limit, truncate_document=True), progress=False)
    dataset = PreferenceDataset(options.output_prefix)
    assert len(dataset) == 6 and manifest.dropped == {} and manifest.longest_sequence_tokens <= limit
    assert {entry["id"] for entry in manifest.truncated} == {
        document.id for document in whole if document.longest_sequence_tokens > limit
    }
    assert all(entry["tokens_cut"] > 0 for entry in manifest.truncated)
    for number, document in enumerate(whole):
        for turn in range(document.num_turns):
            for role in (0, 1):
                assert np.array_equal(
                    dataset[number].independent[turn][role].response(turn),
                    document.independent[turn][role].response(turn),
                )


def test_documents_that_came_as_tokens_are_cut_too(options: PreprocessOptions, tmp_path: Path, text: str) -> None:
    tokenized = DocumentTokenizer(options.tokenizer.load())(text_document(text, 1, 2))
    path = tmp_path / "tokens.jsonl"
    path.write_text(json.dumps(token_row(tokenized)))
    limit = tokenized.longest_sequence_tokens - 100
    manifest = preprocess(
        replace(options, inputs=(str(path),), max_seq_length=limit, truncate_document=True), progress=False
    )
    (cut,) = manifest.truncated
    assert (cut["id"], cut["tokens_cut"], manifest.longest_sequence_tokens) == ("document 1", 100, limit)


def _read(options: PreprocessOptions) -> list:
    whole = replace(options, output_prefix=options.output_prefix + "-whole")
    preprocess(whole, progress=False)
    dataset = PreferenceDataset(whole.output_prefix)
    return [dataset[number] for number in range(len(dataset))]


def test_answers_that_a_template_makes_equal_are_dropped(tmp_path: Path, huggingface_folder: Path) -> None:
    rows = [
        {"prompt": "One?", "chosen": "yes, and more", "rejected": "yes, or less"},
        {"prompt": "Two?", "chosen": "right", "rejected": "wrong"},
    ]
    path = tmp_path / "trl.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    first_word = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split(',')[0] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    options = PreprocessOptions(
        (str(path),), str(tmp_path / "out" / "p"), TokenizerSpec(str(huggingface_folder), chat_template=first_word)
    )
    manifest = preprocess(options, progress=False)
    assert manifest.num_documents == 1
    assert [entry["id"] for entry in manifest.dropped["identical_tokens"]] == ["trl.jsonl:1"]


def test_when_nothing_is_left_nothing_is_written(options: PreprocessOptions) -> None:
    with pytest.raises(ValueError, match=r"all 6 documents were dropped \(6 because .*--truncate-document"):
        preprocess(replace(options, max_seq_length=10), progress=False)
    assert outputs(options) == set()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_bad_line_leaves_nothing_and_keeps_the_older_dataset(
    options: PreprocessOptions, pairs_file: Path, num_workers: int
) -> None:
    good = pairs_file.read_text()
    bad = json.loads(good.splitlines()[0]) | {"id": "bad", "document": ""}
    preprocess(options, progress=False)
    before = {path: path.read_bytes() for path in Path(options.output_prefix).parent.iterdir()}
    pairs_file.write_text(good + json.dumps(bad) + "\n")
    with pytest.raises(ValueError, match=rf"{pairs_file}:7: field 'document' is empty"):
        preprocess(replace(options, num_workers=num_workers), progress=False)
    assert {path: path.read_bytes() for path in Path(options.output_prefix).parent.iterdir()} == before


def test_tokenized_rows_and_text_rows_in_one_run(options: PreprocessOptions, tmp_path: Path) -> None:
    row = {
        "chosen_input_ids": [1, 2, 3, 4, 5],
        "chosen_labels": [-100, -100, -100, 4, 5],
        "rejected_input_ids": [1, 2, 3, 6, 5],
        "rejected_labels": [-100, -100, -100, 6, 5],
    }
    path = tmp_path / "tokens.jsonl"
    path.write_text(json.dumps(row))
    manifest = preprocess(replace(options, inputs=(*options.inputs, str(path))), progress=False)
    assert manifest.num_documents == 7
    dataset = PreferenceDataset(options.output_prefix)
    assert dataset[6].id == "tokens.jsonl:1" and dataset[6].short == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"turns": "both"}, "--turns both"),
        ({"max_seq_length": 1}, "--max-seq-length 1"),
        ({"truncate_document": True}, "--truncate-document has no effect"),
        ({"prompt_template": "{document}"}, "--prompt-template"),
        ({"num_workers": 0}, "--workers 0 must be at least 1"),
        ({"output_prefix": "data/"}, "--output-prefix data/ is a folder: add a name, data/pairs"),
    ],
)
def test_unusable_flags_are_named(options: PreprocessOptions, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(options, **change)


def command(options: PreprocessOptions, *flags: str) -> list[str]:
    required = ["--input", *options.inputs, "--output-prefix", options.output_prefix]
    tokenizer = ["--tokenizer-model", options.tokenizer.path, "--chat-template", str(options.tokenizer.chat_template)]
    return [sys.executable, str(SCRIPT), *required, *tokenizer, *flags]


def test_the_command_prints_a_summary_and_one_line_errors(options: PreprocessOptions) -> None:
    done = subprocess.run(command(options), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "documents written" in done.stdout and "6/6" in done.stderr
    assert len(PreferenceDataset(options.output_prefix)) == 6
    # A reader that has seen enough of the summary is no failure.
    read, write = os.pipe()
    os.close(read)
    closed = subprocess.run(command(options), stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert closed.returncode == 0 and "Broken" not in closed.stderr
    failed = subprocess.run(command(options, "--max-seq-length", "0"), capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr.strip().startswith("preprocess_pairs.py: error: --max-seq-length 0")
    assert len(failed.stderr.strip().splitlines()) == 1


def test_a_disk_that_fills_up_leaves_nothing(options: PreprocessOptions) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*pairs\.bin'"):
            preprocess(options, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert outputs(options) == set()


@pytest.mark.parametrize("stop", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_ctrl_c_stops_workers_and_leaves_nothing(options: PreprocessOptions, text: str, stop: signal.Signals) -> None:
    write_pairs(
        options.inputs[0],
        (replace(document, id=f"{document.id}.{copy}") for copy in range(6000) for document in pairs(text)),
    )
    # In a group of its own, which gets the signal as a terminal's foreground group does.
    # And SIGTERM finds Ctrl-C ignored, as it is in what a script starts in the background.
    process = subprocess.Popen(
        command(options, "--workers", "2"),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if stop == signal.SIGTERM else None,
    )
    folder = Path(options.output_prefix).parent
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in folder.glob("*.tmp")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, stop) if stop == signal.SIGINT else process.send_signal(stop)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip().splitlines()[-1] == "preprocess_pairs.py: stopped, nothing was written"
    assert "Traceback" not in errors
    assert outputs(options) == set()
    with pytest.raises(ProcessLookupError):
        # The workers are gone; multiprocessing's resource tracker follows when it notices.
        for _ in range(200):
            os.killpg(process.pid, 0)
            time.sleep(0.05)
