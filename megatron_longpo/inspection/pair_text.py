"""A pair for the terminal: chunk and instruction above, chosen and rejected side by side."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_longpo.inspection.lengths import Length
from megatron_longpo.inspection.plain_text import num_cells, padded, printable, shortened, wrap
from megatron_longpo.inspection.terminal import Terminal, place
from megatron_longpo.inspection.view import PairView, Text

_LABEL = 13
_MIN_SIDE_BY_SIDE = 72
_PLACE_WIDTH = 30
_PERCENT_WIDTH = len(" 100 to 100 %")


def pair_lines(view: PairView, terminal: Terminal, max_chars: int) -> Iterator[str]:
    """The lines of one pair.

    Args:
        view: The pair.
        terminal: Width and colours.
        max_chars: Longest text to show in full; of longer ones the middle is left out.
    """
    yield _headline(view, terminal)
    if view.note:
        yield from (terminal.paint(line, "dim") for line in wrap(printable(view.note), terminal.width))
    prompt, short = ("long prompt", "short prompt") if view.whole_prompts else ("document", "chunk")
    yield _label(prompt, terminal) + terminal.paint(str(view.document.length), "dim")
    for message in view.context:
        length = Length(characters=len(message.content))
        yield from _block(printable(message.role), Text(message.content, length), terminal, max_chars)
    if view.chunk is None:
        yield _label(short, terminal) + terminal.paint("none: the row has no short prompt", "dim")
    else:
        where = ""
        if view.chunk_share is not None:
            start, end = view.chunk_share
            room = terminal.width - _LABEL - _PERCENT_WIDTH
            drawn = terminal.paint(place(start, end, max(8, min(_PLACE_WIDTH, room))), "accent")
            where = f"{drawn} {start * 100:.0f} to {end * 100:.0f} %"
        yield from _block(short, view.chunk, terminal, max_chars, where)
    name = "instruction" if view.has_instruction else "prompt's end"
    yield from _block(name, view.instruction, terminal, max_chars)
    yield ""
    if terminal.width < _MIN_SIDE_BY_SIDE:
        for name, text in (("chosen", view.chosen), ("rejected", view.rejected)):
            yield terminal.paint(padded(name, _LABEL), name) + terminal.paint(str(text.length), "dim")
            yield from (f"  {line}".rstrip() for line in _text_lines(text, terminal.width - 2, max_chars))
    else:
        yield from _side_by_side(view, terminal, max_chars)
    yield terminal.paint(f"similarity {view.similarity:.2f}", "dim")


def _headline(view: PairView, terminal: Terminal) -> str:
    title = f"━━ {printable(view.id)} · pair {view.turn} of {view.num_turns} "
    where = f" {view.location}" if view.location else ""
    room = terminal.width - num_cells(title)
    line = f"{'━' * (room - num_cells(where))}{where}" if num_cells(where) + 4 <= room else "━" * max(0, room)
    return terminal.paint(title, "bold") + terminal.paint(line, "dim")


def _label(name: str, terminal: Terminal) -> str:
    return terminal.paint(padded(name, _LABEL), "bold")


def _block(name: str, text: Text, terminal: Terminal, max_chars: int, where: str = "") -> Iterator[str]:
    shown = terminal.paint(str(text.length), "dim")
    fits = _LABEL + _PLACE_WIDTH + _PERCENT_WIDTH + 2 + num_cells(str(text.length)) <= terminal.width
    if where and not fits:
        yield _label(name, terminal) + where
        yield " " * _LABEL + shown
    else:
        yield _label(name, terminal) + (f"{where}  {shown}" if where else shown)
    yield from (f"  {line}".rstrip() for line in _text_lines(text, terminal.width - 2, max_chars))


def _text_lines(text: Text, width: int, max_chars: int) -> list[str]:
    if text.text is None:
        return []
    head, num_left_out, tail = shortened(text.text, max_chars)
    lines = wrap(printable(head.strip("\n")), width)
    if num_left_out:
        lines += ["", f"[… {num_left_out:,} characters …]", "", *wrap(printable(tail.strip("\n")), width)]
    return lines


def _side_by_side(view: PairView, terminal: Terminal, max_chars: int) -> Iterator[str]:
    width = (terminal.width - 3) // 2
    titles = []
    for name, text in (("chosen", view.chosen), ("rejected", view.rejected)):
        length = str(text.length)
        if num_cells(name) + 2 + num_cells(length) > width:
            length = length.replace(" characters", " c").replace(" words", " w").replace(" tokens", " t")
        blanks = " " * max(0, width - num_cells(name) - 2 - num_cells(length))
        titles.append(f"{terminal.paint(name, name)}  {terminal.paint(length, 'dim')}{blanks}")
    separator = terminal.paint("│", "dim")
    yield f" {separator} ".join(titles).rstrip()
    columns = [_text_lines(text, width, max_chars) for text in (view.chosen, view.rejected)]
    for row in range(max(map(len, columns))):
        left, right = (column[row] if row < len(column) else "" for column in columns)
        yield f"{padded(left, width)} {separator} {right}".rstrip()
