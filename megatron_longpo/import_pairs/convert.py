"""Files of pairs in any format that is read, to one file of schema 1: one row at a time, all or nothing.

Rows of schema 1 pass unchanged. TRL rows keep every character. Tokenized rows are converted if preprocessing the result
gives their own tokens again, and are otherwise left out and counted by reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_longpo.data.chat_tokenizer import ChatTokenizer
from megatron_longpo.data.tokenize import DEFAULT_PROMPT_TEMPLATE, PromptTemplate
from megatron_longpo.data.tokenizer import TokenizerSpec
from megatron_longpo.files import check_writable
from megatron_longpo.import_pairs.text import SPLIT, SPLIT_UNSURE, WHOLE, split_document
from megatron_longpo.import_pairs.tokenized import REASONS, NotConvertible, TokenizedConverter
from megatron_longpo.pair_formats.counting import count_rows
from megatron_longpo.pair_formats.document import Location, PairsRow, PreferenceDocument, TokenizedPair
from megatron_longpo.pair_formats.raw import input_files
from megatron_longpo.pairs import SCHEMA_1, TRL, read_formats, write_pairs

_NUM_EXAMPLES = 3


@dataclass(frozen=True)
class ImportOptions:
    """The flags of tools/import_pairs.py.

    Args:
        inputs: ``--input``: files or folders.
        output: ``--output``: the file of schema 1.
        tokenizer: ``--tokenizer-model`` and ``--chat-template``: what made the tokens of tokenized rows.
        prompt_template: ``--prompt-template``: what made the user's messages.
    """

    inputs: tuple[str, ...]
    output: str
    tokenizer: TokenizerSpec | None = None
    prompt_template: str = DEFAULT_PROMPT_TEMPLATE


@dataclass
class ImportCounts:
    """What became of the rows.

    Args:
        read: Rows by format.
        turns: Turns written.
        spans: Turns whose chunk was found in the document.
        prompts: Prompts without an instruction of their own, by what was done with them (`text.py`).
        dropped: Rows that were left out, by reason.
        examples: The first places of each reason.
    """

    read: Counter[str] = field(default_factory=Counter)
    turns: int = 0
    spans: int = 0
    prompts: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Location]] = field(default_factory=dict)


def import_pairs(options: ImportOptions, progress: bool = True) -> ImportCounts:
    """Write ``--output``, or nothing.

    Raises:
        ValueError: A flag, a file or a row is unusable, or no row could be converted; the message says what to do.
    """
    files = input_files(options.inputs)
    if any(file.exists() and Path(options.output).exists() and file.samefile(options.output) for file in files):
        raise ValueError(f"--output {options.output} is one of the files of --input: give another name")
    check_writable(options.output, "--output", "pairs.jsonl")
    template = PromptTemplate(options.prompt_template)
    tokenizer = options.tokenizer.load() if options.tokenizer else None
    counts = ImportCounts()
    bar = tqdm(
        read_formats(files),
        total=count_rows(files) if progress else None,
        desc="import",
        unit="row",
        disable=None if progress else True,
    )
    with bar:
        write_pairs(options.output, _documents(bar, template, tokenizer, counts))
    return counts


def summary_table(counts: ImportCounts) -> str:
    """What was written and what was left out, as aligned lines."""
    rows = [(f"rows read: {name}", count) for name, count in counts.read.items()]
    rows += [
        ("documents written", counts.read.total() - counts.dropped.total()),
        ("turns written", counts.turns),
        ("chunks found in their document", counts.spans),
        ("prompts: document and instruction told apart", counts.prompts[SPLIT]),
        ("prompts: told apart, shortest instruction taken", counts.prompts[SPLIT_UNSURE]),
        ("prompts: left whole, instruction inside", counts.prompts[WHOLE]),
    ]
    rows += [(f"left out: {REASONS[reason]}", count) for reason, count in counts.dropped.most_common()]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {count:>9,}" for name, count in rows]
    for reason, places in counts.examples.items():
        lines.append(f"{reason}, the first: {', '.join(map(str, places))}")
    return "\n".join(lines)


def _documents(
    rows: Iterable[tuple[str, PairsRow]],
    template: PromptTemplate,
    tokenizer: ChatTokenizer | None,
    counts: ImportCounts,
) -> Iterator[PreferenceDocument]:
    converter = TokenizedConverter(tokenizer, template) if tokenizer else None
    for name, row in rows:
        counts.read[name] += 1
        document: PreferenceDocument | None
        if isinstance(row, TokenizedPair):
            document = _tokenized(row, converter, counts)
        elif name == TRL:
            document = _trl(row, template, counts)
        else:
            assert name == SCHEMA_1
            document = row
        if document is not None:
            counts.turns += len(document.turns)
            counts.spans += sum(turn.chunk_span is not None for turn in document.turns)
            yield document
    if counts.dropped.total() == counts.read.total():
        reason, count = counts.dropped.most_common(1)[0]
        raise ValueError(
            f"none of {counts.read.total()} rows could be converted, so nothing is written; {count} of them because: "
            f"{REASONS[reason]} (the first: {counts.examples[reason][0]}). Give the tokenizer, --chat-template and "
            f"--prompt-template that made the rows, or train on the rows as they are"
        )


def _trl(row: PreferenceDocument, template: PromptTemplate, counts: ImportCounts) -> PreferenceDocument:
    document, what = split_document(row, template)
    counts.prompts[what] += 1
    return replace(document, provenance=_provenance("trl", row.location, what))


def _tokenized(
    row: TokenizedPair, converter: TokenizedConverter | None, counts: ImportCounts
) -> PreferenceDocument | None:
    if converter is None:
        raise ValueError(
            f"{row.location}: the row holds tokens, not text: give the tokenizer that made them with --tokenizer-model"
        )
    try:
        converted = converter(row)
    except NotConvertible as error:
        counts.dropped[error.reason] += 1
        examples = counts.examples.setdefault(error.reason, [])
        if row.location and len(examples) < _NUM_EXAMPLES:
            examples.append(row.location)
        return None
    what = WHOLE
    if converted.has_short_prompts:
        what = SPLIT if converted.instruction_is_certain else SPLIT_UNSURE
    counts.prompts[what] += 1
    return replace(converted.document, provenance=_provenance("tokenized", row.location, what))


def _provenance(kind: str, location: Location | None, prompt: str) -> dict[str, Any]:
    source = {"file": Path(location.file).name, "line": location.line} if location else {}
    return {"imported_from": {"format": kind, **source, "prompt": prompt}}
