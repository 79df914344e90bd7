"""Reading and writing the YAML files of ``--config``."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_longpo.config.field import ConfigError, Window
from megatron_longpo.config.flags import FLAGS, GROUPS, FlagSpec, nearest
from megatron_longpo.config.not_offered import NOT_OFFERED

_NULL = "tag:yaml.org,2002:null"


def read_yaml(path: str | Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Values of flags from a YAML file.

    Keys are flags without dashes in front, with ``-`` or ``_`` inside, at the top level or in the mapping of their
    group (``optimizer: {lr: 5e-7}``).

    Returns:
        The converted values by key, and by key where each stands: ``FILE:LINE: key``.

    Raises:
        ConfigError: The file cannot be read, is not a mapping, or has unknown, repeated or wrongly typed keys.
    """
    errors: list[str] = []
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for group, key_node, value_node in _entries(_root(path), path, errors):
        name, line = str(key_node.value), key_node.start_mark.line + 1
        key, where = name.replace("-", "_"), f"{path}:{line}: {name}"
        if key not in FLAGS:
            errors.append(f"{where} {_unknown(key)}")
        elif group not in (None, FLAGS[key].group):
            errors.append(f"{where} belongs to group {FLAGS[key].group}, not {group}")
        elif key in origins:
            errors.append(f"{where} is given a second time; first at {origins[key].rpartition(':')[0]}")
        else:
            origins[key] = where
            try:
                values[key] = FLAGS[key].convert(_python_value(value_node))
            except ValueError as error:
                errors.append(f"{where} {error}")
    if errors:
        raise ConfigError(*errors)
    return values, origins


def to_yaml(values: Mapping[str, Any], effective: Collection[str]) -> str:
    """YAML text of flags by group; those without effect as comments, because given ones would be refused."""
    lines = ["# Every flag of the run. Give this file to --config for the same run again."]
    group = None
    for key, value in values.items():
        spec = FLAGS[key]
        if spec.group != group:
            group = spec.group
            lines.append(f"{group}:")
        mark = "" if key in effective else "# no effect: "
        lines.append(f"  {mark}{key.replace('_', '-')}: {_yaml_value(spec, value)}")
    return "\n".join(lines) + "\n"


def _root(path: str | Path) -> yaml.MappingNode:
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if root is None:
        raise ConfigError(f"--config {path} is empty")
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"--config {path} must map flags to values (lr: 5.0e-7), not be a list or a single value")
    return root


def _entries(
    root: yaml.MappingNode, path: str | Path, errors: list[str]
) -> Iterator[tuple[str | None, yaml.Node, yaml.Node]]:
    """(group or None, key, value) of every flag, groups opened; unknown groups go to ``errors``."""
    for key, value in root.value:
        name = str(key.value)
        # --objective and --optimizer are flags and groups: a mapping, or nothing, is the group.
        if name in GROUPS and value.tag == _NULL:
            continue
        if not isinstance(value, yaml.MappingNode):
            yield None, key, value
        elif name in GROUPS:
            for inner_key, inner_value in value.value:
                yield name, inner_key, inner_value
        elif name.replace("-", "_") in FLAGS:
            errors.append(f"{path}:{key.start_mark.line + 1}: {name} takes a value, not a mapping")
        else:
            hint = nearest(name, GROUPS) or f"; groups are {', '.join(GROUPS)}"
            errors.append(f"{path}:{key.start_mark.line + 1}: {name} is not a group of flags{hint}")


def _python_value(node: yaml.Node) -> Any:
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_object(node, deep=True)
    # PyYAML fails with the last two at values that are not of the type of their own tag, as !!bool maybe.
    except (yaml.YAMLError, AttributeError, KeyError) as error:
        raise ValueError(f"is not a plain value: {' '.join(str(error).split())}") from error
    finally:
        loader.dispose()


def _yaml_value(spec: FlagSpec, value: Any) -> str:
    """The value on one line, so that it can stand in a comment."""
    is_list = spec.kind is tuple and value is not None
    items = list(value) if is_list else [str(value) if isinstance(value, Window) else value]
    text = yaml.safe_dump(items, default_flow_style=True, width=10**9, allow_unicode=True).strip()
    if "\n" in text:
        text = yaml.safe_dump(items, default_flow_style=True, width=10**9, default_style='"').strip()
    return text if is_list else text[1:-1]


def _unknown(key: str) -> str:
    if advice := NOT_OFFERED.get("--" + key.replace("_", "-")):
        return f"is not offered: {advice}"
    renamed = {spec.field: spec.key for spec in FLAGS.values() if spec.field != spec.key}
    return "is not a flag" + (f"; did you mean {renamed[key]}?" if key in renamed else nearest(key, FLAGS))
