"""Token files: what was written comes back, and nothing that is damaged or half-written passes."""

from __future__ import annotations

import json
import re
import resource
import signal
from dataclasses import replace
from pathlib import Path

import megatron_longpo.platform  # noqa: F401  before Megatron-Core  # isort: skip
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_longpo.data import records
from megatron_longpo.data.document import Branch, TokenizedDocument
from megatron_longpo.data.manifest import Manifest, manifest_path
from megatron_longpo.data.records import RecordReader, RecordWriter
from megatron_longpo.data.rows import training_row
from tests.data.samples import VOCAB, random_document


def write(prefix: Path, documents: list[TokenizedDocument]) -> Manifest:
    with RecordWriter(prefix) as writer:
        for document in documents:
            writer.add(document)
        return writer.finish(settings={"turns": "joint"})


def strip(document: TokenizedDocument, joint: bool, independent: bool, short: bool) -> TokenizedDocument:
    """The same document without some of its conversations."""
    return replace(
        document,
        joint=document.joint if joint or not independent else None,
        independent=document.independent if independent or not joint else (),
        short=document.short if short else (),
    )


documents = st.builds(
    strip,
    st.builds(
        random_document,
        st.integers(0, 10_000),
        st.integers(1, 4),
        id=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9),
        prefix=st.integers(1, 30),
    ),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)


@settings(max_examples=40)
@given(written=st.lists(documents, min_size=1, max_size=4))
def test_documents_come_back_as_they_were(tmp_path_factory: pytest.TempPathFactory, written: list) -> None:
    prefix = tmp_path_factory.mktemp("records") / "pairs"
    write(prefix, written)
    reader = RecordReader(prefix)
    reader.verify()
    assert [reader[number] for number in range(len(reader))] == written
    assert [reader.document_id(number) for number in range(len(reader))] == [document.id for document in written]


def test_a_document_of_one_turn_stores_its_conversation_once(tmp_path: Path) -> None:
    document = random_document(0, num_turns=1)
    write(tmp_path / "pairs", [document])
    _, *rest = IndexedDataset(str(tmp_path / "pairs"))[0:7]
    assert len(rest) == 1 + 2 + 3, "document, one pair, one short prompt"
    assert len(IndexedDataset(str(tmp_path / "pairs"))) == 7
    assert RecordReader(tmp_path / "pairs")[0] == document


def test_the_manifest_counts(tmp_path: Path) -> None:
    written = [random_document(seed, num_turns=seed + 1) for seed in range(3)]
    manifest = write(tmp_path / "pairs", written)
    assert manifest == Manifest.load(tmp_path / "pairs")
    assert (manifest.num_documents, manifest.num_turns) == (3, 6)
    assert manifest.longest_sequence_tokens == max(document.longest_sequence_tokens for document in written)
    # TRL's short prompts may be longer than the long ones, and the reference reads them.
    short = replace(written[0].short[0], prefix_tokens=np.zeros(200, np.int32))
    longest = replace(written[0], short=(short,))
    manifest_of_short = write(tmp_path / "short", [longest])
    assert manifest_of_short.longest_sequence_tokens == longest.longest_short_tokens > longest.longest_sequence_tokens
    assert manifest.max_token_id == max(int(t.max()) for d in written for t in d.all_tokens()) < VOCAB
    for turns in ("joint", "independent"):
        assert manifest.row_tokens[turns] == [training_row(document, turns).num_tokens for document in written]
    assert manifest.bin_bytes == (tmp_path / "pairs.bin").stat().st_size


def test_row_lengths_are_empty_when_a_document_lacks_the_kind(tmp_path: Path) -> None:
    manifest = write(tmp_path / "pairs", [random_document(0), replace(random_document(1), joint=None)])
    assert manifest.row_tokens["joint"] == [] and len(manifest.row_tokens["independent"]) == 2


