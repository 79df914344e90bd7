"""The seven steps for one document: instructions, one drawn, a good answer from the chunk, a worse one from the whole.

    pools      chunk                 -> instructions      sampled; asked again where no list can be read
    drawn      one instruction per chunk, none that asks for the same as another chunk's
    chosen     chunk + instruction   -> answer            greedy, filtered
    rejected   document + instruction-> answer            greedy, filtered; only where the chosen answer is of use

The result depends on the document, the seed and the engine's answers, and on nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from megatron_longpo.data.tokenize import PromptTemplate
from megatron_longpo.generation.chunking import Chunk
from megatron_longpo.generation.draw import draw, shuffled
from megatron_longpo.generation.engine import Answer, Ask, DocumentError, Request
from megatron_longpo.generation.filters import AnswerFilter
from megatron_longpo.generation.instructions import asks_for_the_same, parse_pool
from megatron_longpo.generation.prompts import PromptWriter
from megatron_longpo.generation.settings import GenerationSettings


@dataclass(frozen=True)
class DocumentPlan:
    """A document with the chunks that were drawn for it; ``dropped`` says why it is of no use."""

    index: int
    id: str
    text: str
    num_tokens: int = 0
    chunks: tuple[Chunk, ...] = ()
    dropped: str = ""


@dataclass(frozen=True)
class TurnOutcome:
    """A turn of the pairs file, with lengths in tokens."""

    chunk_span: tuple[int, int]
    instruction: str
    chosen: str
    rejected: str
    chunk_tokens: int
    chosen_tokens: int
    rejected_tokens: int


@dataclass
class Outcome:
    """What became of a document.

    Args:
        index: Its place among all documents.
        id: Its id.
        document_tokens: Its length.
        turns: What goes into the pairs file.
        dropped: Why the document gives no pair; empty where it does.
        num_planned: Turns that were tried.
        dropped_turns: How many of them were dropped, by reason.
        prompt_tokens, completion_tokens: Cost.
    """

    index: int
    id: str
    document_tokens: int = 0
    turns: list[TurnOutcome] = field(default_factory=list)
    dropped: str = ""
    num_planned: int = 0
    dropped_turns: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        # asdict rebuilds a Counter from its items, which would count them.
        return {**asdict(replace(self, dropped_turns=Counter())), "dropped_turns": dict(self.dropped_turns)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Outcome:
        """What `to_dict` gave, also after a way through JSON."""
        turns = [TurnOutcome(**{**turn, "chunk_span": tuple(turn["chunk_span"])}) for turn in values["turns"]]
        return cls(**{**values, "turns": turns, "dropped_turns": Counter(values["dropped_turns"])})


@dataclass
class _Turn:
    """A turn in the making."""

    number: int  # of the chunk, in the drawn order
    chunk: Chunk
    chunk_text: str
    instruction: str = ""
    chosen: Answer | None = None


class Rollout:
    """Runs the steps with the settings of a run."""

    def __init__(self, settings: GenerationSettings, prompts: PromptWriter) -> None:
        self._settings = settings
        self._prompts = prompts
        self._filter = AnswerFilter(settings.filters, settings.max_repetition)
        self._message = PromptTemplate(settings.prompt_template)

    async def __call__(self, plan: DocumentPlan, ask: Ask) -> Outcome:
        """The outcome of one document.

        Raises:
            EngineError: From ``ask``.
        """
        outcome = Outcome(plan.index, plan.id, plan.num_tokens, dropped=plan.dropped)
        if plan.dropped:
            return outcome
        outcome.num_planned = len(plan.chunks)

        async def counted(requests: Sequence[Request]) -> list[Answer]:
            answers = await ask(requests) if requests else []
            outcome.prompt_tokens += sum(answer.num_prompt_tokens for answer in answers)
            outcome.completion_tokens += sum(answer.num_completion_tokens for answer in answers)
            return answers

        try:
            turns = await self._instructions(plan, counted, outcome)
            turns = await self._chosen(turns, counted, outcome)
            await self._rejected(plan, turns, counted, outcome)
        except DocumentError as error:
            # Half of a document's turns would depend on when the error came.
            outcome.turns.clear()
            outcome.dropped_turns = Counter({error.reason: outcome.num_planned})
            outcome.dropped = error.reason
        if not outcome.turns and not outcome.dropped:
            outcome.dropped = "no_usable_turn"
        return outcome

    async def _instructions(self, plan: DocumentPlan, ask: Ask, outcome: Outcome) -> list[_Turn]:
        settings = self._settings
        turns = [_Turn(i, chunk, plan.text[slice(*chunk.span)]) for i, chunk in enumerate(plan.chunks)]
        pools: dict[int, list[str]] = {}
        for attempt in range(settings.instruction_attempts):
            missing = [turn for turn in turns if turn.number not in pools]
            replies = await ask([self._pool_request(plan.id, turn, attempt) for turn in missing])
            for turn, reply in zip(missing, replies, strict=True):
                if not reply.broken_off and (pool := parse_pool(reply.text)):
                    pools[turn.number] = pool
        taken: list[str] = []
        drawn = []
        for turn in turns:
            if turn.number not in pools:
                outcome.dropped_turns["no_instruction"] += 1
                continue
            candidates = shuffled(pools[turn.number], settings.seed, plan.id, "instruction", turn.number)
            new = next((text for text in candidates if not asks_for_the_same(text, taken)), None)
            if new is None:
                outcome.dropped_turns["same_instruction"] += 1
                continue
            taken.append(new)
            turn.instruction = self._prompts.phrase(plan.id, turn.number) + new
            drawn.append(turn)
        return drawn

    def _pool_request(self, document_id: str, turn: _Turn, attempt: int) -> Request:
        settings = self._settings
        return Request(
            self._prompts.pool_request(turn.chunk_text, document_id, turn.number),
            settings.max_instruction_tokens,
            settings.temperature,
            settings.top_p,
            # Servers take a seed of 31 bits.
            draw(settings.seed, document_id, "pool", turn.number, attempt) % 2**31,
            text_tokens=turn.chunk.num_tokens,
        )

    async def _chosen(self, turns: list[_Turn], ask: Ask, outcome: Outcome) -> list[_Turn]:
        limit = self._settings.max_answer_tokens
        requests = [
            Request(self._message.fill(t.chunk_text, t.instruction), limit, text_tokens=t.chunk.num_tokens)
            for t in turns
        ]
        answers = await ask(requests)
        kept = []
        for turn, answer in zip(turns, answers, strict=True):
            if problem := self._filter.problem(answer, turn.chunk_text, turn.instruction):
                outcome.dropped_turns[f"chosen_{problem}"] += 1
                continue
            turn.chosen = answer
            kept.append(turn)
        return kept

    async def _rejected(self, plan: DocumentPlan, turns: list[_Turn], ask: Ask, outcome: Outcome) -> None:
        limit = self._settings.max_answer_tokens
        requests = [
            Request(
                self._message.fill(plan.text, t.instruction), limit, whole_document=True, text_tokens=plan.num_tokens
            )
            for t in turns
        ]
        for turn, answer in zip(turns, await ask(requests), strict=True):
            assert turn.chosen is not None
            if problem := self._filter.problem(answer, turn.chunk_text, turn.instruction):
                outcome.dropped_turns[f"rejected_{problem}"] += 1
            elif answer.text.strip() == turn.chosen.text.strip():
                outcome.dropped_turns["identical_answers"] += 1
            else:
                outcome.turns.append(
                    TurnOutcome(
                        turn.chunk.span,
                        turn.instruction,
                        turn.chosen.text.strip(),
                        answer.text.strip(),
                        turn.chunk.num_tokens,
                        turn.chosen.num_completion_tokens,
                        answer.num_completion_tokens,
                    )
                )
