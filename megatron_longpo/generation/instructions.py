"""Reading a pool of instructions out of a model's reply, and telling instructions apart that ask for the same."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

_NUMBER = r"(?:\d{1,2}|[ivx]{1,4}|[a-h])"
_MARKED = re.compile(
    r"^\s*(?:[#>*_`]*\s*)"  # Markdown around the mark
    rf"(?:(?:instruction|question|task|prompt|q|no|nr)\s*(?:\#|no\.?)?\s*{_NUMBER}\s*[*_]*\s*[.:)\-–—]"
    rf"|[(\[]{_NUMBER}[)\]]"
    rf"|{_NUMBER}\s*[.:)）、．](?!\d)"
    r"|\#?\d{1,2}\s*[-–—](?=\s)"
    r"|[①②③④⑤⑥⑦⑧⑨⑩]"
    r")[*_`]*\s*",
    re.IGNORECASE,
)
_BULLET = re.compile(r"^\s*[-*•‣–]\s+")
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "«": "»", "„": "“", "「": "」"}
_MIN_CHARS = 8
_SAME = 0.75


def parse_pool(reply: str) -> list[str]:
    """The instructions of a reply, in their order; empty where it holds no list of two or more.

    Understands lists numbered in any common manner (``1.``, ``1)``, ``(1)``, ``**1.**``, ``Instruction 1:``, ``a)``,
    ``①``, ``1、``), bullets, and JSON; an instruction may go over several lines. What stands before the list, and after
    a blank line behind it, is left out.
    """
    reply = reply.strip()
    for items in (_json_items(reply), _listed(reply, _MARKED), _listed(reply, _BULLET)):
        cleaned = [text for text in map(_clean, items) if len(text) >= _MIN_CHARS]
        distinct = list(dict.fromkeys(cleaned))
        if len(distinct) >= 2:
            return distinct
    # A pool of one, as --instructions-per-chunk 1 asks for.
    single = [_clean(item) for item in _listed(reply, _MARKED)]
    return single if len(single) == 1 and len(single[0]) >= _MIN_CHARS else []


def _json_items(reply: str) -> list[str]:
    match = re.search(r"[\[{].*[\]}]", reply, re.DOTALL)
    if match is None:
        return []
    try:
        value = json.loads(match[0])
    except (ValueError, RecursionError):  # a model that does not end may open brackets for ever
        return []
    if isinstance(value, dict):
        lists = [entry for entry in value.values() if isinstance(entry, list)]
        value = lists[0] if len(lists) == 1 else list(value.values())
    items = []
    for entry in value if isinstance(value, list) else []:
        if isinstance(entry, dict):
            texts = [text for text in entry.values() if isinstance(text, str)]
            entry = texts[0] if len(texts) == 1 else entry.get("instruction", entry.get("question"))
        if not isinstance(entry, str):
            return []
        items.append(entry)
    return items


def _listed(reply: str, mark: re.Pattern[str]) -> list[str]:
    items: list[list[str]] = []
    after_blank = False
    for line in reply.splitlines():
        match = mark.match(line)
        if match:
            items.append([line[match.end() :]])
        elif not line.strip():
            after_blank = True
            continue
        elif items and (not after_blank or line[:1].isspace()) and not line.lstrip().startswith(("```", "---")):
            items[-1].append(line)
        elif items and after_blank and items[-1] == [""]:
            items[-1].append(line)  # a heading of its own, "Instruction 1:", with the text under a blank line
        after_blank = False
    return [" ".join(part.strip() for part in item) for item in items]


def _clean(text: str) -> str:
    """Without the Markdown and quotation marks around the whole."""
    text = " ".join(text.split())
    for mark in ("**", "__", "*", "_", "`"):
        if len(text) > 2 * len(mark) and text.startswith(mark) and text.endswith(mark):
            inner = text[len(mark) : -len(mark)]
            if mark not in inner:
                text = inner
    if len(text) > 2 and text[-1] == _QUOTES.get(text[0]) and text[0] not in text[1:-1]:
        text = text[1:-1]
    if text.count("**") % 2:  # bold began before the mark
        text = text.strip().removesuffix("**")
    return text.strip()


def asks_for_the_same(instruction: str, others: Iterable[str]) -> bool:
    """Whether an instruction shares most of its words with one of the others (Jaccard index of at least 0.75)."""
    words = _words(instruction)
    for other in others:
        theirs = _words(other)
        union = words | theirs
        if not union or len(words & theirs) >= _SAME * len(union):
            return True
    return False


def _words(text: str) -> frozenset[str]:
    """Words; in scripts without blanks between them, pairs of characters."""
    words = re.findall(r"\w+", text.casefold())
    parts: set[str] = set()
    for word in words:
        if word.isascii() or len(word) < 8:
            parts.add(word)
        else:
            parts.update(word[i : i + 2] for i in range(len(word) - 1))
    return frozenset(parts)
