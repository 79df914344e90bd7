"""The pipeline's two steps, for datatrove's executors or for this process: read the documents, ask the engine.

    pipeline = generation_pipeline(settings)
    run_task(settings, task=0)                                              # in this process
    SlurmPipelineExecutor(pipeline=pipeline, tasks=settings.num_tasks, …)   # or on a cluster, or with Ray

datatrove's `InferenceRunner` gives the loop over documents, the requests in flight and their cache.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.inference.run_inference import InferenceConfig, InferenceRunner
from datatrove.pipeline.inference.types import InferenceError, InferenceResult, ServerError
from loguru import logger

from megatron_longpo.data.parallel import ordered_map
from megatron_longpo.files import exclusive_lock
from megatron_longpo.generation.corpus import CorpusDocument, make_planner, read_corpus
from megatron_longpo.generation.engine import Answer, EngineError, Request
from megatron_longpo.generation.interrupts import interrupts_cancel_this_task
from megatron_longpo.generation.language import load_model
from megatron_longpo.generation.progress import Progress
from megatron_longpo.generation.prompts import prompt_writer
from megatron_longpo.generation.refusals import document_error
from megatron_longpo.generation.rollout import DocumentPlan, Outcome, Rollout
from megatron_longpo.generation.settings import OPENAI, GenerationSettings
from megatron_longpo.generation.store import (
    STATE,
    StoredOutcomes,
    TaskStore,
    damage_named,
    finished_mark,
    store_file,
    task_folder,
)


def generation_pipeline(settings: GenerationSettings) -> list[PipelineStep]:
    """The steps, for an executor with ``tasks=settings.num_tasks``; `output.write_results` comes after all tasks."""
    return [ReadDocuments(settings), PairsRunner(settings)]


def run_task(settings: GenerationSettings, task: int = 0) -> None:
    """Run one task in this process.

    Raises:
        ValueError: A flag, file or document is unusable, or another process works on the task.
        EngineError: The engine cannot answer; what it has answered is kept.
    """
    data: Any = None
    for step in generation_pipeline(settings):
        data = step.run(data, task, settings.num_tasks)


class ReadDocuments(PipelineStep):
    """Every ``world_size``-th document of the corpus, beginning with the task's number."""

    name = "Long documents"
    type = "Reader"

    def __init__(self, settings: GenerationSettings) -> None:
        super().__init__()
        self.settings = settings

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """The documents of task ``rank`` of ``world_size``, with their place in the corpus."""
        for document in read_corpus(self.settings):
            if document.index % world_size == rank:
                yield Document(document.text, document.id, metadata={"index": document.index})


