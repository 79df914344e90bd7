"""Tokenized documents against the definition of a response: what the template renders behind the generation prompt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megatron_longpo.data.chat_tokenizer import ChatTokenizer
from megatron_longpo.data.document import CHOSEN, REJECTED, TokenizedDocument, Tokens
from megatron_longpo.data.tokenize import DocumentTokenizer, PromptTemplate, tokenized_pair
from megatron_longpo.data.tokenizer import load_tokenizer
from megatron_longpo.pairs import Message, PreferenceDocument, TokenizedPair, TokenSequence, Turn
from tests.data.conftest import CHATML_TEMPLATE, FORGETFUL_TEMPLATE, THINKING_TEMPLATE

LOOSE_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}Question: {{ message.content }}\n"
    "{% else %}Answer: {{ message.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Answer: {% endif %}"
)
"""The generation prompt ends in a blank, which the tokenizers merge with the answer's first word."""

words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=25).filter(lambda t: t.strip() != "")


@st.composite
def preference_documents(draw: st.DrawFn) -> PreferenceDocument:
    turns = []
    for _ in range(draw(st.integers(1, 3))):
        chosen, rejected = draw(st.tuples(words, words).filter(lambda pair: pair[0] != pair[1]))
        turns.append(Turn(draw(words), chosen, rejected, draw(words)))
    return PreferenceDocument("some id", draw(words), tuple(turns))


def example(num_turns: int = 2) -> PreferenceDocument:
    turns = tuple(
        Turn(f"What is in part {i}?", f"Part {i} holds wörds ✓.", f"Nothing at {i}!", f"chunk {i}")
        for i in range(num_turns)
    )
    return PreferenceDocument("example", "The long document.\nIt has two lines.", turns)


def messages(document: PreferenceDocument, turns: list[int], role: int, short: bool = False) -> list[dict[str, str]]:
    """The chat of one conversation, by the definition."""
    chat = []
    for turn in turns:
        one = document.turns[turn]
        text = (
            f"{one.chunk if short else document.document}\n\n{one.instruction}" if turn == turns[0] else one.instruction
        )
        chat += [{"role": "user", "content": text}]
        chat += [{"role": "assistant", "content": one.chosen if role == CHOSEN else one.rejected}]
    return chat


def check(
    tokenizer: ChatTokenizer,
    chat: list[dict[str, str]],
    tokens: Tokens,
    spans: tuple[tuple[int, int, int], ...],
    turns: list[int],
) -> None:
    """The tokens are those of the rendered chat, and the spans cover exactly the characters of its answers."""
    text = tokenizer.render(chat)
    expected, starts, ends = tokenizer.encode(text)
    assert np.array_equal(tokens, expected)
    assert [turn for turn, _, _ in spans] == turns
    for number, (_, start, end) in enumerate(spans):
        first_char = len(tokenizer.render(chat[: 2 * number + 1], add_generation_prompt=True))
        last_char = len(tokenizer.render(chat[: 2 * number + 2]))
        for token in range(len(tokens)):
            has_response_character = max(starts[token], first_char) < min(ends[token], last_char)
            assert start <= token < end or not has_response_character
            if start <= token < end and ends[token] > starts[token]:
                assert has_response_character


def check_document(tokenizer: ChatTokenizer, document: PreferenceDocument, tokenized: TokenizedDocument) -> None:
    everything = list(range(len(document.turns)))
    cases = [(tokenized.joint, everything)] if tokenized.joint else []
    cases += [(pair, [turn]) for turn, pair in enumerate(tokenized.independent)]
    for pair, turns in cases:
        for role in (CHOSEN, REJECTED):
            tokens = np.concatenate([tokenized.document_tokens, pair[role].tokens])
            shift = len(tokenized.document_tokens)
            spans = tuple((turn, start + shift, end + shift) for turn, start, end in pair[role].spans)
            check(tokenizer, messages(document, turns, role), tokens, spans, turns)
    for turn, short in enumerate(tokenized.short):
        for role, branch in enumerate((short.chosen, short.rejected)):
            tokens = np.concatenate([short.prefix_tokens, branch.tokens])
            spans = tuple(
                (t, start + len(short.prefix_tokens), end + len(short.prefix_tokens)) for t, start, end in branch.spans
            )
            check(tokenizer, messages(document, [turn], role, short=True), tokens, spans, [turn])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(document=preference_documents())
def test_any_document_by_the_definition(tokenizer: ChatTokenizer, document: PreferenceDocument) -> None:
    tokenized = DocumentTokenizer(tokenizer)(document)
    assert tokenized.num_turns == len(tokenized.independent) == len(tokenized.short) == len(document.turns)
    check_document(tokenizer, document, tokenized)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(document=preference_documents())
def test_a_template_whose_prompt_and_answer_share_tokens(
    huggingface_folder: Path, document: PreferenceDocument
) -> None:
    tokenizer = load_tokenizer(huggingface_folder, chat_template=LOOSE_TEMPLATE)
    check_document(tokenizer, document, DocumentTokenizer(tokenizer)(document))


