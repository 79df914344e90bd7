"""The whole pipeline against a real HTTP server: its content, its faults, its interruptions."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import dill
import pytest
from datatrove.executor import LocalPipelineExecutor

from benchmarks.generation.chat_server import MODEL, ChatServer, running
from megatron_longpo.files import exclusive_lock
from megatron_longpo.generation import http_engine
from megatron_longpo.generation.command import main
from megatron_longpo.generation.engine import EngineError
from megatron_longpo.generation.output import PAIRS, REPORT, TIMINGS, prepare_output, write_results
from megatron_longpo.generation.runner import generation_pipeline, run_task
from megatron_longpo.generation.settings import GenerationSettings
from megatron_longpo.pairs import PreferenceDocument, read_pairs
from tests.generation.conftest import LENGTHS, NUM_DOCUMENTS, Settings

REPOSITORY = Path(__file__).parents[2]


class Clean(NamedTuple):
    """A run without any trouble: its pairs file, what its server saw, and its folder."""

    pairs: bytes
    server: ChatServer
    output: Path


def run(settings: GenerationSettings) -> bytes:
    """Every task, then the results; returns the pairs file."""
    prepare_output(settings)
    for task in range(settings.num_tasks):
        run_task(settings, task)
    write_results(settings)
    return Path(settings.output, PAIRS).read_bytes()


def report(settings: GenerationSettings) -> dict[str, Any]:
    return json.loads(Path(settings.output, REPORT).read_text())


@pytest.fixture(scope="module")
def clean(corpus: Path, huggingface_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Clean:
    """The pairs file of a run without any trouble, and what its server saw."""
    server = ChatServer(latency_s=0.001, keep_prompts=True)
    with running(server) as url:
        settings = GenerationSettings(
            documents=(str(corpus),),
            output=str(tmp_path_factory.mktemp("clean") / "pairs"),
            engine="openai",
            model=MODEL,
            base_url=url,
            tokenizer_model=str(huggingface_folder),
            progress=False,
            **LENGTHS,  # type: ignore[arg-type]
        )
        content = run(settings)
    return Clean(content, server, Path(settings.output))


def test_the_pairs_are_what_the_server_said(clean: Clean, corpus: Path) -> None:
    server, output = clean.server, clean.output
    texts = {row["id"]: row["text"] for row in map(json.loads, corpus.read_text().splitlines())}
    rows = list(read_pairs(output / PAIRS))
    assert [row.id for row in rows] == [f"doc-{i}" for i in range(NUM_DOCUMENTS)]
    for row in rows:
        assert isinstance(row, PreferenceDocument)
        assert row.document == texts[row.id]
        assert 1 <= len(row.turns) <= 4
        assert row.provenance["sampling"]["instructions"] == {"temperature": 0.7, "top_p": 0.9}
        assert row.provenance["engine"] == "openai" and row.provenance["seed"] == 0
        for turn in row.turns:
            assert turn.chunk == row.document[slice(*turn.chunk_span)]
            assert turn.chosen != turn.rejected
            # The prompts of training, preprocessing's default template included.
            assert f"{turn.chunk}\n\n{turn.instruction}" in server.prompts
            assert f"{row.document}\n\n{turn.instruction}" in server.prompts
            assert turn.provenance["tokens"]["chosen"] > 0
    content = json.loads((output / REPORT).read_text())
    assert content["documents"] == {
        "read": NUM_DOCUMENTS + 2,
        "with_pairs": NUM_DOCUMENTS,
        "dropped": {"document_too_short": 1, "document_too_long": 1},
    }
    assert content["turns"]["kept"] == sum(len(row.turns) for row in rows if isinstance(row, PreferenceDocument))
    timings = [json.loads(line) for line in (output / TIMINGS).read_text().splitlines()]
    assert len(timings) == NUM_DOCUMENTS + 2
    assert sum(row["prompt_tokens"] for row in timings) == content["tokens"]["prompt"]


def test_requests_of_one_document_come_together(corpus: Path, settings: Settings) -> None:
    """So that a server's prefix cache still holds the document when its other turns come."""
    server = ChatServer(latency_s=0.002, keep_prompts=True)
    with running(server) as url:
        run(settings(base_url=url, concurrency=6))
    texts = {row["id"]: row["text"] for row in map(json.loads, corpus.read_text().splitlines())}
    places: dict[str, list[int]] = {}
    for place, prompt in enumerate(server.prompts):
        for id, text in texts.items():
            if prompt.startswith(text):
                places.setdefault(id, []).append(place)
    assert len(places) == NUM_DOCUMENTS
    # Neighbours but for what other connections squeeze in between.
    assert all(own[-1] - own[0] < len(own) + 6 for own in places.values())


