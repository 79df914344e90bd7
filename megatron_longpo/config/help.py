"""The ``--help`` page: flags by group, each with its meaning, default, unit, source and when it has an effect."""

from __future__ import annotations

import shutil
import textwrap

from megatron_longpo.config.field import ConfigError
from megatron_longpo.config.flags import FLAGS, GROUPS, FlagSpec, nearest, show

_INDENT = 30

_INTRODUCTION = """\
torchrun [...] pretrain_longpo.py [--config FILE.yaml] [--flag value ...]

Flags that Megatron-LM has keep its names and meanings; tools/compute_reference_logprobs.py takes the same flags. \
--config FILE.yaml gives values by flag name, with or without the groups below; flags on the command line win, and \
--no-FLAG undoes a switch that the file turned on. A flag that would have no effect is an error. --help WORD shows one \
group, or the flags whose name contains the word.

In brackets: the default, when the flag is used, and where the flag or its default comes from if not from Megatron-LM \
(LongPO: arXiv 2502.13922; YaRN: arXiv 2309.00071)."""


def help_text(topic: str = "", width: int | None = None) -> str:
    """The help page.

    Args:
        topic: A group's name or a part of a flag's name; empty for everything.
        width: Columns; by default the terminal's, between 80 and 120.

    Raises:
        ConfigError: No group or flag has the topic in its name.
    """
    width = width or min(max(shutil.get_terminal_size().columns, 80), 120)
    part = topic.lstrip("-").replace("-", "_").lower()
    chosen = [spec for spec in FLAGS.values() if part in ("", spec.group)]
    chosen = chosen or [spec for spec in FLAGS.values() if part in spec.key]
    if not chosen:
        raise ConfigError(f"--help {topic}: no such group or flag{nearest(part, [*GROUPS, *FLAGS])}")
    lines = [] if topic else [textwrap.fill(p, width) for p in _INTRODUCTION.splitlines()]
    group = None
    for spec in chosen:
        if spec.group != group:
            group = spec.group
            title = (GROUPS[group].__doc__ or "").splitlines()[0]
            lines += ["", f"{group}: {title}"]
        lines += flag_lines(spec, width)
    return "\n".join(lines).lstrip("\n")


def flag_lines(spec: FlagSpec, width: int) -> list[str]:
    """The lines of one flag, at most ``width`` columns each."""
    left = f"  {spec.flag} {_placeholder(spec)}".rstrip()
    indent = " " * _INDENT
    text = textwrap.wrap(
        _description(spec), width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
    if len(left) < _INDENT:
        return [left + text[0][len(left) :], *text[1:]]
    return [left, *text]


def default_text(spec: FlagSpec) -> str:
    """The default as the help page shows it."""
    if spec.info.default_text is not None:
        return spec.info.default_text
    if spec.kind is bool:
        return "on" if spec.default else "off"
    return show(spec.default)


def _placeholder(spec: FlagSpec) -> str:
    """What stands for the value: its choices, its unit, or its kind."""
    if spec.kind is bool:
        return ""
    if spec.info.choices is not None:
        choices = "|".join(show(choice) for choice in spec.info.choices)
        return f"{choices} ..." if spec.kind is tuple else choices
    return (spec.info.unit or {int: "number", float: "x", str: "text"}[spec.item]).upper() + (
        " ..." if spec.kind is tuple else ""
    )


def _description(spec: FlagSpec) -> str:
    default = default_text(spec)
    notes = [default if default.startswith("required") else f"default: {default}"]
    if spec.info.needs:
        notes.append("only " + " and ".join(need.text for need in spec.info.needs))
    if spec.info.source:
        notes.append(spec.info.source)
    return f"{spec.info.help} [{'; '.join(notes)}]"
