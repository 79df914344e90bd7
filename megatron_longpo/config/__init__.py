"""The configuration of a run: frozen dataclasses from which the flags, the help page and the YAML keys are made."""

from megatron_longpo.config.checkpoint import CheckpointConfig
from megatron_longpo.config.data import DataConfig, TokenizerConfig
from megatron_longpo.config.field import ConfigError, Window
from megatron_longpo.config.logs import LoggingConfig
from megatron_longpo.config.model import ModelConfig
from megatron_longpo.config.objective import ObjectiveConfig
from megatron_longpo.config.optimizer import OptimizerConfig
from megatron_longpo.config.parallel import ParallelConfig
from megatron_longpo.config.planning import PlanningConfig
from megatron_longpo.config.run import RunConfig
from megatron_longpo.config.training import TrainingConfig

__all__ = [
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "LoggingConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PlanningConfig",
    "RunConfig",
    "TokenizerConfig",
    "TrainingConfig",
    "Window",
]