def test_content_depends_on_neither_workers_nor_concurrency(clean: Clean, settings: Settings) -> None:
    with running(ChatServer(latency_s=0.001)) as url:
        found = run(settings(base_url=url, num_workers=2, concurrency=2))
    assert found == clean.pairs


def test_datatroves_executor_runs_the_same_pipeline(clean: Clean, settings: Settings, tmp_path: Path) -> None:
    with running(ChatServer()) as url:
        chosen = settings(base_url=url, num_tasks=2)
        prepare_output(chosen)
        # The executors for Slurm and Ray send the pipeline to other processes in this way.
        pipeline = dill.loads(dill.dumps(generation_pipeline(chosen)))
        LocalPipelineExecutor(pipeline=pipeline, tasks=2, workers=1, logging_dir=str(tmp_path / "logs")).run()
        write_results(chosen)
    assert Path(chosen.output, PAIRS).read_bytes() == clean.pairs


def test_another_seed_makes_other_pairs(clean: Clean, settings: Settings) -> None:
    with running(ChatServer()) as url:
        assert run(settings(base_url=url, seed=1, max_documents=4)) != clean.pairs


def test_every_fault_is_survived(clean: Clean, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_engine, "_FIRST_PAUSE_S", 0.02)
    faults = ("429", "500", "503", "cut", "garbage", "refuse", "hang")
    server = ChatServer(latency_s=0.001, faults=faults, fault_every=4)
    with running(server) as url:
        found = run(settings(base_url=url, request_timeout_s=1.0))
    assert found == clean.pairs
    assert len(server.retries_after) >= 2 * len(faults)


def test_retry_after_is_honoured(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_engine, "_FIRST_PAUSE_S", 0.01)
    server = ChatServer(faults=("429",), fault_every=10, retry_after_s=0.3)
    with running(server) as url:
        run(settings(base_url=url, max_documents=3))
    assert server.retries_after and min(server.retries_after) >= 0.3


def test_requests_in_flight_stay_at_the_limit_and_never_above(settings: Settings) -> None:
    server = ChatServer(latency_s=0.02)
    with running(server) as url:
        run(settings(base_url=url, concurrency=8))
    assert server.most_in_flight == 8


def test_a_prompt_that_is_too_long_drops_its_document_with_the_reason(settings: Settings) -> None:
    server = ChatServer(context_chars=5000)  # chunks fit, documents do not
    with running(server) as url:
        chosen = settings(base_url=url, max_documents=3)
        with pytest.raises(ValueError, match=r"no document gave a pair(.|\n)*context length +3\n"):
            run(chosen)
        assert not Path(chosen.output, PAIRS).exists()
        asked = server.seen.total()
        run_task(chosen)
        assert server.seen.total() == asked, "a dropped document is finished work too"


def test_a_server_that_is_down_stops_the_run_and_keeps_what_was_answered(
    clean: Clean, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_engine, "_FIRST_PAUSE_S", 0.02)
    server = ChatServer(latency_s=0.005, down_after=40)
    with running(server) as url:
        chosen = settings(base_url=url, max_retries=1, concurrency=4)
        prepare_output(chosen)
        with pytest.raises(EngineError, match=r"also after asking 2 times; what has been answered is kept"):
            run_task(chosen)
        server.down_after = None
        assert run(chosen) == clean.pairs
    # Asked again were at most those whose answers were on their way when the run stopped.
    assert sum(count - 1 for count in server.answered.values()) <= chosen.concurrency


