"""The training run: reference pass, steps, evaluation, checkpoints, leaving in order."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from tqdm import tqdm

from megatron_longpo import platform
from megatron_longpo.config import RunConfig
from megatron_longpo.data.dataset import PreferenceDataset
from megatron_longpo.data.sampler import GlobalBatchSampler
from megatron_longpo.model.build import build_model, unwrap, wrap_for_training
from megatron_longpo.model.flops import step_flops
from megatron_longpo.processes import one_voice_on_ctrl_c
from megatron_longpo.ranges import DATA, OPTIMIZER, named_range
from megatron_longpo.training.checkpoint import Checkpointer, Progress
from megatron_longpo.training.data import GlobalBatch, MicroBatches, check_lengths, training_batches
from megatron_longpo.training.distributed import any_rank, is_rank_0
from megatron_longpo.training.evaluation import evaluate
from megatron_longpo.training.initial import load_initial_state
from megatron_longpo.training.leaving import Leaving, interrupted_text
from megatron_longpo.training.optimizer import build_optimizer, build_scheduler
from megatron_longpo.training.profiling import StepProfiler
from megatron_longpo.training.reference import reference_logprobs
from megatron_longpo.training.reporting import Reporter, interval_means
from megatron_longpo.training.step import gradients_are_finite, run_global_batch


class Trainer:
    """Everything one run needs on one rank; `train` runs it.

    Args:
        config: A validated run, with its model's shape.
        dataset: The whole dataset.

    The process group and Megatron's parallel state must be up (`distributed.initialize`).
    """

    def __init__(self, config: RunConfig, dataset: PreferenceDataset) -> None:
        self.config, self.dataset = config, dataset
        train, held_out = self.dataset.split(config.data.split)
        self.train_numbers, self.eval_numbers = train.tolist(), held_out.tolist()
        check_lengths(config, dataset, self.train_numbers, self.eval_numbers)
        self.total_samples, self.total_steps = self._duration()
        self.chunks: list[Any] = build_model(config)
        self.optimizer: Any = None
        self.scheduler: Any = None
        if not config.training.skip_train:
            self.chunks = wrap_for_training(config, self.chunks)
            self.optimizer = build_optimizer(config, self.chunks)
            self.scheduler = build_scheduler(config, self.optimizer, self.total_samples)
            self._connect_schedule()
        self.checkpointer = Checkpointer(config, self.chunks, self.optimizer, self.scheduler)
        self.progress = load_initial_state(config, self.checkpointer)
        self.profiler = StepProfiler(config, map(unwrap, self.chunks), dist.get_rank())
        self.unreported: list[tuple[dict[str, float], bool]] = []

    def train(self) -> Progress:
        """Run to the end, or to the first reason to leave; with ``--skip-train`` evaluate only. Returns where it is."""
        config, progress = self.config, self.progress
        with one_voice_on_ctrl_c(self._say_interrupted):
            reference = None
            if config.objective.needs_reference:
                self._require_reference_weights()
                with self.whole_weights():
                    reference, progress.reference_fingerprint = reference_logprobs(
                        config, self.dataset, self.chunks, progress.reference_fingerprint
                    )
            micro_batches = MicroBatches(config, self.dataset, reference)
            trains = not config.training.skip_train
            if trains:
                self.sampler = self._sampler()
            reporter = Reporter(config, is_rank_0(), self.total_steps, progress.iteration)
            try:
                if trains:
                    self._train(reporter, micro_batches)
                else:
                    self._maybe_evaluate(reporter, micro_batches, last=True)
            finally:
                reporter.close()
        return progress

    def _require_reference_weights(self) -> None:
        """Refuse to take weights for the reference model that a run without one has trained already."""
        progress, objective = self.progress, self.config.objective.objective
        if progress.iteration > 0 and progress.reference_fingerprint is None:
            raise ValueError(
                f"the run in --load {self.config.checkpoint.load} is at iteration {progress.iteration} of an objective "
                f"without a reference model, and --objective {objective} has one, the model before training. Give the "
                "run's checkpoint as --pretrained-checkpoint, with another --save, to train from it and compare with it"
            )

    def _train(self, reporter: Reporter, micro_batches: MicroBatches) -> None:
        config, progress = self.config, self.progress
        if progress.iteration >= self.total_steps:
            reporter.print(f"nothing is left to train: the run has made all of its {self.total_steps} steps")
        skipped_in_a_row = 0
        with Leaving(config.training) as leaving:
            batches = training_batches(micro_batches, self.sampler)
            while progress.iteration < self.total_steps:
                with self.profiler.step(progress.iteration + 1):
                    began = time.perf_counter()
                    with named_range(DATA):
                        batch = next(batches)
                    waited = time.perf_counter() - began
                    metrics, bad = self._step(batch)
                metrics["data_time_s"] = waited
                self.checkpointer.finish(blocking=False)
                skipped_in_a_row = skipped_in_a_row + 1 if bad is not None else 0
                self._report(reporter, metrics, bad)
                if skipped_in_a_row > config.training.max_skipped_steps:
                    self._report_interval(reporter)
                    self.checkpointer.finish(blocking=True)  # what is being written is of an earlier, good step
                    raise FloatingPointError(
                        f"{skipped_in_a_row} steps in a row had a loss or gradient that is not finite "
                        f"(--max-skipped-steps {config.training.max_skipped_steps}); samples of the last one: "
                        f"{', '.join(bad or [])}. Lower --lr, look at these samples, or resume from a checkpoint"
                    )
                last = progress.iteration >= self.total_steps
                reason = leaving.reason(progress.iteration)
                interval = config.checkpoint.save_interval
                due = interval and progress.iteration % interval == 0
                if config.checkpoint.save and (last or reason is not None or due):
                    self._save(reporter)
                # After saving: it may take longer than a scheduler leaves to a run.
                if reason is None or not reason.urgent:
                    self._maybe_evaluate(reporter, micro_batches, last)
                if reason is not None and not last:
                    self._report_interval(reporter)
                    saved = "it is saved" if config.checkpoint.save else "nothing is saved without --save"
                    reporter.print(f"leaving after iteration {progress.iteration}: {reason.text}; {saved}")
                    break
            self.checkpointer.finish(blocking=True)
        self.profiler.close()

    def _step(self, batch: GlobalBatch) -> tuple[dict[str, float], list[str] | None]:
        """One optimizer step. Returns its metrics, and the suspect samples' ids if the step was skipped."""
        config, progress = self.config, self.progress
        began = time.perf_counter()
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        means, bad_here = run_global_batch(config, self.chunks, batch, forward_only=False)
        self.profiler.synchronize()
        computed = time.perf_counter()
        bad: list[str] | None = None
        grad_norm = math.nan
        groups = self.optimizer.param_groups
        learning_rate = get_canonical_lr_for_logging(groups) or groups[0]["lr"]
        with named_range(OPTIMIZER):
            if any_rank(not (math.isfinite(means["loss"]) and gradients_are_finite(self.chunks))):
                bad = self._all_ids(bad_here) or [self.dataset[number].id for number in batch.numbers]
                progress.skipped_steps += 1
            else:
                _, norm, _ = self.optimizer.step()
                grad_norm = float(norm)
                self.scheduler.step(increment=config.training.global_batch_size)
        progress.iteration += 1
        progress.consumed_samples += config.training.global_batch_size
        platform.synchronize()
        own = {"learning_rate": learning_rate, "grad_norm": grad_norm}
        ended = time.perf_counter()
        own |= {"forward_backward_time_s": computed - began, "optimizer_time_s": ended - computed}
        return means | own | self._performance(batch, ended - began), bad

    def _performance(self, batch: GlobalBatch, seconds: float) -> dict[str, float]:
        """Rates of one step, over all ranks, and the memory of the fullest one.

        Collectives: 1 all-reduce over data-parallel and context-parallel ranks, and 1 over all.
        """
        model, world = self.config.model, dist.get_world_size()
        first_cp = parallel_state.get_context_parallel_rank() == 0
        # Predictions are spread over context-parallel ranks, rows are on all of them.
        num_tokens = sum(b.num_tokens for b in batch.micro_batches) if first_cp else 0
        flops = sum(
            step_flops(model, b.layout, 0) * first_cp
            + 6.0 * model.hidden_size * model.vocab_size * len(b.predictions.targets)
            for b in batch.micro_batches
        )
        totals = torch.tensor([num_tokens, flops], dtype=torch.float64, device=platform.device())
        dist.all_reduce(totals, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        tokens, flops = totals.tolist()
        peak_gib = torch.tensor([platform.peak_memory_gib()], dtype=torch.float64, device=platform.device())
        dist.all_reduce(peak_gib, dist.ReduceOp.MAX)
        return {
            "iteration_time_s": seconds,
            "tokens_per_s_per_gpu": tokens / seconds / world,
            "tflops_per_gpu": flops / seconds / world / 1e12,
            "peak_memory_gib": peak_gib.item(),
        }

    def _report(self, reporter: Reporter, metrics: dict[str, float], bad: list[str] | None) -> None:
        progress = self.progress
        reporter.step_done()
        if bad is not None:
            shown = ", ".join(bad[:8]) + (", …" if len(bad) > 8 else "")
            reporter.print(f"iteration {progress.iteration} was skipped: loss or gradient is not finite in {shown}")
        self.unreported.append((metrics, bad is not None))
        if progress.iteration % self.config.logging.log_interval == 0 or progress.iteration == self.total_steps:
            self._report_interval(reporter)

    def _report_interval(self, reporter: Reporter) -> None:
        if not self.unreported:
            return
        means = interval_means(self.unreported)
        self.unreported.clear()
        reporter.report(self._counters() | means | {"skipped_steps": self.progress.skipped_steps})

    def _maybe_evaluate(self, reporter: Reporter, micro_batches: MicroBatches, last: bool) -> None:
        settings, progress = self.config.training, self.progress
        due = last or progress.iteration % settings.eval_interval == 0
        if not (due and settings.eval_iters and self.eval_numbers):
            return
        numbers = self.eval_numbers[: settings.eval_iters * settings.global_batch_size]
        with self.whole_weights():
            means = evaluate(self.config, self.chunks, micro_batches, numbers)
        reporter.report(self._counters() | means, prefix="eval/")

    def _say_interrupted(self) -> None:
        text = interrupted_text(self.config.checkpoint, self.progress.iteration, self.total_steps)
        tqdm.write(text, file=sys.stdout)  # above the progress bar
        sys.stdout.flush()

    def _counters(self) -> dict[str, float]:
        return {"iteration": self.progress.iteration, "consumed_samples": self.progress.consumed_samples}

    def _save(self, reporter: Reporter) -> None:
        progress = self.progress
        # The sampler itself has been read ahead of training.
        progress.sampler = self.sampler.state_dict() | {"consumed_samples": progress.consumed_samples}
        with self.whole_weights():
            folder = self.checkpointer.save(progress)
        verb = "saving" if self.config.checkpoint.async_save else "saved"
        reporter.print(f"{verb} checkpoint at iteration {progress.iteration} to {folder}")

    def _sampler(self) -> GlobalBatchSampler:
        settings, progress = self.config, self.progress
        lengths = self.dataset.row_tokens(settings.objective.turns)[self.train_numbers]
        sampler = GlobalBatchSampler(
            lengths,
            settings.training.global_batch_size,
            settings.training.seed,
            group_samples=settings.data.sampler_group_samples,
            documents=self.train_numbers,
        )
        if progress.sampler:
            sampler.load_state_dict(progress.sampler)
        return sampler

    def _duration(self) -> tuple[int, int]:
        """Documents and steps of the whole run."""
        settings = self.config.training
        if settings.train_iters is not None:
            return settings.train_iters * settings.global_batch_size, settings.train_iters
        samples = settings.train_samples or settings.train_epochs * len(self.train_numbers)
        steps = max(1, samples // settings.global_batch_size)
        return steps * settings.global_batch_size, steps

    def _connect_schedule(self) -> None:
        """Tell Megatron's schedules how this run reduces gradients and gathers parameters, as Megatron-LM does."""
        settings = self.chunks[0].config
        settings.finalize_model_grads_func = finalize_model_grads
        settings.grad_scale_func = self.optimizer.scale_loss
        one = len(self.chunks) == 1
        if self.config.parallel.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            settings.no_sync_func = no_sync[0] if one else no_sync

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Every rank's weights are complete inside: what ``--overlap-param-gather`` put off is done first."""
        overlap = self.config.parallel.overlap_param_gather and not self.config.training.skip_train
        if overlap:
            for chunk in self.chunks:
                chunk.disable_forward_pre_hook(param_sync=True)
        try:
            yield
        finally:
            if overlap:
                for chunk in self.chunks:
                    chunk.enable_forward_pre_hook()

    def _all_ids(self, ids: list[str]) -> list[str]:
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, ids)
        return sorted({name for part in gathered for name in part})