def test_the_dataset_hash_follows_the_content_only(tmp_path: Path) -> None:
    one, two = random_document(0, id="a"), random_document(1, id="b")
    reference = write(tmp_path / "pairs", [one, two]).dataset_hash
    assert write(tmp_path / "some" / "where" / "other", [one, two]).dataset_hash == reference
    changed = Branch(one.independent[0][0].tokens + 1, one.independent[0][0].spans)
    moved = Branch(one.independent[0][0].tokens, ((0, 0, 1),))
    others = [
        [two, one],
        [one],
        [replace(one, id="c"), two],
        [replace(one, independent=((changed, one.independent[0][1]), *one.independent[1:])), two],
        [replace(one, independent=((moved, one.independent[0][1]), *one.independent[1:])), two],
    ]
    hashes = {write(tmp_path / "other", other).dataset_hash for other in others}
    assert len(hashes) == len(others) and reference not in hashes


def test_an_error_leaves_nothing_behind_and_an_older_dataset_untouched(tmp_path: Path) -> None:
    prefix = tmp_path / "pairs"
    old = random_document(0)
    for existing in (set(), {"pairs.bin", "pairs.idx", "pairs.manifest.json"}):
        with pytest.raises(KeyboardInterrupt), RecordWriter(prefix) as writer:
            writer.add(random_document(1))
            raise KeyboardInterrupt
        assert {path.name for path in tmp_path.iterdir()} == existing
        if existing:
            assert RecordReader(prefix)[0] == old
        else:
            write(prefix, [old])


def test_a_crash_between_the_renames_leaves_no_manifest(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old manifest beside the new tokens would pass for a dataset."""
    replace_file = records.replace_file

    def crash_after_the_tokens(temporary: Path, path: str) -> None:
        if str(path).endswith(".idx"):
            raise KeyboardInterrupt
        replace_file(temporary, path)

    monkeypatch.setattr(records, "replace_file", crash_after_the_tokens)
    with pytest.raises(KeyboardInterrupt):
        write(prefix, [random_document(9)])
    with pytest.raises(ValueError, match="did not finish"):
        RecordReader(prefix)


def test_ctrl_c_between_the_renames_waits_for_the_whole_dataset(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_file = records.replace_file

    def interrupt(temporary: Path, path: str) -> None:
        signal.raise_signal(signal.SIGINT)
        replace_file(temporary, path)

    monkeypatch.setattr(records, "replace_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(prefix, [random_document(9)])
    assert RecordReader(prefix)[0] == random_document(9)
    assert {path.name for path in prefix.parent.iterdir()} == {"pairs.bin", "pairs.idx", "pairs.manifest.json"}


def test_a_disk_without_room_for_the_manifest_keeps_the_old_dataset(prefix: Path) -> None:
    """The manifest grows with the documents; here it alone does not fit, by less than Python's buffers hold."""
    old = {path: path.read_bytes() for path in prefix.parent.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*manifest\.json'"), RecordWriter(prefix) as writer:
            writer.add(random_document(9))
            writer.finish(dropped={"too_long": [{"id": "x" * 6_000}]})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path: path.read_bytes() for path in prefix.parent.iterdir()} == old


def test_nothing_to_write_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no document"), RecordWriter(tmp_path / "pairs") as writer:
        writer.finish()
    assert not list(tmp_path.iterdir())


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    write(tmp_path / "pairs", [random_document(seed) for seed in range(3)])
    return tmp_path / "pairs"


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".manifest.json"])
def test_a_missing_file_is_named(prefix: Path, suffix: str) -> None:
    Path(f"{prefix}{suffix}").unlink()
    with pytest.raises(ValueError, match=rf"--data-path.*pairs\{suffix}.*preprocess_pairs\.py"):
        RecordReader(prefix)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("cut", [1, 100])
def test_a_truncated_file_is_named(prefix: Path, suffix: str, cut: int) -> None:
    path = Path(f"{prefix}{suffix}")
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(ValueError, match=rf"pairs\{suffix} .*preprocess_pairs\.py again"):
        RecordReader(prefix)


