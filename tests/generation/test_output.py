"""One output folder: who may write into it, who may go on with it, and when its results are written."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from benchmarks.generation.chat_server import ChatServer, running
from megatron_longpo.files import exclusive_lock
from megatron_longpo.generation.command import main
from megatron_longpo.generation.output import prepare_output, write_results
from megatron_longpo.generation.rollout import Outcome
from megatron_longpo.generation.runner import run_task
from megatron_longpo.generation.store import TaskStore
from tests.generation.conftest import Settings
from tests.generation.runs import command, run


def test_two_writers_on_one_output_are_refused(settings: Settings) -> None:
    chosen = settings()
    prepare_output(chosen)
    with (
        exclusive_lock(Path(chosen.output, "state", "00000", "lock"), ""),
        pytest.raises(ValueError, match=r"pairs: another process is working on task 0 of 1 there"),
    ):
        run_task(chosen)


def test_of_two_tasks_that_finish_together_one_writes(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    with running(ChatServer()) as url:
        words = command(settings(base_url=url))[2:]
        assert main(words) == 0
        with exclusive_lock(Path(settings().output, "state", "results.lock"), ""):
            capsys.readouterr()
            assert main([*words, "--task", "0"]) == 0
            assert capsys.readouterr().out == "all tasks are finished; another one is writing pairs.jsonl\n"
            assert main(words) == 1


def test_going_on_with_other_flags_or_documents_is_refused(settings: Settings, corpus: Path, tmp_path: Path) -> None:
    prepare_output(settings())
    prepare_output(settings(concurrency=3, base_url="http://other:1/v1"))
    with pytest.raises(ValueError, match=r"--top-p was 0.9, now 0.8; --seed was 0, now 1"):
        prepare_output(settings(seed=1, top_p=0.8))
    other = tmp_path / "more.jsonl"
    other.write_text(corpus.read_text())
    prepare_output(settings(documents=(str(other),), output=str(tmp_path / "other")))
    other.write_text(corpus.read_text() + "\n")
    with pytest.raises(ValueError, match=r"the files of --documents were other ones, or had other sizes"):
        prepare_output(settings(documents=(str(other),), output=str(tmp_path / "other")))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"full is not empty \(notes.txt\)"):
        prepare_output(settings(output=str(tmp_path / "full")))
    with pytest.raises(ValueError, match=r"--output .*notes.txt is a file: give a folder"):
        prepare_output(settings(output=str(tmp_path / "full" / "notes.txt")))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "Expecting value"),
        (b"\xff", "invalid start byte"),
        (b"[]", "it has no 'schema': 1"),
        (b'{"schema": 2}', "it has no 'schema': 1"),
        (b'{"schema": 1, "settings": []}', "without a 'settings' as this version writes it"),
        (b'{"schema": 1, "settings": {}}', "without a 'prompt_hash' as this version writes it"),
    ],
)
def test_a_damaged_settings_file_is_named(content: bytes, problem: str, settings: Settings) -> None:
    chosen = settings()
    file = Path(chosen.output, "state", "settings.json")
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"settings.json is not what .* wrote \(.*{problem}.*\): restore it, or give"):
        prepare_output(chosen)


def test_any_name_of_a_folder_will_do(settings: Settings, tmp_path: Path) -> None:
    with running(ChatServer()) as url:
        assert run(settings(base_url=url, output=str(tmp_path / "pairs #1? 50%41 ü"), max_documents=1))


def test_a_damaged_state_is_named_and_can_be_deleted(settings: Settings) -> None:
    with running(ChatServer()) as url:
        chosen = settings(base_url=url, max_documents=1)
        pairs = run(chosen)
        state = Path(chosen.output, "state", "00000")
        database = state / "replay.sqlite3"
        database.write_bytes(database.read_bytes()[:3000])
        for use in (write_results, run_task):
            with pytest.raises(
                ValueError, match=rf"replay.sqlite3 cannot be used \(.*\): if it is damaged, delete {state}"
            ):
                use(chosen)
        shutil.rmtree(state)
        assert run(chosen) == pairs


async def store_without_table(folder: Path) -> TaskStore:
    """Every outcome that it is given fails to be written."""
    store = TaskStore(folder)
    await store.initialize(0)
    assert store._conn is not None
    await store._conn.execute("DROP TABLE outcomes")
    return store


def test_an_outcome_that_nobody_waits_for_does_not_stop_the_writer(tmp_path: Path) -> None:
    """Ctrl-C on a full disk: the outcome cannot be written, and who asked for it is gone."""

    async def interrupted() -> None:
        store = await store_without_table(tmp_path)
        waiting = asyncio.create_task(store.store_outcome(Outcome(0, "id"), 0.0))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait_for(store.close(), 5)

    asyncio.run(interrupted())


def test_an_outcome_that_cannot_be_written_is_an_error_of_the_run(tmp_path: Path) -> None:
    async def lost() -> None:
        store = await store_without_table(tmp_path)
        try:
            await store.store_outcome(Outcome(0, "id"), 0.0)
        finally:
            await store.close()

    with pytest.raises(OSError, match=r"replay.sqlite3 cannot be written: no such table"):
        asyncio.run(lost())


def test_a_bad_document_is_found_before_anything_is_asked_or_written(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "documents.jsonl"
    chosen = settings(documents=(str(path),))
    path.write_text('{"text": "fine"}\n{"text": 3}\n')
    with pytest.raises(ValueError, match=r"documents.jsonl:2: field 'text' is a number"):
        prepare_output(chosen)
    assert not Path(chosen.output).exists()
    path.write_text('{"text": "fine"}\n{"text": "mended"}\n')
    prepare_output(chosen)
    with pytest.raises(ValueError, match=r"--output /proc/pairs/state cannot be written"):
        prepare_output(settings(documents=(str(path),), output="/proc/pairs"))


def test_a_finished_run_needs_no_server_to_write_its_results_again(settings: Settings) -> None:
    with running(ChatServer()) as url:
        words = [*command(settings(base_url=url))[2:], "--max-documents", "1", "--max-retries", "0"]
        assert main(words) == 0
    pairs = Path(settings().output, "pairs.jsonl")
    content = pairs.read_bytes()
    pairs.unlink()
    assert main(words) == 0
    assert pairs.read_bytes() == content


def test_results_wait_for_every_task(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    with running(ChatServer()) as url:
        chosen = settings(base_url=url, num_tasks=2)
        prepare_output(chosen)
        assert main([*command(chosen)[2:], "--tasks", "2", "--task", "0"]) == 0
        assert capsys.readouterr().out == "task 0 of 2 is finished; the last one to finish writes pairs.jsonl\n"
        with pytest.raises(ValueError, match=r"task 1 of 2 has not run; start it with --task 1"):
            write_results(chosen)
        asyncio.run(_begin_task(chosen.output, 1))
        with pytest.raises(ValueError, match=r"'doc-1' has not been answered .* task 1 of 2 .* again with --task 1"):
            write_results(chosen)


async def _begin_task(output: str, number: int) -> None:
    store = TaskStore(Path(output, "state"))
    await store.initialize(number)
    await store.close()
