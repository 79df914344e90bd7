"""Pools of instructions in the shapes that models write them, and instructions that ask for the same."""

from __future__ import annotations

import pytest

from megatron_longpo.generation.instructions import asks_for_the_same, parse_pool
from megatron_longpo.generation.prompts import INSTRUCTION_TEMPLATE, PromptWriter

ONE, TWO, THREE = (
    "Explain why the king left.",
    "Compare both treaties in one sentence.",
    "Which river is crossed 3 times?",
)

SHAPES = {
    "dots": f"1. {ONE}\n2. {TWO}\n3. {THREE}",
    "brackets": f"1) {ONE}\n2) {TWO}\n3) {THREE}",
    "both brackets": f"(1) {ONE}\n(2) {TWO}\n(3) {THREE}",
    "square brackets": f"[1] {ONE}\n[2] {TWO}\n[3] {THREE}",
    "colons": f"1: {ONE}\n2: {TWO}\n3: {THREE}",
    "dashes": f"1 - {ONE}\n2 - {TWO}\n3 - {THREE}",
    "bold numbers": f"**1.** {ONE}\n**2.** {TWO}\n**3.** {THREE}",
    "bold texts": f"1. **{ONE}**\n2. **{TWO}**\n3. **{THREE}**",
    "all bold": f"**1. {ONE}**\n**2. {TWO}**\n**3. {THREE}**",
    "words": f"Instruction 1: {ONE}\nInstruction 2: {TWO}\nInstruction 3: {THREE}",
    "bold words": f"**Instruction 1:** {ONE}\n**Instruction 2:** {TWO}\n**Instruction 3:** {THREE}",
    "questions": f"Q1: {ONE}\nQ2: {TWO}\nQ3: {THREE}",
    "headings": f"### 1. {ONE}\n\n### 2. {TWO}\n\n### 3. {THREE}",
    "headings apart": f"Instruction 1:\n{ONE}\n\nInstruction 2:\n{TWO}\n\nInstruction 3:\n{THREE}",
    "headings far apart": f"**Question 1:**\n\n{ONE}\n\n**Question 2:**\n\n{TWO}\n\n**Question 3:**\n\n{THREE}",
    "letters": f"a) {ONE}\nb) {TWO}\nc) {THREE}",
    "roman": f"i. {ONE}\nii. {TWO}\niii. {THREE}",
    "circles": f"①{ONE}\n②{TWO}\n③{THREE}",
    "Chinese comma": f"1、{ONE}\n2、{TWO}\n3、{THREE}",
    "bullets": f"- {ONE}\n- {TWO}\n- {THREE}",
    "stars": f"* {ONE}\n* {TWO}\n* {THREE}",
    "indented": f"  1. {ONE}\n  2. {TWO}\n  3. {THREE}",
    "blank lines": f"1. {ONE}\n\n2. {TWO}\n\n3. {THREE}",
    "quoted": f'1. "{ONE}"\n2. “{TWO}”\n3. "{THREE}"',
    "preface and farewell": f"Sure! Here are 3 instructions:\n\n1. {ONE}\n2. {TWO}\n3. {THREE}\n\nI hope they help!",
    "several lines": f"1. Explain why\n   the king left.\n2. {TWO}\n3. Which river\nis crossed 3 times?",
    "JSON": f'["{ONE}", "{TWO}", "{THREE}"]',
    "JSON in a fence": f'```json\n["{ONE}", "{TWO}", "{THREE}"]\n```',
    "JSON objects": f'[{{"instruction": "{ONE}"}}, {{"instruction": "{TWO}"}}, {{"instruction": "{THREE}"}}]',
    "JSON under a name": f'{{"instructions": ["{ONE}", "{TWO}", "{THREE}"]}}',
    "JSON by number": f'{{"1": "{ONE}", "2": "{TWO}", "3": "{THREE}"}}',
    "repeated": f"1. {ONE}\n2. {TWO}\n3. {THREE}\n4. {ONE}",
    "windows": f"1. {ONE}\r\n2. {TWO}\r\n3. {THREE}\r\n",
}


@pytest.mark.parametrize("shape", SHAPES)
def test_lists_of_any_common_shape(shape: str) -> None:
    assert parse_pool(SHAPES[shape]) == [ONE, TWO, THREE]


def test_numbers_within_an_instruction_are_no_marks() -> None:
    assert parse_pool("1. Which of 1.5 and 2.5 is larger?\n2. Name the 3. and the 4. book of it.") == [
        "Which of 1.5 and 2.5 is larger?",
        "Name the 3. and the 4. book of it.",
    ]


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "I would rather not.",
        "One line.\nAnother line.",
        "1.\n2.\n3.",
        "{'a': 1}",
        "[" * 3000 + "]",
        f'[["{ONE}"], ["{TWO}"]]',
        f'[{{"a": "{ONE}", "b": "{TWO}"}}, {{"a": "{TWO}", "b": "{ONE}"}}]',
    ],
)
def test_what_is_no_list_is_empty(reply: str) -> None:
    assert parse_pool(reply) == []


def test_marks_around_single_words_stay() -> None:
    pool = ["**Explain** why the king **left**", "`a` and `b`: which is right?"]
    assert parse_pool("\n".join(f"{number}. {text}" for number, text in enumerate(pool, 1))) == pool


def test_a_pool_of_one() -> None:
    assert parse_pool(f"1. {ONE}") == [ONE]


def test_instructions_that_ask_for_the_same() -> None:
    assert asks_for_the_same("Explain why the king left.", [TWO, "Explain why, the King left!"])
    assert asks_for_the_same("解释国王为什么离开了他的国家", ["解释国王为什么离开了他的国家。"])
    assert not asks_for_the_same(ONE, [TWO, THREE])
    assert not asks_for_the_same(ONE, [])


def test_a_chunk_with_placeholders_is_left_as_it_is() -> None:
    prompts = PromptWriter(INSTRUCTION_TEMPLATE, 4, seed=0)
    chunk = "The text {num_instructions} of {focus} and {chunk}."
    request = prompts.pool_request(chunk, "doc", 0)
    assert request.startswith(chunk + "\n")
    assert "Write 4 different" in request
    assert request.count("{focus}") == 1
    assert request == prompts.pool_request(chunk, "doc", 0)


def test_phrases_and_focuses_vary_with_document_and_chunk() -> None:
    prompts = PromptWriter(INSTRUCTION_TEMPLATE, 4, seed=0)
    assert len({prompts.phrase(f"doc-{i}", j) for i in range(10) for j in range(4)}) > 4
    assert len({prompts.pool_request("text", f"doc-{i}", 0) for i in range(20)}) > 4
    assert prompts.hash != PromptWriter(INSTRUCTION_TEMPLATE, 3, seed=0).hash
