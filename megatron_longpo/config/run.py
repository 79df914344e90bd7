"""The configuration of one run: all groups together, and its way to and from flat dictionaries, YAML and flags."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_longpo.config.checkpoint import CheckpointConfig
from megatron_longpo.config.data import DataConfig, TokenizerConfig
from megatron_longpo.config.field import AUTO, ConfigError, Window, flag_of
from megatron_longpo.config.flags import FLAGS, GROUPS, nearest, show, without_effect
from megatron_longpo.config.logs import LoggingConfig
from megatron_longpo.config.model import ModelConfig
from megatron_longpo.config.objective import ObjectiveConfig
from megatron_longpo.config.optimizer import OptimizerConfig
from megatron_longpo.config.parallel import ParallelConfig
from megatron_longpo.config.planning import PlanningConfig
from megatron_longpo.config.training import TrainingConfig
from megatron_longpo.config.yaml_file import to_yaml
from megatron_longpo.files import atomic_writer

FP8_ROWS = 16


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run does.

    Args:
        explicit: Keys of the flags that were given on the command line or in a YAML file; not part of equality.
        source_model: The checkpoint's own model, once it is known (`with_reference_of`); not part of equality.
    """

    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    planning: PlanningConfig = field(default_factory=PlanningConfig)
    explicit: frozenset[str] = field(default=frozenset(), compare=False)
    source_model: ModelConfig | None = field(default=None, compare=False)

    @property
    def awaits_model(self) -> bool:
        """Whether a checkpoint still has to give the model's shape, by `with_model`."""
        return self.checkpoint.gives_model and self.source_model is None

    @property
    def reference_rotary_base(self) -> float:
        """RoPE base of the reference model: as given, else the checkpoint's own; for ``dpo`` the one trained with."""
        if not self.has_effect("reference_rotary_base"):
            return self.model.rotary_base
        given = self.objective.reference_rotary_base
        return given if given is not None else (self.source_model or self.model).rotary_base

    @property
    def reference_window_size(self) -> Window:
        """Sliding window of the reference model: as given, else the checkpoint's own; for ``dpo`` that of training."""
        if not self.has_effect("reference_window_size"):
            return self.model.window_size
        given = self.objective.reference_window_size
        return given if given is not None else (self.source_model or self.model).window_size

    @property
    def reference_rope(self) -> ModelConfig:
        """RoPE of the reference model: the base above, the checkpoint's own scaling; for ``dpo`` as trained with."""
        own = self.source_model if self.has_effect("reference_rotary_base") else None
        return dataclasses.replace(own or self.model, rotary_base=self.reference_rotary_base)

    @property
    def window_note(self) -> str | None:
        """What a user may not expect of a window, which a checkpoint may have brought; None if it cuts nothing off."""
        window, length = self.model.window_size, self.data.seq_length
        if window.num_tokens is None or window.num_tokens >= length:
            return None
        return (
            f"note: a token attends to the last {window.num_tokens} tokens of its --seq-length {length} "
            f"(--window-size {window}); --window-size full trains with full attention"
        )

    def num_microbatches(self, world_size: int) -> int:
        """Rows that every rank computes for one optimizer step."""
        rows = self.training.micro_batch_size * self.parallel.data_parallel_size(world_size)
        return self.training.global_batch_size // rows

    @property
    def layers_per_chunk(self) -> int:
        """Layers of one model chunk: of a pipeline stage, or with the interleaved schedule of a virtual one."""
        of_stage = self.model.num_layers // self.parallel.pipeline_model_parallel_size
        return self.parallel.num_layers_per_virtual_pipeline_stage or of_stage

    @property
    def num_virtual_stages(self) -> int | None:
        """Model chunks of a pipeline rank with the interleaved schedule, or None for 1F1B."""
        if self.parallel.num_layers_per_virtual_pipeline_stage is None:
            return None
        return self.model.num_layers // self.parallel.pipeline_model_parallel_size // self.layers_per_chunk

    @property
    def row_multiple(self) -> int:
        """`RowLayout.row_multiple`: that of the parallel layout, and with fp8 whole blocks on every rank.

        Transformer Engine multiplies fp8 matrices of a multiple of 16 rows only (``get_fp8_align_size`` in
        ``megatron.core.fp8_utils``), and in the weights' gradients tokens are rows.
        """
        if self.training.fp8_format is None:
            return self.parallel.row_multiple
        return math.lcm(self.parallel.row_multiple, FP8_ROWS * self.parallel.context_parallel_size)

    def to_flat_dict(self) -> dict[str, Any]:
        """Every value by the key of its flag, as plain JSON and YAML types."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in _values(self).items()}

    @classmethod
    def from_flat_dict(cls, values: Mapping[str, Any], explicit: Collection[str] = ()) -> RunConfig:
        """The configuration with these values, and the defaults for the rest.

        Raises:
            ConfigError: Keys that are no flags, or values that are not of the flag's type or range.
        """
        errors, groups = [], {group: {} for group in GROUPS}  # type: ignore[var-annotated]
        for key, value in values.items():
            if key not in FLAGS:
                errors.append(f"{key} is not a flag's key{nearest(key, FLAGS)}")
                continue
            spec = FLAGS[key]
            try:
                groups[spec.group][spec.field] = spec.convert(value)
            except ValueError as error:
                errors.append(f"{flag_of(key)} {error}")
        if errors:
            raise ConfigError(*errors)
        return cls(**{group: GROUPS[group](**fields) for group, fields in groups.items()}, explicit=frozenset(explicit))

    def undecided(self) -> set[str]:
        """Keys of the flags whose value is not final: those of the model, while it awaits its checkpoint."""
        if not self.awaits_model:
            return set()
        return {key for key, spec in FLAGS.items() if spec.group == "model"} - self.explicit

    def has_effect(self, key: str) -> bool:
        """Whether a flag's value is used, beside the values of the other flags."""
        return bool(self.with_effect([key]))

    def with_effect(self, keys: Iterable[str]) -> set[str]:
        """Those of the flags whose values are used, beside the values of the others."""
        values, undecided = _values(self), self.undecided()
        return {key for key in keys if all(need.holds(values, undecided) for need in FLAGS[key].info.needs)}

    def to_yaml(self) -> str:
        """A YAML text that ``--config`` reads back to an equal configuration.

        Flags without effect are in it as comments, and what a checkpoint still has to decide is not in it.
        """
        undecided = self.undecided()
        values = {key: value for key, value in _values(self).items() if key not in undecided}
        return to_yaml(values, self.with_effect(values))

    def dump_yaml(self, path: str | Path) -> None:
        """Write `to_yaml` to a file, whole or not at all."""
        with atomic_writer(path) as file:
            file.write(self.to_yaml())

    def model_flags(self) -> list[str]:
        """The command line that makes the same model."""
        words: list[str] = []
        model = {key: spec for key, spec in FLAGS.items() if spec.group == "model"}
        effective = self.with_effect(model)
        for key, spec in model.items():
            value = getattr(self.model, spec.field)
            if value != spec.default and key in effective:
                words += [spec.flag] if spec.kind is bool else [spec.flag, show(value)]
        return words

    def with_model(self, model: ModelConfig, source: str = "the checkpoint") -> RunConfig:
        """The configuration with a checkpoint's model.

        Flags of the model that were given must agree with it. Only those that need no other weights may differ, and
        then win: rotary base and scaling, window, length, padding of the vocabulary, standard deviation of new weights.
        The reference model keeps the checkpoint's rotary scaling, its rotary base unless ``--reference-rotary-base``
        was given, and its window unless ``--reference-window-size`` was.

        Args:
            model: What the checkpoint holds.
            source: Names the checkpoint in error messages.

        Raises:
            ConfigError: Given flags disagree with the checkpoint, or have no effect on its model.
        """
        errors, changes = [], {}
        for key in sorted(self.explicit):
            spec = FLAGS[key]
            if spec.group != "model":
                continue
            ours, theirs = getattr(self.model, spec.field), getattr(model, spec.field)
            if ours != theirs and not spec.info.changeable:
                errors.append(
                    f"{flag_of(key)} {show(ours)} disagrees with {source}, which has {show(theirs)}; remove the flag"
                )
            changes[spec.field] = ours
        if errors:
            raise ConfigError(*errors)
        merged = dataclasses.replace(model, **changes)
        config = dataclasses.replace(self.with_reference_of(model), model=merged)
        config.refuse_flags_without_effect()
        # A changed position embedding leaves the scaling of the checkpoint's own behind.
        values, undecided = _values(config), config.undecided()
        unused = {
            spec.field: spec.default
            for spec in FLAGS.values()
            if spec.group == "model" and not all(need.holds(values, undecided) for need in spec.info.needs)
        }
        return dataclasses.replace(config, model=dataclasses.replace(merged, **unused))

    def with_reference_of(self, model: ModelConfig) -> RunConfig:
        """The configuration whose reference model is a checkpoint's, in all that its flags do not say."""
        objective = self.objective
        if objective.reference_rotary_base is None and self.has_effect("reference_rotary_base"):
            objective = dataclasses.replace(objective, reference_rotary_base=model.rotary_base)
        if objective.reference_window_size is None and self.has_effect("reference_window_size"):
            objective = dataclasses.replace(objective, reference_window_size=model.window_size)
        return dataclasses.replace(self, objective=objective, source_model=model)

    def with_device_defaults(
        self, transformer_impl: str, distributed_backend: str, attention_backend: str = AUTO
    ) -> RunConfig:
        """The configuration with what the device decides in place of ``auto``: `platform.device_defaults`.

        Raises:
            ConfigError: Given flags have no effect with it (``--fp8-format`` with ``local`` layers).
        """
        training, parallel = self.training, self.parallel
        if training.transformer_impl == AUTO:
            training = dataclasses.replace(training, transformer_impl=transformer_impl)
        if training.attention_backend == AUTO:
            training = dataclasses.replace(training, attention_backend=attention_backend)
        if parallel.distributed_backend == AUTO:
            parallel = dataclasses.replace(parallel, distributed_backend=distributed_backend)
        config = dataclasses.replace(self, training=training, parallel=parallel)
        config.refuse_flags_without_effect()
        return config

    def refuse_flags_without_effect(self, origins: Mapping[str, str] | None = None) -> None:
        """Raise ConfigError where a given flag has no effect beside the others.

        Args:
            origins: How to name the given flags, by key (`flags.without_effect`).
        """
        if origins is None:
            origins = {key: FLAGS[key].flag for key in FLAGS if key in self.explicit}
        errors = without_effect(_values(self), origins, self.undecided())
        if errors:
            raise ConfigError(*errors)


def _values(config: RunConfig) -> dict[str, Any]:
    return {key: getattr(getattr(config, spec.group), spec.field) for key, spec in FLAGS.items()}
