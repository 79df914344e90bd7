"""Chat templates: Jinja programs that turn a list of messages into the text that a model was tuned on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import jinja2
import jinja2.sandbox

TEMPLATE_DATE = "26 Jul 2024"
"""The date for templates that print one: rendering a dataset again must give the same tokens."""

NO_TEMPLATE = "{{ raise_exception('the tokenizer was loaded without one') }}"
"""Stands for the template where tokens are only counted, and a tokenizer that has none will do."""


def strftime_now(pattern: str) -> str:
    """The same date for templates that ask for today's (Mistral Small), in the form that they want."""
    return datetime(2024, 7, 26).strftime(pattern)


def with_fixed_date(template: str) -> str:
    """The template for transformers' engine, whose own ``strftime_now`` gives today's date.

    The engine takes data but no functions from its caller, so a macro in front of the template takes the name. The line
    break behind it is no output: chat templates are rendered with ``trim_blocks``.
    """
    if "strftime_now" not in template:
        return template
    codes = [f"%{letter}" for letter in "aAbBdHIjmMpSyY"] + ["%-d", "%-m"]
    replaced = "".join(f"|replace('{code}','{strftime_now(code)}')" for code in codes)
    return f"{{% macro strftime_now(pattern) %}}{{{{ pattern{replaced} }}}}{{% endmacro %}}\n{template}"


def read_template(chat_template: str | None) -> str | None:
    """The template of ``--chat-template``: a file's content, or the argument itself if it is a template.

    Raises:
        ValueError: The file cannot be read or is empty.
    """
    if chat_template is None or "{{" in chat_template or "{%" in chat_template:
        return chat_template
    try:
        template = Path(chat_template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--chat-template {chat_template}: cannot be read as a text file ({error})") from error
    if not template.strip():
        raise ValueError(f"--chat-template {chat_template} is empty: it must be a Jinja chat template")
    return template


def compile_template(template: str) -> Callable[..., str]:
    """A template's render function, in a sandbox and with the settings that chat templates are written for.

    Raises:
        ValueError: The template has a syntax error.
    """

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    try:
        return environment.from_string(template).render
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"--chat-template has a syntax error in line {error.lineno}: {error.message}") from error


@contextmanager
def template_errors() -> Iterator[None]:
    """Turn what a template raises while rendering into a ValueError."""
    try:
        yield
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses the conversation: {error}") from error
