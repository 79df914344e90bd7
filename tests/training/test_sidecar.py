"""Reference log-probs on disk: what is written comes back, an interrupted pass goes on, other keys are refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_longpo.training.sidecar import ReferenceKey, ReferenceLogprobs, SidecarWriter, sidecar_folder

KEY = ReferenceKey(kind="short", dataset="d" * 8, weights="w" * 16, rotary_base=10000.0, dtype="fp32")
RNG = np.random.default_rng(0)


def some_turns(*sizes: tuple[int, int]) -> list[tuple[np.ndarray, np.ndarray]]:
    return [tuple(RNG.standard_normal(n).astype(np.float32) for n in pair) for pair in sizes]  # type: ignore[misc]


DOCUMENTS = {0: some_turns((3, 5)), 1: some_turns((1, 2), (4, 1), (2, 2)), 2: some_turns((7, 7))}


def same(left: list[tuple[np.ndarray, np.ndarray]], right: list[tuple[np.ndarray, np.ndarray]]) -> bool:
    return len(left) == len(right) and all(
        np.array_equal(a, b) for one, other in zip(left, right, strict=True) for a, b in zip(one, other, strict=True)
    )


def write_all(folder: Path) -> None:
    writer = SidecarWriter(folder, KEY, len(DOCUMENTS))
    for number in (2, 0, 1):  # the pass goes by length, not by number
        writer.add(number, DOCUMENTS[number])
        if number != 1:
            writer.flush()
    writer.finish()


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    folder = sidecar_folder(str(tmp_path / "data"), "short", None)
    assert folder.name == "data.reference-short"
    write_all(folder)
    reference = ReferenceLogprobs(folder, KEY)
    assert all(same(reference.of(number), turns) for number, turns in DOCUMENTS.items())
    assert not (folder / "parts").exists()


def test_an_interrupted_pass_goes_on(tmp_path: Path) -> None:
    first = SidecarWriter(tmp_path, KEY, len(DOCUMENTS))
    first.add(1, DOCUMENTS[1])
    first.flush()
    first.add(2, DOCUMENTS[2])  # not flushed: lost with the process
    second = SidecarWriter(tmp_path, KEY, len(DOCUMENTS))
    assert second.finished() == {1}
    with pytest.raises(ValueError, match="2 documents have no reference log-probs, first 0"):
        second.finish()
    for number in (0, 2):
        second.add(number, DOCUMENTS[number])
    second.finish()
    reference = ReferenceLogprobs(tmp_path, KEY)
    assert all(same(reference.of(number), turns) for number, turns in DOCUMENTS.items())


def test_parts_of_another_model_are_not_used(tmp_path: Path) -> None:
    first = SidecarWriter(tmp_path, replace(KEY, weights="other"), len(DOCUMENTS))
    first.add(1, DOCUMENTS[1])
    first.flush()
    assert SidecarWriter(tmp_path, KEY, len(DOCUMENTS)).finished() == set()


def test_parts_whose_removal_was_killed_are_not_used(tmp_path: Path) -> None:
    first = SidecarWriter(tmp_path, replace(KEY, weights="other"), len(DOCUMENTS))
    first.add(1, DOCUMENTS[1])
    first.flush()
    (tmp_path / "parts" / "key.json").unlink()
    assert SidecarWriter(tmp_path, KEY, len(DOCUMENTS)).finished() == set()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dataset", "x"),
        ("weights", "x"),
        ("rotary_base", 1e7),
        ("kind", "long-joint"),
        ("dtype", "bf16"),
        ("window_tokens", 9),
    ],
)
def test_another_key_is_refused(tmp_path: Path, field: str, value: object) -> None:
    write_all(tmp_path)
    with pytest.raises(ValueError, match=rf"made from something else: {field} .*--reference-dir"):
        ReferenceLogprobs(tmp_path, replace(KEY, **{field: value}))
    with pytest.raises(ValueError, match="made from something else"):
        SidecarWriter(tmp_path, replace(KEY, **{field: value}), len(DOCUMENTS))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("logps", lambda array: array[:-2].copy()),
        ("logps", lambda array: b""),
        ("lengths", lambda array: b""),
        ("lengths", lambda array: array[:, 0].copy()),
        ("lengths", lambda array: array[::-1].copy()),
        ("lengths", lambda array: array[:-1].copy()),
        ("lengths", lambda array: array.astype(np.float32)),
        ("lengths", lambda array: array - [[0, 9, 0]] + [[0, 0, 9]]),
        ("logps", lambda array: array[:, None].copy()),
    ],
)
def test_damage_is_found(tmp_path: Path, name: str, change: Callable[[Any], Any]) -> None:
    write_all(tmp_path)
    path = tmp_path / f"{name}.npy"
    content = change(np.load(path))
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    with pytest.raises(ValueError, match="is damaged"):
        ReferenceLogprobs(tmp_path, KEY)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_broken_manifest_names_the_file(tmp_path: Path, content: bytes) -> None:
    write_all(tmp_path)
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest\.json is not a JSON object .*: delete .* to compute it again"):
        ReferenceLogprobs(tmp_path, KEY)


def test_a_manifest_of_another_schema_is_refused(tmp_path: Path) -> None:
    write_all(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"schema": 99}))
    with pytest.raises(ValueError, match=rf"manifest\.json: schema 99 is not 1: delete {tmp_path}"):
        ReferenceLogprobs(tmp_path, KEY)


@pytest.mark.parametrize("field", ["num_tokens", "num_documents"])
def test_a_manifest_without_a_count_is_damaged(tmp_path: Path, field: str) -> None:
    write_all(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != field}))
    with pytest.raises(ValueError, match="is damaged"):
        ReferenceLogprobs(tmp_path, KEY)


def test_pickles_are_not_loaded(tmp_path: Path) -> None:
    """Loading one runs what it says."""
    writer = SidecarWriter(tmp_path, KEY, len(DOCUMENTS))
    np.savez(tmp_path / "parts" / "000000000.npz", lengths=np.array([[{}]]), logps=np.zeros(1))
    with pytest.raises(ValueError, match=r"is damaged .*allow_pickle"):
        writer.finished()


@pytest.mark.parametrize("kept", [0, 100])
def test_a_damaged_part_is_named(tmp_path: Path, kept: int) -> None:
    writer = SidecarWriter(tmp_path, KEY, len(DOCUMENTS))
    writer.add(1, DOCUMENTS[1])
    writer.flush()
    (part,) = (tmp_path / "parts").glob("*.npz")
    part.write_bytes(part.read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"{part} is damaged .*: delete it"):
        SidecarWriter(tmp_path, KEY, len(DOCUMENTS)).finished()
