"""The HTML page: complete in itself, well-formed, and deaf to what documents hold."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_longpo.inspection.inspect import InspectOptions, inspect
from megatron_longpo.inspection.page import html_page
from megatron_longpo.pairs import Message, PreferenceDocument, Turn, write_pairs
from tests.inspection.conftest import INJECTION, REPORT

VOID = {"meta", "br", "line", "rect", "polygon"}


class Page(HTMLParser):
    """Elements, attributes and text of a page; fails where elements do not nest."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(content)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data

    def count(self, tag: str, css_class: str = "") -> int:
        return sum(
            name == tag and css_class in [*(attributes.get("class") or "").split(), ""]
            for name, attributes in self.elements
        )


def page_of(*paths: Path, max_chars: int = 20_000, **options: object) -> str:
    inspection = inspect(InspectOptions(tuple(map(str, paths)), **options), progress=False)  # type: ignore[arg-type]
    return html_page(inspection, max_chars)


def assert_self_contained(content: str) -> None:
    page = Page(content)
    tags = {tag for tag, _ in page.elements}
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & tags
    attributes = {name for _, attributes in page.elements for name in attributes}
    assert not {"src", "srcset", "action"} & attributes
    names = {attributes.get("id") for _, attributes in page.elements}
    for _, element in page.elements:
        assert "href" not in element or str(element["href"]).removeprefix("#") in names, "links lead within the page"
    assert not [name for name in attributes if name.startswith("on")]
    style = content[content.index("<style>") : content.index("</style>")]
    assert not re.search(r"url\(|@import|@font-face", style)
    assert "http" not in content.replace("http-equiv", "")


def test_the_page_has_everything_and_needs_nothing(generated: Path) -> None:
    content = page_of(generated, num_pairs=7)
    assert_self_contained(content)
    page = Page(content)
    assert page.count("article", "pair") == 7 and page.count("svg") == 6
    assert page.count("div", "place") == 7
    for words in ("7 of 30 pairs", "no pairs left", "4 min", "123k", "median similarity"):
        assert words in page.words
    assert "prefers-color-scheme: dark" in content and "width=device-width" in content
    assert content == page_of(generated, num_pairs=7), "the same pairs make the same page"


def test_documents_that_hold_html_are_shown_as_text(tmp_path: Path) -> None:
    document = f"{INJECTION} and {INJECTION} {{{{ 7 * 7 }}}}"
    turn = Turn(f"I {INJECTION}", f"C {INJECTION}", f"R {INJECTION}", document[: len(INJECTION)], (0, len(INJECTION)))
    context = (Message(f"system{INJECTION}", INJECTION),)
    folder = tmp_path / "<b>folder"
    write_pairs(
        folder / "pairs.jsonl", [PreferenceDocument(f"id {INJECTION}", document, (turn,), long_context=context)]
    )
    reasons = {"turns": REPORT["turns"] | {"dropped": {INJECTION: 3}}}
    (folder / "report.json").write_text(json.dumps(REPORT | reasons))
    content = page_of(folder)
    assert_self_contained(content)
    page = Page(content)
    for part in ("I ", "C ", "R ", "id ", "system"):
        assert f"{part}{INJECTION}" in page.words.replace("\n", " ")
    assert INJECTION in page.words and "<b>folder" in page.words and "49" not in page.words.split()
    assert_self_contained(page_of(folder, document_id=f"id {INJECTION}"))


@pytest.mark.parametrize("max_chars", [20_000, 50])
def test_long_texts_are_cut_and_differences_marked(tmp_path: Path, max_chars: int) -> None:
    turn = Turn("Ask?", "It runs once, at import time. " * 9, "It runs twice, at import time. " * 9, "doc", (0, 3))
    write_pairs(tmp_path / "pairs.jsonl", [PreferenceDocument("one", "doc", (turn,))])
    content = page_of(tmp_path, max_chars=max_chars)
    page = Page(content)
    is_cut = max_chars == 50
    assert ("characters not shown" in page.words) == is_cut
    assert (page.count("mark") > 10) != is_cut, "a cut answer is not compared"


def test_the_last_bar_says_what_lies_above_it(tmp_path: Path) -> None:
    def document(number: int) -> PreferenceDocument:
        times = 5000 if number == 0 else 2
        return PreferenceDocument(str(number), "doc " * times, (Turn("Ask?", "So. " * times, "No.", "doc", (0, 3)),))

    write_pairs(tmp_path / "pairs.jsonl", map(document, range(200)))
    content = page_of(tmp_path, num_pairs=1)
    assert len(re.findall(r"<text[^>]*>\d+\+</text>", content)) == 2 and content.count(" and more: ") == 1


def test_tokenized_rows_make_a_page_too(tokenized: Path) -> None:
    content = page_of(tokenized)
    assert_self_contained(content)
    page = Page(content)
    assert page.words.count("tokens only") >= 5 and "tokens in the median long prompt" in page.words


def test_a_single_pair_makes_a_page(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "!", "rejected": "?"}))
    content = page_of(tmp_path / "one.jsonl")
    assert_self_contained(content)
    assert "1 of 1 pair" in " ".join(Page(content).words.split())
