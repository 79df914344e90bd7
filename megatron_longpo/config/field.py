"""How a configuration field says what its flag means: help, unit, source, range, and when it has an effect.

A field of a configuration dataclass is declared with `flag(...)`; all that the command line, the YAML reader, the help
page and the validation know about it is read from there. Conditions name flags by their *key*: the flag without its
leading dashes, with underscores (``lambda``, ``cp_comm_type``), which is also its key in YAML files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

AUTO = "auto"
"""Value of a field that the device decides; conditions on it hold until it is decided."""


class Window(NamedTuple):
    """Megatron-LM's ``--window-size``: how many tokens before and after itself a token sees; -1 is all.

    Models of transformers count the token itself too: ``sliding_window`` 4096 is 4095,0 here.
    """

    left: int = -1
    right: int = 0

    @property
    def num_tokens(self) -> int | None:
        """Tokens that a token sees, itself included, as transformers counts; None is all."""
        return None if self.left < 0 else self.left + 1

    @staticmethod
    def of(num_tokens: int | None) -> Window:
        """The window of this many tokens, the token itself included; None is all."""
        return Window() if num_tokens is None else Window(num_tokens - 1)

    def __str__(self) -> str:
        return "full" if self.left < 0 else f"{self.left},{self.right}"


class ConfigError(ValueError):
    """A configuration that cannot run: one line per mistake, each naming flag, value and fix."""

    def __init__(self, *errors: str) -> None:
        super().__init__(*errors)
        self.errors = errors

    def __str__(self) -> str:
        return "\n".join(self.errors)


@dataclass(frozen=True)
class Condition:
    """When a flag has an effect.

    Args:
        text: Reads after "only": ``with --load``.
        keys: Keys of the flags that `test` looks at.
        test: Given the value of every flag by key.
    """

    text: str
    keys: tuple[str, ...]
    test: Callable[[Mapping[str, Any]], bool]

    def holds(self, values: Mapping[str, Any], undecided: Collection[str] = ()) -> bool:
        """Whether the flag has, or may still get, an effect: a flag that is not decided yet cannot rule it out."""
        if any(key in undecided or values[key] == AUTO for key in self.keys):
            return True
        return self.test(values)


def flag_of(key: str) -> str:
    """The flag of a key: ``cp_comm_type`` → ``--cp-comm-type``."""
    return "--" + key.replace("_", "-")


def equals(key: str, *allowed: str) -> Condition:
    """The flag ``key`` has one of the values ``allowed``."""
    return Condition(f"with {flag_of(key)} {'|'.join(allowed)}", (key,), lambda values: values[key] in allowed)


def given(*keys: str) -> Condition:
    """One of the flags ``keys`` is set."""
    text = " or ".join(flag_of(key) for key in keys)
    return Condition(f"with {text}", keys, lambda values: any(_is_set(values[key]) for key in keys))


def absent(*keys: str) -> Condition:
    """None of the flags ``keys`` is set."""
    text = " or ".join(flag_of(key) for key in keys)
    return Condition(f"without {text}", keys, lambda values: not any(_is_set(values[key]) for key in keys))


def above(key: str, bound: int) -> Condition:
    """The flag ``key`` is greater than ``bound``."""
    return Condition(f"with {flag_of(key)} > {bound}", (key,), lambda values: values[key] > bound)


def _is_set(value: Any) -> bool:
    return value is not None and value is not False


@dataclass(frozen=True)
class FlagInfo:
    """What the declaration of a field says about its flag.

    Args:
        help: One phrase for the help page.
        key: Name of the flag, where it is not the field's own.
        unit: What a number counts, or what a text names (folder, file).
        source: Where the flag or its default comes from, when not Megatron-LM.
        choices: Allowed values.
        why: Why there are no other choices.
        needs: Conditions that must all hold for the flag to have an effect.
        at_least, above, below: Range of a number.
        default_text: Stands for the default on the help page, where the value itself says little.
        changeable: A model may be trained with another value than its checkpoint's.
    """

    help: str
    key: str | None = None
    unit: str | None = None
    source: str | None = None
    choices: tuple[Any, ...] | None = None
    why: str | None = None
    needs: tuple[Condition, ...] = ()
    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    default_text: str | None = None
    changeable: bool = False


def flag(default: Any, help: str, *, needs: Condition | tuple[Condition, ...] = (), **info: Any) -> Any:
    """A dataclass field that becomes a flag; the keywords are those of `FlagInfo`."""
    needs = (needs,) if isinstance(needs, Condition) else needs
    return dataclasses.field(default=default, metadata={"flag": FlagInfo(help, needs=needs, **info)})
