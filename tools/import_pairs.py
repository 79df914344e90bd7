"""Convert preference sets to a pairs file of schema 1:

    python tools/import_pairs.py --input trl.jsonl --output pairs.jsonl
    python tools/import_pairs.py --input released/ --output pairs.jsonl \\
        --tokenizer-model models/mistral-7b

Reads TRL preference rows, the LongPO authors' tokenized sets and schema 1 itself. docs/pairs-tools.md has the rules.
"""

from __future__ import annotations

import argparse

from megatron_longpo.data.tokenize import DEFAULT_PROMPT_TEMPLATE
from megatron_longpo.data.tokenizer import HUGGING_FACE, SENTENCE_PIECE, TokenizerSpec
from megatron_longpo.help_format import HelpFormatter
from megatron_longpo.processes import plain_ending


def main() -> None:
    """Parse the command line, convert, and print what became of the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="FILE", help="pairs: .jsonl, .json, .parquet, .arrow, or folders")
    add("--output", required=True, metavar="FILE", help="pairs file of schema 1 to write")
    add("--tokenizer-model", metavar="DIR_OR_MODEL", help="tokenizer that made the tokens; only tokenized rows need it")
    add(
        "--tokenizer-type",
        choices=(HUGGING_FACE, SENTENCE_PIECE),
        metavar="TYPE",
        help=f"{HUGGING_FACE} or {SENTENCE_PIECE} (default: by --tokenizer-model)",
    )
    add("--chat-template", metavar="FILE", help="Jinja chat template (default: the tokenizer's own)")
    add("--trust-remote-code", action="store_true", help="run Python code from the tokenizer's folder")
    add(
        "--prompt-template",
        default=DEFAULT_PROMPT_TEMPLATE,
        metavar="TEXT",
        help=r"template of the user messages (default: '{document}\n\n{instruction}'); \n is a line break",
    )
    arguments = parser.parse_args()
    needs_tokenizer = ("tokenizer_type", "chat_template", "trust_remote_code")
    for name in needs_tokenizer if arguments.tokenizer_model is None else ():
        if getattr(arguments, name):
            parser.error(f"--{name.replace('_', '-')} has no effect without --tokenizer-model: give that too")

    tokenizer = None
    if arguments.tokenizer_model is not None:
        tokenizer = TokenizerSpec(arguments.tokenizer_model, *(getattr(arguments, name) for name in needs_tokenizer))
    with plain_ending("import_pairs.py", arguments.output):
        # Imported here: Ctrl-C ends plainly from now on.
        from megatron_longpo.import_pairs.convert import ImportOptions, import_pairs, summary_table

        options = ImportOptions(
            inputs=tuple(arguments.input),
            output=arguments.output,
            tokenizer=tokenizer,
            prompt_template=arguments.prompt_template.replace("\\n", "\n"),
        )
        print(summary_table(import_pairs(options)))


if __name__ == "__main__":
    main()
