"""Chat templates: Jinja programs that turn a list of messages into the text that a model was tuned on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jinja2
import jinja2.sandbox

TEMPLATE_DATE = "26 Jul 2024"
"""The date for templates that print one: rendering a dataset again must give the same tokens."""

NO_TEMPLATE = "{{ raise_exception('the tokenizer was loaded without one') }}"
"""Stands for the template where tokens are only counted, and a tokenizer that has none will do."""


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