def test_failed_documents_can_be_skipped(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_engine, "_FIRST_PAUSE_S", 0.01)
    server = ChatServer(faults=("500",), fault_every=40)
    with running(server) as url:
        chosen = settings(base_url=url, max_retries=0, skip_failed_documents=True)
        run(chosen)
    dropped = report(chosen)["documents"]["dropped"]
    assert 1 <= dropped["request_failed"] < NUM_DOCUMENTS


def test_the_key_is_sent_and_never_shown(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    key = "sk-very-secret"
    with running(ChatServer(key=key)) as url:
        chosen = settings(base_url=url, max_documents=2)
        monkeypatch.setenv("OPENAI_API_KEY", key)
        run(chosen)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-another")
        wrong = settings(base_url=url, max_documents=2, output=chosen.output + "-wrong")
        with pytest.raises(
            EngineError, match=r"HTTP 401: invalid key Bearer …; set the environment variable OPENAI_API"
        ):
            run(wrong)
    written = [path.read_bytes() for path in Path(chosen.output).parent.rglob("*") if path.is_file()]
    assert not any(b"sk-" in content for content in written)
    assert "sk-" not in "".join(capfd.readouterr())


def test_a_model_that_is_not_served(settings: Settings) -> None:
    with (
        running(ChatServer()) as url,
        pytest.raises(EngineError, match=r"does not serve --model other; it serves words"),
    ):
        run(settings(base_url=url, model="other"))


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


def test_results_wait_for_every_task(settings: Settings) -> None:
    with running(ChatServer()) as url:
        chosen = settings(base_url=url, num_tasks=2)
        prepare_output(chosen)
        run_task(chosen, 0)
        with pytest.raises(ValueError, match=r"task 1 of 2 has not run; start it with --task 1"):
            write_results(chosen)


def command(settings: GenerationSettings) -> list[str]:
    flags = ["--documents", *settings.documents, "--output", settings.output, "--engine", settings.engine]
    flags += ["--model", settings.model, "--base-url", str(settings.base_url)]
    flags += [
        "--tokenizer-model",
        str(settings.tokenizer_model),
        "--no-progress",
        "--concurrency",
        str(settings.concurrency),
    ]
    for name, value in LENGTHS.items():
        flags += [f"--{name.replace('_', '-')}", str(value)]
    return [sys.executable, "tools/generate_pairs.py", *flags]


def test_interrupted_and_killed_it_goes_on_and_ends_in_the_same_bytes(clean: Clean, settings: Settings) -> None:
    server = ChatServer(latency_s=0.01)
    with running(server) as url:
        chosen = settings(base_url=url, concurrency=4)
        words = command(chosen)
        for answers, signal_number in ((15, signal.SIGINT), (60, signal.SIGKILL)):
            process = subprocess.Popen(words, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
            while server.answered.total() < answers:
                assert process.poll() is None
                time.sleep(0.002)
            process.send_signal(signal_number)
            _, stderr = process.communicate(timeout=30)
            if signal_number == signal.SIGINT:
                assert process.returncode == 130
                assert (
                    stderr == "generate_pairs.py: stopped; what has been answered is kept, the same command goes on\n"
                )
        finished = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr
        assert "documents with pairs" in finished.stdout
        assert Path(chosen.output, PAIRS).read_bytes() == clean.pairs
        # Asked again were those whose answers were on their way, or not yet written down.
        assert sum(count - 1 for count in server.answered.values()) <= 2 * (chosen.concurrency + 2)
        # A second run asks nothing.
        total = server.seen.total()
        assert main(words[2:]) == 0
        assert server.seen.total() == total