def test_files_of_two_datasets_do_not_mix(prefix: Path, tmp_path: Path) -> None:
    write(tmp_path / "other", [random_document(seed) for seed in (7, 8, 9)])
    Path(f"{prefix}.idx").write_bytes((tmp_path / "other.idx").read_bytes())
    with pytest.raises(ValueError, match="is not the index"):
        RecordReader(prefix)


def test_a_count_of_documents_that_is_not_the_index_s_is_refused(prefix: Path) -> None:
    content = json.loads(manifest_path(prefix).read_text())
    content |= {"num_documents": 99, "row_tokens": {"joint": [], "independent": []}}
    manifest_path(prefix).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"manifest\.json counts 99 documents, its index does not"):
        RecordReader(prefix)


@pytest.mark.parametrize("bit", [0, 6, 30, 31])
def test_flipped_bits_end_in_a_message_or_in_other_tokens(prefix: Path, bit: int) -> None:
    """Not in a traceback, nor in a token that no model has."""
    path = Path(f"{prefix}.bin")
    content = np.fromfile(path, dtype=np.int32)
    reader = RecordReader(prefix)
    starts = np.flatnonzero(content == 1 << bit)
    for word in {*range(40), *starts.tolist(), len(content) - 1}:
        changed = content.copy()
        changed[word : word + 1].view(np.uint32)[:] ^= np.uint32(1 << bit)
        changed.tofile(path)
        for number in range(3):
            try:
                tokens = np.concatenate(list(RecordReader(prefix)[number].all_tokens()))
            except ValueError as error:
                assert re.search(r"pairs\.bin is damaged at document \d .*preprocess_pairs\.py again", str(error))
            else:
                assert 0 <= tokens.min() <= tokens.max() <= reader.manifest.max_token_id
    if bit > 20:
        with pytest.raises(ValueError, match=r"document 2 \(it has a token id outside of 0 to \d+\)"):
            RecordReader(prefix)[2]


def test_verify_finds_a_changed_token(prefix: Path) -> None:
    path = Path(f"{prefix}.bin")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    reader = RecordReader(prefix)
    with pytest.raises(ValueError, match="does not have the content"):
        reader.verify()


def test_documents_outside_of_the_dataset(prefix: Path) -> None:
    for number in (-1, 3):
        with pytest.raises(IndexError, match="0 to 2"):
            RecordReader(prefix)[number]


def test_tokens_outlive_their_reader(prefix: Path) -> None:
    tokens = RecordReader(prefix)[1].document_tokens
    assert np.array_equal(tokens, random_document(1).document_tokens)
    assert tokens.flags.owndata


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema=2), "'schema' is 2"),
        (lambda m: m.pop("dataset_hash"), "missing or unknown fields"),
        (lambda m: m.update(extra=1), "missing or unknown fields"),
        (lambda m: m.update(max_token_id="9"), "field 'max_token_id' cannot be '9'"),
        (lambda m: m.update(num_turns=None), "field 'num_turns' cannot be None"),
        (lambda m: m.update(row_tokens={"joint": []}), "field 'row_tokens' is not of 3 documents"),
        (lambda m: m.update(num_documents=99), "field 'row_tokens' is not of 99 documents"),
    ],
)
def test_a_manifest_of_another_version_is_refused(prefix: Path, change, message: str) -> None:
    path = manifest_path(prefix)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        Manifest.load(prefix)


@pytest.mark.parametrize("content", ["", "{", "[]", "3"])
def test_a_manifest_that_is_none_is_refused(prefix: Path, content: str) -> None:
    manifest_path(prefix).write_text(content)
    with pytest.raises(ValueError, match=r"pairs\.manifest\.json"):
        Manifest.load(prefix)


def test_remains_of_a_stopped_run_are_recognised(prefix: Path) -> None:
    manifest_path(prefix).unlink()
    with pytest.raises(ValueError, match=r"pairs\.bin and .*pairs\.idx come from a run that did not finish"):
        Manifest.load(prefix)
