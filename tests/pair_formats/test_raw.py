"""Raw rows of files and folders: JSON lines, Parquet, and the Arrow files that datasets saves."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_longpo.pair_formats.counting import count_rows
from megatron_longpo.pair_formats.document import PairsError
from megatron_longpo.pair_formats.raw import input_files, raw_rows

ROWS = [{"id": "a", "ids": [1, 2], "nested": [[1], [2, 3]]}, {"id": "b", "ids": [3], "nested": []}]


def plain(value: object) -> object:
    """Arrays as lists again."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | np.ndarray):
        return [plain(item) for item in value]
    return value


def test_json_lines_with_blank_lines_a_bom_and_any_line_end(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS[0]).encode() + b"\r\n\n  \n" + json.dumps(ROWS[1]).encode())
    rows = list(raw_rows(path))
    assert [row for _, row in rows] == ROWS
    assert [str(where) for where, _ in rows] == [f"{path}:1", f"{path}:4"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"id": "a"', r":1: is not JSON \("),
        (b'{"id": "a"}\n[1]', ":2: is a list, not an object"),
        (b'{"id": "a"}\n{"id": "\xff"}', ":2: is not UTF-8 at byte 8"),
        (b"[" * 100_000, ":1: is not JSON"),
        (b"\x00\x01", ":1: is not JSON"),
        (b'{"n": ' + b"9" * 5_000 + b"}", ":1: is not JSON"),
    ],
)
def test_broken_lines_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(PairsError, match=rf"rows\.jsonl{message}"):
        list(raw_rows(path))


def test_parquet_and_arrow_tables(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.to_parquet(tmp_path / "rows.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    for path in [tmp_path / "rows.parquet", *input_files([tmp_path / "saved"])]:
        rows = list(raw_rows(path))
        assert [plain(row) for _, row in rows] == ROWS
        assert [where.line for where, _ in rows] == [1, 2]
        assert isinstance(rows[0][1]["ids"], np.ndarray), "half a million Python integers a row would be slow"


def test_lists_of_other_writers(tmp_path: Path) -> None:
    """Polars writes lists with 64-bit offsets."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    row = {"ids": [1, 2], "nested": [[1], [2, 3]], "holes": [1, None], "texts": ["a", "b"], "shares": [0.5]}
    numbers, large = arrow.int64(), arrow.large_list
    types = {"ids": numbers, "nested": large(numbers), "holes": numbers, "texts": arrow.string()}
    schema = arrow.schema({name: large(types.get(name, arrow.float64())) for name in row})
    parquet.write_table(arrow.Table.from_pylist([row], schema), tmp_path / "rows.parquet")
    ((_, read),) = raw_rows(tmp_path / "rows.parquet")
    assert plain(read) == row and isinstance(read["ids"], np.ndarray) and isinstance(read["nested"][1], np.ndarray)


@pytest.mark.parametrize("name", ["broken.parquet", "broken.arrow"])
def test_broken_tables_are_named(tmp_path: Path, name: str) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / name
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(PairsError, match=name):
        list(raw_rows(path))


def test_without_pyarrow_tables_say_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1")
    assert count_rows([path]) is None
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # what Python does with a package that is not there
    with pytest.raises(ValueError, match=r"--input .*rows.parquet: reading .parquet files needs pyarrow: pip install"):
        list(raw_rows(path))


def test_folders_are_searched_in_order_without_caches(tmp_path: Path) -> None:
    for name in ("b/two.jsonl", "a/one.jsonl", "a/cache-1234.arrow", "a/state.json", "c.parquet", "d.jsonl.gz"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    assert [str(p.relative_to(tmp_path)) for p in input_files([tmp_path])] == [
        "a/one.jsonl",
        "b/two.jsonl",
        "c.parquet",
        "d.jsonl.gz",
    ]


def test_of_a_generation_only_the_pairs_are_pairs(tmp_path: Path) -> None:
    folder = tmp_path / "generation"
    folder.mkdir()
    for name in ("pairs.jsonl", "timings.jsonl"):
        (folder / name).write_text("x")
    # Without the report it is a folder like any other, of which no file may be passed over.
    assert [path.name for path in input_files([folder])] == ["pairs.jsonl", "timings.jsonl"]
    (folder / "report.json").write_text("x")
    assert [path.name for path in input_files([folder])] == ["pairs.jsonl"]
    assert [path.name for path in input_files([tmp_path])] == ["pairs.jsonl"]


def test_unusable_paths_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--input nowhere\.jsonl: there is no such file"):
        input_files(["nowhere.jsonl"])
    with pytest.raises(ValueError, match=r"has no \.jsonl"):
        input_files([tmp_path])
    (tmp_path / "started" / "state").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"started: a generation that has not come to its end: run tools/generate_p"):
        input_files([tmp_path / "started"])
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"empty\.jsonl: the file is empty"):
        input_files([tmp_path / "empty.jsonl"])


def test_damaged_packed_files_are_named(tmp_path: Path) -> None:
    packed = gzip.compress(b"".join(json.dumps({"id": str(number)}).encode() + b"\n" for number in range(500)))
    middle = len(packed) // 2
    contents = (b"plain", packed[:-20], packed[:middle] + b"\xff" * 40 + packed[middle + 40 :])
    for content in contents:
        path = tmp_path / "rows.jsonl.gz"
        path.write_bytes(content)
        with pytest.raises(
            PairsError, match=r"rows\.jsonl\.gz: is not a whole gzip file \(.*\); copy or pack it again"
        ):
            list(raw_rows(path))
    path.write_bytes(packed)
    assert len(list(raw_rows(path))) == 500
