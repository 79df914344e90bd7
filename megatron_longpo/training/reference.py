"""The reference pass: log π_S of every response token, once, forward only, under the initial weights.

For ``longpo`` and ``sft-chosen-constraint`` every turn stands alone on its own short prompt, evaluated with the
reference RoPE and window; for ``dpo`` the rows are the training rows. Chosen and rejected share their prompt here
too.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from tqdm import tqdm

from megatron_longpo.config import RunConfig
from megatron_longpo.data.batch import Batch, collate
from megatron_longpo.data.dataset import PreferenceDataset
from megatron_longpo.files import folder_lock, problem_of_writing
from megatron_longpo.model.build import unwrap
from megatron_longpo.training.distributed import is_rank_0, require_shared
from megatron_longpo.training.fingerprint import rope_scaling_mark, weights_fingerprint
from megatron_longpo.training.sidecar import ReferenceKey, ReferenceLogprobs, SidecarWriter, TurnLogps, sidecar_folder
from megatron_longpo.training.step import run_schedule

_FLUSH_S = 60.0
"""A killed pass loses at most this much work."""


def reference_kind(config: RunConfig) -> str:
    """Which rows the objective's reference is evaluated on."""
    return f"long-{config.objective.turns}" if config.objective.objective == "dpo" else "short"


def check_reference_folder(config: RunConfig) -> None:
    """Refuse, before weights are read, a place where a pass that has yet to run could not write.

    Raises:
        ValueError: It cannot be written.
    """
    folder = reference_folder(config)
    if not (folder / "manifest.json").exists():
        _require_writable(folder, create=False)


def reference_folder(config: RunConfig) -> Path:
    """Where the reference log-probs of a run lie."""
    return sidecar_folder(config.data.data_path, reference_kind(config), config.objective.reference_dir)


def reference_key(config: RunConfig, dataset: PreferenceDataset, fingerprint: str) -> ReferenceKey:
    """What the reference log-probs of this run depend on."""
    return ReferenceKey(
        kind=reference_kind(config),
        dataset=dataset.hash,
        weights=fingerprint,
        rotary_base=float(config.reference_rotary_base),
        dtype="bf16" if config.training.bf16 else "fp32",
        window_tokens=config.reference_window_size.num_tokens,
    )


def reference_logprobs(
    config: RunConfig, dataset: PreferenceDataset, chunks: list[torch.nn.Module], fingerprint: str | None
) -> tuple[ReferenceLogprobs, str]:
    """The reference log-probs of a dataset: those on disk if they fit, else computed now.

    Args:
        config: The run.
        dataset: The whole dataset, held-out documents included.
        chunks: This rank's model chunks, holding the reference weights unless ``fingerprint`` is given.
        fingerprint: That of the reference weights, for a resumed run, whose own weights have moved on.

    Returns:
        The log-probs, and the fingerprint of the reference weights.

    Raises:
        ValueError: Those on disk were made from something else, or there are none and the weights have moved on, or
            another run is computing them.
    """
    folder = reference_folder(config)
    resumed = fingerprint is not None
    # A scaled RoPE makes another model of the same weights.
    fingerprint = fingerprint or weights_fingerprint(chunks) + rope_scaling_mark(config.reference_rope)
    key = reference_key(config, dataset, fingerprint)
    # All ranks must decide alike, even if a file appears while they look. And the others must not look before the
    # folder is there: a network file system remembers for a minute that it was not.
    found = [is_rank_0() and (folder / "manifest.json").exists()]
    dist.broadcast_object_list(found, src=0)
    if not found[0]:
        if resumed:
            raise ValueError(
                f"{folder} holds no reference log-probs, and this run's weights have moved on from the reference "
                "model: run tools/compute_reference_logprobs.py with the flags of this run and the initial weights in "
                "--load or --load-hf"
            )
        with _alone_in(folder) if is_rank_0() else contextlib.nullcontext():
            require_shared(folder, "--reference-dir" if config.objective.reference_dir else "--data-path")
            compute_reference_logprobs(config, dataset, chunks, key, SidecarWriterOnRank0(folder, key, len(dataset)))
        dist.barrier()
    return ReferenceLogprobs(folder, key), fingerprint