def test_a_straddling_token_belongs_to_the_response(huggingface_folder: Path) -> None:
    tokenizer = load_tokenizer(huggingface_folder, chat_template=LOOSE_TEMPLATE)
    document = PreferenceDocument("id", "Doc", (Turn("Q", "the object", "is a value", "Chunk"),))
    tokenized = DocumentTokenizer(tokenizer)(document)
    chosen, _ = tokenized.independent[0]
    assert tokenizer.decode(tokenized.document_tokens).endswith("Answer:")
    assert tokenizer.decode(chosen.response(0)) == " the object\n"


def test_a_token_that_straddles_the_end_belongs_to_the_response(huggingface_folder: Path) -> None:
    plural = (
        "{% for m in messages %}{% if m.role == 'user' %}s {{ m.content }}: {% else %}{{ m.content }}{% endif %}"
        "{% endfor %}"
    )
    tokenizer = load_tokenizer(huggingface_folder, chat_template=plural)
    turns = (Turn("Q", "the object", "some value", "Chunk"), Turn("R", "yes", "no", "Chunk"))
    tokenized = DocumentTokenizer(tokenizer)(PreferenceDocument("id", "Doc", turns))
    assert tokenized.joint is not None
    assert tokenizer.decode(tokenized.joint[CHOSEN].response(0)) == " the objects"
    check_document(tokenizer, PreferenceDocument("id", "Doc", turns), tokenized)


def test_response_tokens_are_what_trl_trains_on(huggingface_tokenizer: ChatTokenizer, huggingface_folder: Path) -> None:
    trl = pytest.importorskip("trl.data_utils")
    document = example(1)
    tokenized = DocumentTokenizer(huggingface_tokenizer)(document)
    prompt = messages(document, [0], CHOSEN)[:1]
    answers = {name: messages(document, [0], role)[1:] for role, name in enumerate(("chosen", "rejected"))}
    theirs = trl.apply_chat_template({"prompt": prompt, **answers}, AutoTokenizer.from_pretrained(huggingface_folder))
    assert tokenized.joint is not None
    for role, name in enumerate(("chosen", "rejected")):
        assert huggingface_tokenizer.decode(tokenized.joint[role].response(0)) == theirs[name]
        assert theirs[name].endswith("<|im_end|>\n")


def test_the_end_of_turn_token_is_part_of_every_response(sentencepiece_tokenizer: ChatTokenizer) -> None:
    tokenized = DocumentTokenizer(sentencepiece_tokenizer)(example(3))
    assert tokenized.joint is not None
    for branch in tokenized.joint:
        for turn in range(3):
            assert branch.response(turn)[-1] == sentencepiece_tokenizer.eos_id
            assert branch.response(turn).tolist().count(sentencepiece_tokenizer.eos_id) == 1


def test_the_document_comes_once_and_is_shared(tokenizer: ChatTokenizer) -> None:
    document = example(3)
    tokenized = DocumentTokenizer(tokenizer)(document)
    shared = tokenizer.decode(tokenized.document_tokens)
    assert document.document in shared
    assert tokenized.joint is not None
    assert document.document not in tokenizer.decode(tokenized.joint[CHOSEN].tokens)
    assert tokenizer.decode(tokenized.joint[CHOSEN].tokens).count("What is in part") >= 2
    for turn, short in enumerate(tokenized.short):
        assert f"chunk {turn}" in tokenizer.decode(short.prefix_tokens)
        assert document.document not in tokenizer.decode(short.prefix_tokens)


def test_the_document_is_shared_only_up_to_the_first_response(huggingface_tokenizer: ChatTokenizer) -> None:
    turn = Turn("Q", "The same beginning, then this.", "The same beginning, then that.", "chunk")
    tokenized = DocumentTokenizer(huggingface_tokenizer)(PreferenceDocument("id", "Doc", (turn,)))
    chosen, rejected = tokenized.independent[0]
    assert chosen.spans[0][1] == rejected.spans[0][1] == 0
    assert huggingface_tokenizer.decode(chosen.tokens).startswith("The same beginning")


def test_one_turn_is_joint_and_independent_at_once(tokenizer: ChatTokenizer) -> None:
    tokenized = DocumentTokenizer(tokenizer)(example(1))
    assert tokenized.joint == tokenized.independent[0]


def test_independent_turns_only(tokenizer: ChatTokenizer) -> None:
    both = DocumentTokenizer(tokenizer)(example(2))
    only = DocumentTokenizer(tokenizer, turns="independent")(example(2))
    assert only.joint is None and only.num_turns == 2
    assert [
        np.concatenate([only.document_tokens, branch.tokens]).tolist() for pair in only.independent for branch in pair
    ] == [
        np.concatenate([both.document_tokens, branch.tokens]).tolist() for pair in both.independent for branch in pair
    ]


def test_without_chunks_there_are_no_short_prompts(tokenizer: ChatTokenizer) -> None:
    turn = Turn("", "yes", "no", None)
    assert DocumentTokenizer(tokenizer)(PreferenceDocument("id", "Prompt?", (turn,))).short == ()


