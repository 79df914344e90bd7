"""Make preference pairs from long documents with a model's own answers:

    python tools/generate_pairs.py --documents 'corpus/*.jsonl' --output pairs/ --engine transformers --model DIR

writes pairs/pairs.jsonl. docs/generation.md has the pipeline, servers and Slurm.
"""

from megatron_longpo.generation.command import main
from megatron_longpo.processes import end_without_threads

if __name__ == "__main__":
    if code := main():
        end_without_threads(code)