class PairsRunner(InferenceRunner):
    """Turns documents into outcomes, many at a time."""

    name = "Preference pairs"

    def __init__(self, settings: GenerationSettings) -> None:
        self.settings = settings
        served = settings.engine == OPENAI
        super().__init__(
            self._roll_out,
            InferenceConfig(
                server_type="custom",
                model_name_or_path=settings.model,
                # The embedded engine computes one document's requests at a time, while the next document is prepared.
                max_concurrent_generations=settings.concurrency if served else 1,
                # A document has at least one request in flight or waiting, so this many documents keep all busy.
                max_concurrent_documents=settings.concurrency if served else 2,
            ),
            output_writer=nullcontext(),
        )
        self.request_cache = TaskStore(Path(settings.output, STATE))
        self.checkpoint_manager = StoredOutcomes(self.request_cache)
        self._rollout = Rollout(settings, prompt_writer(settings))
        self._planner: Callable[[CorpusDocument], DocumentPlan] | None = None
        self._progress: Progress | None = None

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> None:
        """Bring every document of a task to its outcome; raises what `run_task` does."""
        output = self.settings.output
        complaint = (
            f"--output {output}: another process is working on task {rank} of {world_size} there; wait "
            "for it, stop it, or give another folder"
        )
        if self.settings.num_workers == 1:
            self._planner = make_planner(self.settings)
        if "language" in self.settings.filters:
            load_model()
        # What is loaded stays: the collector need not look through it again while requests wait.
        gc.freeze()
        lock = exclusive_lock(task_folder(output, rank) / "lock", complaint)
        with lock, damage_named(store_file(output, rank)), Progress(self.settings, rank) as self._progress:
            try:
                super().run(data, rank, world_size)
            except ServerError as error:
                raise EngineError(str(error.error)) from error
            except InferenceError as error:
                # datatrove wraps what comes out of a document's rollout.
                if isinstance(error.error, Exception):
                    raise error.error from error
                raise
        finished_mark(output, rank).touch()

    async def run_async(self, *arguments: Any, **named: Any) -> None:
        """Answer all documents of a task; the error of the first that fails is raised."""
        asyncio.get_running_loop().set_exception_handler(_log_what_nobody_awaits)
        with interrupts_cancel_this_task():
            await super().run_async(*arguments, **named)

    def _init_server(self, rank: int) -> Any:
        if self.settings.engine == OPENAI:
            from megatron_longpo.generation.http_engine import HttpEngine

            return HttpEngine(self.settings)
        from megatron_longpo.generation.transformers_engine import TransformersEngine

        return TransformersEngine(self.settings)

    def _async_data_gen(self, sync_gen: Iterable[Document]) -> AsyncIterator[Document]:
        return super()._async_data_gen(self._planned(sync_gen))

    def _planned(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Documents without an outcome, measured and cut into chunks; runs in a thread beside the requests."""
        unfinished = self._unfinished(documents)
        plans: Iterable[DocumentPlan]
        if self._planner is not None:
            plans = map(self._planner, unfinished)
        else:
            plans = ordered_map(make_planner, (self.settings,), unfinished, self.settings.num_workers)
        for plan in plans:
            yield Document(plan.text, plan.id, metadata={"plan": plan})

    def _unfinished(self, documents: Iterable[Document]) -> Iterator[CorpusDocument]:
        assert self._progress is not None
        for document in documents:
            if document.id in self.request_cache.finished:
                self._progress.was_finished()
            else:
                yield CorpusDocument(document.metadata["index"], document.id, document.text)

    async def _roll_out(self, document: Document, generate: Any) -> Outcome:
        async def single(request: Request) -> Answer:
            return _answer(await generate(_chat_payload(request)))

        async def ask(requests: Sequence[Request]) -> list[Answer]:
            """The answers to a document's requests, in their order; EngineError if the engine cannot answer."""
            try:
                if self.settings.engine == OPENAI:
                    # Started one right after the other: a server gets the requests of a document together, and computes
                    # what their prompts share once.
                    results = await asyncio.gather(*map(single, requests), return_exceptions=True)
                    for result in results:
                        if isinstance(result, BaseException):
                            raise result
                    return [result for result in results if isinstance(result, Answer)]
                reply = await generate({"requests": [vars(request) for request in requests]})
                return [Answer(**answer) for answer in reply.usage["answers"]]
            except ServerError as error:
                raise EngineError(str(error.error)) from error
            except InferenceError as error:
                raise document_error(error) or error from error

        document.metadata["started"] = time.monotonic()
        return await self._rollout(document.metadata["plan"], ask)

    async def _save_document(
        self, document: Document, output_writer_context: Any, rank: int, chunk_index: int, **_: Any
    ) -> None:
        # datatrove's own logs a document that cannot be written and goes on without it.
        outcome: Outcome = document.metadata[self.metadata_key][0]
        await self.request_cache.store_outcome(outcome, time.monotonic() - document.metadata["started"])
        if outcome.dropped:
            logger.info(f"document {outcome.id!r}: {outcome.dropped}")
        assert self._progress is not None
        self._progress.finished(outcome)


def _log_what_nobody_awaits(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Where the engine fails, all documents in flight do. One stops the run; asyncio would print the others over it."""
    if "never retrieved" in context["message"] and "exception" in context:
        logger.info(f"also failed: {context['exception']}")
    else:
        loop.default_exception_handler(context)


def _chat_payload(request: Request) -> dict[str, Any]:
    payload: dict[str, Any] = {
        "messages": [{"role": "user", "content": request.prompt}],
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        # Servers take what a request leaves out from the model's generation_config.json. A penalty there, 1.05 for
        # Qwen2.5, counts the prompt's tokens too: it would keep an answer from the words of its document.
        "repetition_penalty": 1.0,
        # For Qwen3's chat template and others like it: a thought is no part of an answer.
        "chat_template_kwargs": {"enable_thinking": False},
        "text_tokens": request.text_tokens,
    }
    if request.temperature > 0:
        payload |= {"top_p": request.top_p, "seed": request.seed}
    if request.whole_document:
        payload["whole_document"] = True
    return payload


def _answer(result: InferenceResult) -> Answer:
    usage = result.usage or {}
    return Answer(
        result.text,
        result.finish_reason == "length",
        int(usage.get("prompt_tokens") or 0),
        int(usage.get("completion_tokens") or 0),
        "" if result.finish_reason in ("stop", "length") else result.finish_reason,
    )
