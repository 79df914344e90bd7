"""The table of all flags, made from the configuration dataclasses, and the conversion of values to their types."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_longpo.config.checkpoint import CheckpointConfig
from megatron_longpo.config.data import DataConfig, TokenizerConfig
from megatron_longpo.config.field import FlagInfo, Window, flag_of
from megatron_longpo.config.logs import LoggingConfig
from megatron_longpo.config.model import ModelConfig
from megatron_longpo.config.objective import ObjectiveConfig
from megatron_longpo.config.optimizer import OptimizerConfig
from megatron_longpo.config.parallel import ParallelConfig
from megatron_longpo.config.planning import PlanningConfig
from megatron_longpo.config.training import TrainingConfig

GROUPS: dict[str, type] = {
    "objective": ObjectiveConfig,
    "data": DataConfig,
    "tokenizer": TokenizerConfig,
    "model": ModelConfig,
    "parallel": ParallelConfig,
    "training": TrainingConfig,
    "optimizer": OptimizerConfig,
    "checkpoint": CheckpointConfig,
    "logging": LoggingConfig,
    "planning": PlanningConfig,
}
"""The attributes of `RunConfig` in the order of the help page."""

LARGEST_INT = 2**63 - 1


@dataclass(frozen=True)
class FlagSpec:
    """One flag.

    Args:
        group: Attribute of `RunConfig` that holds the field.
        field: Name of the field.
        key: The flag without dashes, with underscores; also its key in YAML files and flat dictionaries.
        kind: ``int``, ``float``, ``str``, ``bool``, ``tuple`` or `Window`.
        item: Kind of a tuple's items, ``str`` or ``int``; the kind itself for others.
        optional: The value may be None.
        default: Value when not given.
        info: What the field's declaration says.
    """

    group: str
    field: str
    key: str
    kind: type
    item: type
    optional: bool
    default: Any
    info: FlagInfo

    @property
    def flag(self) -> str:
        """The flag as typed; a switch that is on by default is typed to turn it off."""
        return ("--no-" if self.default is True else "--") + self.key.replace("_", "-")

    @property
    def opposite_flag(self) -> str:
        """The flag that undoes a switch which a YAML file set: ``--x`` and ``--no-x`` undo each other."""
        name = self.flag.removeprefix("--")
        return "--" + name.removeprefix("no-") if name.startswith("no-") else "--no-" + name

    def convert(self, value: Any) -> Any:
        """The value as the field's type, from a command line's text or a YAML scalar.

        Raises:
            ValueError: Not of the type, not one of the choices, or out of range; the message starts after the name.
        """
        if (value is None and self.optional) or (type(value) is self.kind and value == self.default):
            return value  # a default may mean "not given" and lie outside of the range
        value = _to_tuple(value, self.item) if self.kind is tuple else _CONVERTERS[self.kind](value)
        self.check(value)
        return value

    def check(self, value: Any) -> None:
        """Raise ValueError where a value of the right type is not one of the choices or is out of range."""
        info = self.info
        if info.choices is not None:
            for item in value if self.kind is tuple else (value,):
                if item is not None and item not in info.choices:
                    why = f" ({info.why})" if info.why else ""
                    raise ValueError(f"{item} must be {' or '.join(map(str, info.choices))}{why}")
        if self.kind is tuple and self.item is int:
            for item in value:
                self._check_range(item)
        elif value is not None and self.kind in (int, float):
            self._check_range(value)

    def _check_range(self, value: Any) -> None:
        info = self.info
        bounds = (
            (info.at_least, "at least", lambda bound: value >= bound),
            (info.above, "greater than", lambda bound: value > bound),
            (info.below, "less than", lambda bound: value < bound),
        )
        for bound, text, holds in bounds:
            if bound is not None and not holds(bound):
                raise ValueError(f"{value} must be {text} {bound:g}" + (f" {info.unit}" if info.unit else ""))
        if self.kind in (int, tuple) and value > LARGEST_INT:
            raise ValueError(f"{value} must be at most {LARGEST_INT}, the largest number that torch takes")


def _to_int(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    try:
        if isinstance(value, str):
            return int(value)
    except ValueError:
        pass
    raise ValueError(f"{value!r} must be a whole number")


def _to_float(value: Any) -> float:
    # YAML 1.1 reads 5e-7, which has no dot, as text.
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
            if math.isfinite(number):
                return number
        except (ValueError, OverflowError):
            pass
    raise ValueError(f"{value!r} must be a finite number")


def _to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise ValueError(f"{value!r} must be true or false")


def _to_str(value: Any) -> str:
    if isinstance(value, str) and value:
        return value
    raise ValueError(f"{value!r} must be text that is not empty; write it in quotes")


_CONVERTERS: dict[type, Any] = {int: _to_int, float: _to_float, bool: _to_bool, str: _to_str}


def _to_tuple(value: Any, item: type) -> tuple[Any, ...]:
    if isinstance(value, (list, tuple)) and value:
        return tuple(_CONVERTERS[item](part) for part in value)
    raise ValueError(f"{value!r} must be a list of at least one {'number' if item is int else 'name'}")


def _to_window(value: Any) -> Window:
    if value is None or value == "full":  # Megatron-LM's own checkpoints have None
        return Window()
    try:
        left, right = (int(part) for part in value.strip("()").split(",")) if isinstance(value, str) else value
    except (TypeError, ValueError):
        left, right = None, None
    if type(left) is not int or type(right) is not int or left < -1 or right != 0:
        raise ValueError(f"{value!r} must be full, or the tokens before a token that it sees and a 0: 4095,0")
    return Window(left, right)


_CONVERTERS[Window] = _to_window


def _specs() -> Iterable[FlagSpec]:
    for group, config in GROUPS.items():
        hints = typing.get_type_hints(config)
        for field in dataclasses.fields(config):
            hint = hints[field.name]
            optional = isinstance(hint, types.UnionType)
            if optional:
                (hint,) = (member for member in typing.get_args(hint) if member is not type(None))
            info = field.metadata["flag"]
            kind = typing.get_origin(hint) or hint
            item = typing.get_args(hint)[0] if kind is tuple else kind
            yield FlagSpec(group, field.name, info.key or field.name, kind, item, optional, field.default, info)


def _table() -> dict[str, FlagSpec]:
    table: dict[str, FlagSpec] = {}
    for spec in _specs():
        if spec.key in table:
            raise TypeError(f"{spec.group}.{spec.field} and {table[spec.key].group} both declare {spec.flag}")
        table[spec.key] = spec
    unknown = {key for spec in table.values() for need in spec.info.needs for key in need.keys} - set(table)
    if unknown:
        raise TypeError(f"conditions name flags that do not exist: {sorted(unknown)}")
    return table


FLAGS: dict[str, FlagSpec] = _table()
"""Every flag by its key, in the order of the help page."""


def nearest(name: str, known: Collection[str]) -> str:
    """A hint at the name that was probably meant: ``; did you mean --lr?``, or nothing."""
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not matches:
        matches = sorted((k for k in known if len(name) > 4 and name.strip("-") in k), key=len)
    return f"; did you mean {matches[0]}?" if matches else ""


def without_effect(values: Mapping[str, Any], origins: Mapping[str, str], undecided: Collection[str] = ()) -> list[str]:
    """One line for every flag that somebody gave and that has no effect beside the other flags.

    Args:
        values: Value of every flag by key.
        origins: The given flags by key, and how each error line names them: ``--beta`` or ``run.yaml:3: beta``.
        undecided: Keys of flags whose value is not final.
    """
    errors = []
    for key, origin in origins.items():
        spec, value = FLAGS[key], values[key]
        if value is None or (spec.kind is bool and value == spec.default):
            continue
        broken = [need for need in spec.info.needs if not need.holds(values, undecided)]
        if broken:
            shown = "" if spec.kind is bool else f" {show(value)}"
            here = " and ".join(_state(name, values[name]) for name in broken[0].keys)
            used = " and ".join(need.text for need in broken)
            errors.append(f"{origin}{shown} has no effect {here}: it is used only {used}; remove it")
    return errors


def _state(key: str, value: Any) -> str:
    if value is None or value is False:
        return f"without {flag_of(key)}"
    return f"with {flag_of(key)}" + ("" if value is True else f" {show(value)}")


def show(value: Any) -> str:
    """A value as typed on the command line."""
    if isinstance(value, tuple) and not isinstance(value, Window):
        return " ".join(map(str, value))
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return str(value)
