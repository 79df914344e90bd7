"""The steps for one document, with an engine that is told what to say."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from megatron_longpo.generation.chunking import Chunk
from megatron_longpo.generation.engine import Answer, DocumentError, Request
from megatron_longpo.generation.prompts import PHRASES, prompt_writer
from megatron_longpo.generation.rollout import DocumentPlan, Outcome, Rollout
from tests.generation.conftest import Settings

TEXT = "The king left the town in spring. The river rose in the night and took the bridge. The mill burnt in autumn."
CHUNKS = (Chunk(34, 82, 12), Chunk(0, 33, 8), Chunk(83, 108, 6))
PLAN = DocumentPlan(5, "doc", TEXT, 26, CHUNKS)
POOL = "1. Explain why the king left town.\n2. Describe what the river did to the bridge."

Say = Callable[[Request], str | Answer]


def roll_out(settings: Settings, say: Say, plan: DocumentPlan = PLAN, **changes: object) -> tuple[Outcome, list]:
    chosen = settings(**changes)
    calls: list[Sequence[Request]] = []

    async def ask(requests: Sequence[Request]) -> list[Answer]:
        calls.append(requests)
        said = [say(request) for request in requests]
        return [text if isinstance(text, Answer) else Answer(text, False, 10, 3) for text in said]

    outcome = asyncio.run(Rollout(chosen, prompt_writer(chosen))(plan, ask))
    assert Outcome.from_dict(json.loads(json.dumps(outcome.to_dict()))) == outcome
    return outcome, calls


def plainly(request: Request) -> str:
    if "numbered list" in request.prompt:
        chunk = request.prompt.split("\n\n")[0]
        return f"1. Explain in detail: {chunk}\n2. Summarise what is said here: {chunk}"
    return f"An answer about {len(request.prompt)} characters of text."


def test_the_steps_in_order(settings: Settings) -> None:
    outcome, (pools, chosen, rejected) = roll_out(settings, plainly)
    assert [request.prompt.split("\n\n")[0] for request in pools] == [TEXT[slice(*chunk.span)] for chunk in CHUNKS]
    assert all(r.temperature == 0.7 and r.top_p == 0.9 and not r.whole_document for r in pools)
    assert len({request.seed for request in pools}) == 3
    assert all(request.temperature == 0 for request in (*chosen, *rejected))
    assert not any(request.whole_document for request in chosen)
    assert all(request.whole_document for request in rejected)
    assert len(outcome.turns) == 3
    for turn, chunk, short, long in zip(outcome.turns, CHUNKS, chosen, rejected, strict=True):
        assert turn.chunk_span == chunk.span
        assert short.prompt == f"{TEXT[slice(*chunk.span)]}\n\n{turn.instruction}"
        assert long.prompt == f"{TEXT}\n\n{turn.instruction}"
        assert any(
            turn.instruction.startswith(phrase + start) for phrase in PHRASES for start in ("Explain", "Summarise")
        )
        assert turn.chosen == plainly(short) and turn.rejected == plainly(long)
    assert (outcome.num_planned, outcome.prompt_tokens, outcome.completion_tokens) == (3, 90, 27)
    assert not outcome.dropped and not outcome.dropped_turns
    assert roll_out(settings, plainly)[0] == outcome


def test_a_pool_that_cannot_be_read_is_asked_for_again_then_counted(settings: Settings) -> None:
    def stubborn(request: Request) -> str:
        if "numbered list" in request.prompt and request.prompt.startswith("The river"):
            return "I would rather talk about something else."
        return plainly(request)

    outcome, calls = roll_out(settings, stubborn)
    assert [len(call) for call in calls] == [3, 1, 1, 2, 2]
    assert len({call[0].seed for call in calls[:3]}) == 3, "another seed, or the same reply would come again"
    assert outcome.dropped_turns == Counter(no_instruction=1)
    assert len(outcome.turns) == 2


def test_half_a_pool_is_asked_for_again(settings: Settings) -> None:
    def filtered(request: Request) -> str | Answer:
        text = plainly(request)
        return Answer(text, False, broken_off="content_filter") if request.seed in first else text

    _, (pools, *_) = roll_out(settings, plainly)
    first = {pools[0].seed}
    outcome, calls = roll_out(settings, filtered)
    assert [len(call) for call in calls] == [3, 1, 3, 3]
    assert len(outcome.turns) == 3


def test_every_request_says_how_long_its_text_is(settings: Settings) -> None:
    _, (pools, chosen, rejected) = roll_out(settings, plainly)
    assert [request.text_tokens for request in pools] == [chunk.num_tokens for chunk in CHUNKS]
    assert [request.text_tokens for request in chosen] == [chunk.num_tokens for chunk in CHUNKS]
    assert {request.text_tokens for request in rejected} == {PLAN.num_tokens}


def test_no_two_turns_ask_for_the_same(settings: Settings) -> None:
    def alike(request: Request) -> str:
        return POOL if "numbered list" in request.prompt else plainly(request)

    outcome, _ = roll_out(settings, alike)
    assert outcome.dropped_turns == Counter(same_instruction=1)
    assert len(outcome.turns) == 2


def test_no_rejected_answer_is_asked_for_where_the_chosen_one_is_of_no_use(settings: Settings) -> None:
    def refusing(request: Request) -> str:
        short = not request.whole_document and "numbered list" not in request.prompt
        return "I'm sorry, but I cannot help." if short and request.prompt.startswith("The king") else plainly(request)

    outcome, calls = roll_out(settings, refusing)
    assert [len(call) for call in calls] == [3, 3, 2]
    assert outcome.dropped_turns == Counter(chosen_refusal=1)


def test_equal_and_empty_answers(settings: Settings) -> None:
    def dull(request: Request) -> str:
        if "numbered list" in request.prompt:
            return plainly(request)
        return "" if request.whole_document and "mill" in request.prompt[110:] else " The same. "

    outcome, _ = roll_out(settings, dull)
    assert outcome.dropped == "no_usable_turn"
    assert outcome.dropped_turns.total() == 3
    assert set(outcome.dropped_turns) == {"rejected_empty", "identical_answers"}


def test_a_document_that_cannot_be_answered_is_dropped_as_a_whole(settings: Settings) -> None:
    def too_long(request: Request) -> str:
        if request.whole_document:
            raise DocumentError("context_length", "too long")
        return plainly(request)

    outcome, _ = roll_out(settings, too_long)
    assert (outcome.dropped, outcome.turns, outcome.dropped_turns) == ("context_length", [], Counter(context_length=3))


def test_a_document_that_was_dropped_before_asks_nothing(settings: Settings) -> None:
    outcome, calls = roll_out(settings, plainly, DocumentPlan(0, "doc", TEXT, 26, dropped="document_too_short"))
    assert calls == []
    assert (outcome.dropped, outcome.num_planned) == ("document_too_short", 0)


@pytest.mark.parametrize("template", ["{instruction}\n---\n{document}", "Read:\n{document}\nNow: {instruction}!"])
def test_the_prompt_template_is_that_of_preprocessing(template: str, settings: Settings) -> None:
    outcome, (_, chosen, _) = roll_out(settings, plainly, prompt_template=template)
    turn = outcome.turns[0]
    chunk = TEXT[slice(*turn.chunk_span)]
    assert chosen[0].prompt == template.replace("{document}", chunk).replace("{instruction}", turn.instruction)
