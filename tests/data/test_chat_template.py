"""Chat templates: where they come from, and what they may not do."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_longpo.data.chat_template import compile_template, read_template, template_errors


def test_a_template_is_a_file_or_itself(tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text("{{ messages }}")
    assert read_template(str(path)) == read_template("{{ messages }}") == "{{ messages }}"
    assert read_template(None) is None


def test_unreadable_templates_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--chat-template nowhere\.jinja"):
        read_template("nowhere.jinja")
    empty = tmp_path / "empty.jinja"
    empty.write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.jinja is empty"):
        read_template(str(empty))
    binary = tmp_path / "binary.jinja"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"binary\.jinja"):
        read_template(str(binary))


def test_syntax_errors_name_the_line() -> None:
    with pytest.raises(ValueError, match="line 2"):
        compile_template("fine\n{% if %}")


def test_blocks_take_their_line_breaks_as_chat_templates_expect() -> None:
    render = compile_template("{% for m in messages %}\n  {% if m %}\n{{ m }}\n  {% endif %}\n{% endfor %}")
    assert render(messages=["a", "b"]) == "a\nb\n"


def test_a_refusal_is_a_value_error() -> None:
    render = compile_template("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="roles must alternate"), template_errors():
        render()


@pytest.mark.parametrize("attack", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}"])
def test_templates_run_in_a_sandbox(attack: str) -> None:
    with pytest.raises(ValueError, match="refuses"), template_errors():
        compile_template(attack + "{{ ''.__class__.__mro__[1].__subclasses__() }}")(messages=[])
