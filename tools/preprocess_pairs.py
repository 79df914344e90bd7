"""Tokenize a pairs file for training:

    python tools/preprocess_pairs.py --input pairs.jsonl \\
        --tokenizer-model DIR_OR_MODEL --output-prefix data/pairs

writes data/pairs.bin, data/pairs.idx and data/pairs.manifest.json. docs/data.md has the formats.
"""

from __future__ import annotations

import argparse

from megatron_longpo.data.document import TURNS
from megatron_longpo.data.manifest import manifest_path
from megatron_longpo.data.outcome import PreprocessOptions
from megatron_longpo.data.tokenize import DEFAULT_PROMPT_TEMPLATE
from megatron_longpo.data.tokenizer import HUGGING_FACE, SENTENCE_PIECE, TokenizerSpec
from megatron_longpo.help_format import HelpFormatter
from megatron_longpo.processes import plain_ending


def main() -> None:
    """Parse the command line, preprocess, and print what became of the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="FILE", help="pairs: .jsonl, .json, .parquet, .arrow, or folders")
    add("--output-prefix", required=True, metavar="PREFIX", help="where PREFIX.bin, .idx and .manifest.json go")
    add("--tokenizer-model", required=True, metavar="DIR_OR_MODEL", help="tokenizer folder or SentencePiece .model")
    add(
        "--tokenizer-type",
        choices=(HUGGING_FACE, SENTENCE_PIECE),
        metavar="TYPE",
        help=f"{HUGGING_FACE} or {SENTENCE_PIECE} (default: by --tokenizer-model)",
    )
    add("--chat-template", metavar="FILE", help="Jinja chat template (default: the tokenizer's own)")
    add("--trust-remote-code", action="store_true", help="run Python code from the tokenizer's folder")
    add("--workers", type=int, default=1, metavar="N", help="processes that tokenize")
    add("--max-seq-length", type=int, metavar="TOKENS", help="longest conversation to keep (default: no limit)")
    add("--truncate-document", action="store_true", help="cut the middle of over-long documents instead of dropping")
    add(
        "--prompt-template",
        default=DEFAULT_PROMPT_TEMPLATE,
        metavar="TEXT",
        help=r"user message of a document's first turn (default: '{document}\n\n{instruction}'); \n is a line break",
    )
    add("--turns", choices=TURNS, default="joint", help="conversations to keep; joint keeps both kinds")
    arguments = parser.parse_args()

    with plain_ending("preprocess_pairs.py", manifest_path(arguments.output_prefix)):
        options = PreprocessOptions(
            inputs=tuple(arguments.input),
            output_prefix=arguments.output_prefix,
            tokenizer=TokenizerSpec(
                arguments.tokenizer_model,
                arguments.tokenizer_type,
                arguments.chat_template,
                arguments.trust_remote_code,
            ),
            num_workers=arguments.workers,
            max_seq_length=arguments.max_seq_length,
            truncate_document=arguments.truncate_document,
            prompt_template=arguments.prompt_template.replace("\\n", "\n"),
            turns=arguments.turns,
        )
        # Imported here: worker processes import this script too, and have no use for torch and megatron.
        from megatron_longpo.data.preprocess import preprocess, summary_table

        print(summary_table(preprocess(options)))


if __name__ == "__main__":
    main()
