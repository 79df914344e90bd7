"""Sizes and combinations that cannot run, found before anything is built: all of them at once, each with its fix."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_longpo.config import ConfigError, RunConfig
from megatron_longpo.config.flags import FLAGS
from megatron_longpo.validation import parallel, sizes, training
from megatron_longpo.validation.multiples import nearest_multiple

__all__ = ["nearest_multiple", "validate"]


def validate(config: RunConfig, world_size: int) -> None:
    """Raise where a configuration cannot run on this many ranks.

    Args:
        config: With its model (`RunConfig.with_model`) if a checkpoint gives it.
        world_size: Number of ranks.

    Raises:
        ConfigError: One line for every mistake.
    """
    errors = list(_ranges(config))
    # Divisions below assume sizes of at least 1.
    if not errors:
        for check in (*sizes.CHECKS, *parallel.CHECKS, *training.CHECKS):
            errors += check(config, world_size)
    if errors:
        raise ConfigError(*errors)


def _ranges(config: RunConfig) -> Iterator[str]:
    for key, value in config.to_flat_dict().items():
        try:
            FLAGS[key].convert(value)
        except ValueError as error:
            yield f"{FLAGS[key].flag} {error}"
