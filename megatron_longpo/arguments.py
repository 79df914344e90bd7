"""The command line: flags, ``--config FILE.yaml`` and ``--help``, all made from the configuration dataclasses."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any, NoReturn

from megatron_longpo.config import ConfigError, RunConfig
from megatron_longpo.config.flags import FLAGS, GROUPS, FlagSpec, nearest
from megatron_longpo.config.help import help_text
from megatron_longpo.config.not_offered import NOT_OFFERED
from megatron_longpo.config.yaml_file import read_yaml
from megatron_longpo.processes import leave


class HelpRequested(Exception):
    """``--help`` was given; the argument is the page."""


def parse_arguments(argv: Sequence[str]) -> RunConfig:
    """The configuration that a command line asks for; explicit flags win over ``--config``, which wins over defaults.

    Args:
        argv: The words behind the script's name.

    Raises:
        ConfigError: Unknown flags or YAML keys, values of a wrong type or range, flags that have no effect.
        HelpRequested: ``--help``, with the page.
    """
    namespace, unknown = _parser().parse_known_args(list(argv))
    words = vars(namespace)
    if (topic := words.pop("help")) is not None:
        raise HelpRequested(help_text(topic))
    errors = [_unknown(word) for word in unknown if word.startswith("-")]
    errors = errors or [f"{word!r} stands alone: flags begin with --" for word in unknown]

    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    config_file = words.pop("config")
    if config_file is not None:
        values, origins = read_yaml(config_file)
    for key, word in words.items():
        spec = FLAGS[key]
        origins[key] = spec.flag
        try:
            values[key] = spec.convert(word)
        except ValueError as error:
            errors.append(f"{spec.flag} {error}")
    if errors:
        raise ConfigError(*errors)
    config = RunConfig.from_flat_dict(values, explicit=origins.keys())
    config.refuse_flags_without_effect(origins)
    return config


def parse_command_line(argv: Sequence[str] | None = None) -> RunConfig:
    """`parse_arguments` for a script: prints the help page or the errors, once over all ranks, and exits."""
    words = sys.argv[1:] if argv is None else argv
    try:
        return parse_arguments(words)
    except HelpRequested as request:
        page = str(request)
        leave(0, lambda: print(page))
    except ConfigError as error:
        mistakes = error
        leave(2, lambda: print_errors(mistakes))


def print_errors(error: ConfigError) -> None:
    """Print the mistakes of a configuration to stderr, one a line."""
    name = os.path.basename(sys.argv[0])
    for line in error.errors:
        print(f"{name}: error: {line}", file=sys.stderr)
    print(f"{name}: --help lists all flags, --help WORD those that have the word", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise ConfigError where argparse would print its usage and leave."""
        raise ConfigError(message.removeprefix("argument "))


@cache
def _parser() -> argparse.ArgumentParser:
    """Made once: a search parses a thousand command lines, and most of the time of one goes into its parser."""
    parser = _Parser(allow_abbrev=False, add_help=False)
    parser.add_argument("--help", "-h", nargs="?", const="", dest="help", default=None)
    parser.add_argument("--config", dest="config", default=None)
    for spec in FLAGS.values():
        _add(parser, spec)
    return parser


def _add(parser: argparse.ArgumentParser, spec: FlagSpec) -> None:
    # Values stay text here: `FlagSpec.convert` checks them as it checks YAML values.
    if spec.kind is bool:
        on = "store_false" if spec.default is True else "store_true"
        off = "store_true" if spec.default is True else "store_false"
        parser.add_argument(spec.flag, action=on, dest=spec.key, default=argparse.SUPPRESS)
        parser.add_argument(spec.opposite_flag, action=off, dest=spec.key, default=argparse.SUPPRESS)
    else:
        nargs = "+" if spec.kind is tuple else None
        parser.add_argument(spec.flag, nargs=nargs, dest=spec.key, default=argparse.SUPPRESS)


def _unknown(word: str) -> str:
    name = word.partition("=")[0]
    fields = {"--" + spec.field.replace("_", "-"): spec.flag for spec in FLAGS.values()}
    known = [spec.flag for spec in FLAGS.values()] + ["--config", "--help"]
    normal = name.replace("_", "-").lower()
    if advice := NOT_OFFERED.get(normal):
        return f"{name} is not offered: {advice}"
    if normal in known:
        return f"{name} is not a flag; did you mean {normal}?"
    if normal in fields:
        return f"{name} is not a flag; did you mean {fields[normal]}?"
    groups = ", ".join(GROUPS)
    return f"{name} is not a flag" + (nearest(normal, known) or f"; --help GROUP lists those of a group: {groups}")
