"""Make preference pairs from long documents with a model's own answers:

    python tools/generate_pairs.py --documents 'corpus/*.jsonl' --output pairs/ --engine transformers --model DIR

writes pairs/pairs.jsonl. docs/generation.md has the pipeline, servers and Slurm.
"""

import sys

from megatron_longpo.generation.command import main

if __name__ == "__main__":
    sys.exit(main())