def test_messages_before_the_prompt_are_rendered(huggingface_tokenizer: ChatTokenizer) -> None:
    document = PreferenceDocument(
        "id",
        "Prompt?",
        (Turn("", "yes", "no", "Short?"),),
        long_context=(Message("system", "Be long."),),
        short_context=(Message("system", "Be short."),),
    )
    tokenized = DocumentTokenizer(huggingface_tokenizer)(document)
    decode = huggingface_tokenizer.decode
    assert decode(tokenized.document_tokens).startswith(
        "<|im_start|>system\nBe long.<|im_end|>\n<|im_start|>user\nPrompt?<"
    )
    assert decode(tokenized.short[0].prefix_tokens).startswith("<|im_start|>system\nBe short.")
    assert decode(tokenized.independent[0][REJECTED].response(0)) == "no<|im_end|>\n"


def test_a_template_that_rewrites_earlier_turns_needs_independent_ones(huggingface_folder: Path) -> None:
    tokenizer = load_tokenizer(huggingface_folder, chat_template=FORGETFUL_TEMPLATE)
    with pytest.raises(ValueError, match=r"'example'.*--turns independent"):
        DocumentTokenizer(tokenizer)(example(2))
    tokenized = DocumentTokenizer(tokenizer, turns="independent")(example(2))
    assert tokenizer.decode(tokenized.independent[1][CHOSEN].response(1)).startswith("<think>\n\n</think>\nPart 1")
    assert DocumentTokenizer(tokenizer)(example(1)).joint is not None


def test_where_an_empty_thought_goes(huggingface_folder: Path) -> None:
    """To the response, as the template renders it; to the prompt, where the template is told not to think."""
    for switch, in_response in (("", True), ("{%- set enable_thinking = false %}\n", False)):
        tokenizer = load_tokenizer(huggingface_folder, chat_template=switch + THINKING_TEMPLATE)
        tokenized = DocumentTokenizer(tokenizer)(example(1))
        assert tokenized.joint is not None
        prompt = tokenizer.decode(tokenized.document_tokens)
        response = tokenizer.decode(tokenized.joint[CHOSEN].response(0))
        assert response.startswith("<think>\n\n</think>\nPart 0") == in_response
        assert ("<think>" in prompt) != in_response and prompt.endswith("</think>\n") != in_response


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHATML_TEMPLATE.replace("assistant\n{% endif %}", "bot\n{% endif %}"), "own generation prompt"),
        (
            "{% for message in messages %}{% if message.role == 'user' %}{{ message.content }}{% endif %}{% endfor %}",
            "no token",
        ),
        ("{{ raise_exception('never') }}", "refuses the conversation: never"),
    ],
)
def test_templates_that_hide_the_answer(huggingface_folder: Path, template: str, message: str) -> None:
    tokenizer = load_tokenizer(huggingface_folder, chat_template=template)
    with pytest.raises(ValueError, match=f"'example'.*{message}"):
        DocumentTokenizer(tokenizer)(example(1))


def test_prompt_template_fills_text_that_looks_like_placeholders() -> None:
    template = PromptTemplate("{instruction} <{document}> {x}")
    assert template.fill("{instruction}", "{document}{}") == "{document}{} <{instruction}> {x}"
    assert PromptTemplate().fill("doc", "ask") == "doc\n\nask"
    assert PromptTemplate().fill("all in one", "") == "all in one"


@pytest.mark.parametrize("template", ["{document}", "{instruction}", "{document}{document}{instruction}", ""])
def test_prompt_templates_need_both_placeholders_once(template: str) -> None:
    with pytest.raises(ValueError, match=r"--prompt-template .* exactly once"):
        PromptTemplate(template)


def sequence(tokens: list[int], *responses: range) -> TokenSequence:
    is_response = np.zeros(len(tokens), dtype=bool)
    for response in responses:
        is_response[response] = True
    return TokenSequence(np.array(tokens, dtype=np.int32), is_response)


def test_rows_that_are_already_tokens() -> None:
    pair = TokenizedPair(
        id="row",
        chosen=sequence([1, 2, 3, 4, 5, 6, 7], range(3, 4), range(5, 7)),
        rejected=sequence([1, 2, 3, 8, 9, 5, 6], range(3, 5), range(6, 7)),
        short_chosen=(sequence([1, 3, 4], range(2, 3)), sequence([1, 5, 6, 7], range(2, 4))),
        short_rejected=(sequence([1, 3, 8, 9], range(2, 4)), sequence([1, 5, 6], range(2, 3))),
    )
    tokenized = tokenized_pair(pair)
    assert tokenized.document_tokens.tolist() == [1, 2, 3]
    assert tokenized.joint is not None and tokenized.independent == () and tokenized.num_turns == 2
    assert [branch.spans for branch in tokenized.joint] == [((0, 0, 1), (1, 2, 4)), ((0, 0, 2), (1, 3, 4))]
    assert tokenized.short[1].prefix_tokens.tolist() == [1, 5]
    assert tokenized.short[1].chosen.response(1).tolist() == [6, 7]
