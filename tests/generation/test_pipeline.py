"""The whole pipeline against a real HTTP server: its content, the same after faults and interruptions."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import dill
import pytest
from datatrove.executor import LocalPipelineExecutor

from benchmarks.generation.chat_server import MODEL, ChatServer, running
from megatron_longpo.generation import http_engine
from megatron_longpo.generation.command import main
from megatron_longpo.generation.engine import EngineError
from megatron_longpo.generation.output import PAIRS, REPORT, TIMINGS, prepare_output, write_results
from megatron_longpo.generation.runner import generation_pipeline, run_task
from megatron_longpo.generation.settings import GenerationSettings
from megatron_longpo.pairs import PreferenceDocument, read_pairs
from tests.generation.conftest import LENGTHS, NUM_DOCUMENTS, Settings
from tests.generation.runs import REPOSITORY, command, run


class Clean(NamedTuple):
    """A run without any trouble: its pairs file, what its server saw, and its folder."""

    pairs: bytes
    server: ChatServer
    output: Path


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
    faults = ("429", "500", "503", "cut", "garbage", "refuse", "hang", "abort", "cancelled")
    server = ChatServer(latency_s=0.001, faults=faults, fault_every=4)
    with running(server) as url:
        found = run(settings(base_url=url, request_timeout_s=1.0))
    assert found == clean.pairs
    assert len(server.retries_after) >= 2 * len(faults)


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


def test_interrupted_and_killed_it_goes_on_and_ends_in_the_same_bytes(
    clean: Clean, settings: Settings, capsys: pytest.CaptureFixture
) -> None:
    server = ChatServer(latency_s=0.01)
    with running(server) as url:
        chosen = settings(base_url=url, concurrency=4)
        words = command(chosen)
        # As a batch script starts it in the background, where Ctrl-C is for others.
        behind = ["sh", "-c", 'trap "" INT; exec "$@"', "sh"]
        for answers, signal_number, before in (
            (15, signal.SIGINT, []),
            (35, signal.SIGTERM, behind),
            (60, signal.SIGKILL, []),
        ):
            process = subprocess.Popen([*before, *words], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
            while server.answered.total() < answers:
                assert process.poll() is None
                time.sleep(0.002)
            process.send_signal(signal_number)
            _, stderr = process.communicate(timeout=8)
            if signal_number != signal.SIGKILL:
                assert process.returncode == 130
                assert (
                    stderr == "generate_pairs.py: stopped; what has been answered is kept, the same command goes on\n"
                )
        assert main(words[2:]) == 0
        assert "documents with pairs" in capsys.readouterr().out
        assert Path(chosen.output, PAIRS).read_bytes() == clean.pairs
        # Asked again were those whose answers were on their way, or not yet written down: on a busy machine several
        # rounds of answers wait for the disk. All of them would be 110.
        assert sum(count - 1 for count in server.answered.values()) <= 3 * 4 * chosen.concurrency
        # A second run asks nothing.
        total = server.seen.total()
        assert main(words[2:]) == 0
        assert server.seen.total() == total