def _alone_in(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Keep other passes out: one of other weights would remove this one's parts, and replace what it wrote."""
    _require_writable(folder)
    complaint = "another run is computing reference log-probs there; start again when it is done, to use them"
    return folder_lock(folder, f"{folder}: {complaint}, or give another --reference-dir")


def _require_writable(folder: Path, create: bool = True) -> None:
    if problem := problem_of_writing(folder / "probe", create):
        raise ValueError(f"{folder} cannot be written ({problem}): give another --reference-dir for the log-probs")


class SidecarWriterOnRank0:
    """A `SidecarWriter` on rank 0; the other ranks send it what they have."""

    def __init__(self, folder: Path, key: ReferenceKey, num_documents: int) -> None:
        self.writer = SidecarWriter(folder, key, num_documents) if is_rank_0() else None
        done = [self.writer.finished() if self.writer else None]
        dist.broadcast_object_list(done, src=0)
        self.finished: set[int] = done[0] or set()
        self.flushed_at = time.monotonic()

    def add(self, documents: dict[int, TurnLogps]) -> None:
        """Collect from all ranks: 1 gather of Python objects to rank 0."""
        gathered: list[Any] | None = [None] * dist.get_world_size() if self.writer else None
        dist.gather_object(documents, gathered, dst=0)
        if self.writer is None or gathered is None:
            return
        for part in gathered:
            for number, turns in part.items():
                self.writer.add(number, turns)
        if time.monotonic() - self.flushed_at > _FLUSH_S:
            self.writer.flush()
            self.flushed_at = time.monotonic()

    def close(self, complete: bool) -> None:
        """Write everything; with ``complete`` also the final files."""
        if self.writer is not None:
            self.writer.finish() if complete else self.writer.flush()


def compute_reference_logprobs(
    config: RunConfig,
    dataset: PreferenceDataset,
    chunks: list[torch.nn.Module],
    key: ReferenceKey,
    writer: SidecarWriterOnRank0,
) -> None:
    """Evaluate every document that has no log-probs yet, in like-length groups over the data-parallel ranks."""
    lengths = dataset.row_tokens(config.objective.turns)
    todo = sorted((n for n in range(len(dataset)) if n not in writer.finished), key=lambda n: -lengths[n])
    data_parallel = parallel_state.get_data_parallel_world_size()
    per_rank = max(1, config.training.global_batch_size // data_parallel)
    group = per_rank * data_parallel
    tokens, started = 0, time.monotonic()
    progress = tqdm(
        total=len(dataset),
        initial=len(dataset) - len(todo),
        desc=f"reference pass ({key.kind} prompts)",
        unit="document",
        disable=not is_rank_0() or config.logging.progress_bar == "off",
    )
    for chunk in chunks:
        chunk.eval()
    try:
        with torch.no_grad(), contextlib.ExitStack() as stack:
            for chunk in chunks:
                stack.enter_context(unwrap(chunk).as_reference(config.reference_rope, key.window_tokens))
            for start in range(0, len(todo), group):
                numbers = todo[start : start + group]
                # Every rank runs the same number of micro-batches; repeats at the end are computed twice.
                padded = numbers + [numbers[-1]] * (group - len(numbers))
                mine = padded[parallel_state.get_data_parallel_rank() :: data_parallel]
                batches = [_collate(config, dataset, number, key.kind) for number in mine]
                outputs = run_schedule(config, chunks, batches, _keep_logps, forward_only=True)
                writer.add(_on_one_rank(outputs))
                progress.update(len(numbers))
                tokens += sum(batch.num_tokens for batch in batches)
                progress.set_postfix_str(f"{tokens / (time.monotonic() - started):,.0f} tokens/s per rank")
    except BaseException:
        writer.close(complete=False)
        raise
    finally:
        for chunk in chunks:
            chunk.train()
        progress.close()
    writer.close(complete=True)


def _collate(config: RunConfig, dataset: PreferenceDataset, number: int, kind: str) -> Batch:
    return collate(
        dataset.short_rows(number) if kind == "short" else [dataset.row(number, config.objective.turns)],
        objective=None,
        cp_size=config.parallel.context_parallel_size,
        cp_rank=parallel_state.get_context_parallel_rank(),
        row_multiple=config.row_multiple,
        max_sequence_tokens=config.data.seq_length,
    )


def _keep_logps(batch: Batch, logps: torch.Tensor) -> tuple[Any, Any, Any]:
    count = logps.new_ones((), dtype=torch.int)
    return logps.sum(), count, (batch, logps.detach().float())


def _on_one_rank(outputs: list[tuple[Batch, torch.Tensor]]) -> dict[int, TurnLogps]:
    """Put each document's tokens in order: 1 all-gather over context-parallel ranks per micro-batch.

    Returns:
        By document number, on the first tensor- and context-parallel rank of the last stage; empty elsewhere.
    """
    documents: dict[int, TurnLogps] = {}
    for batch, logps in outputs:
        slot = batch.predictions.response_slot
        # Slots count documents of the row; in a row of short prompts these are the turns of one document.
        turns = (slot // 2 % batch.predictions.max_turns) * 2 + slot % 2
        own = (turns.cpu().numpy(), batch.response_offset.cpu().numpy(), logps.cpu().numpy())
        group = parallel_state.get_context_parallel_group()
        shards: list[Any] = [None] * group.size()
        dist.all_gather_object(shards, own, group=group)
        if group.rank() == 0 and parallel_state.get_tensor_model_parallel_rank() == 0:
            documents[batch.numbers[0]] = _ordered(*(np.concatenate(parts) for parts in zip(*shards, strict=True)))
    return documents


def _ordered(slots: Any, offsets: Any, logps: Any) -> TurnLogps:
    """Per turn the chosen and the rejected response's log-probs, in token order."""
    responses = []
    for slot in range(slots.max() + 1):
        here = slots == slot
        responses.append(logps[here][np.argsort(offsets[here])].astype(np.float32))
    return list(zip(responses[::2], responses[1::2], strict=True))
