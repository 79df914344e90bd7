"""Speed and peak memory of one training step: shared prefix, two full sequences, TRL's DPOTrainer.

python tools/benchmark_step.py [--prefix-tokens 8192] [--response-tokens 128] [--turns 1] [--json]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `benchmarks`, which is no part of the installed package

from benchmarks.step.run import main

if __name__ == "__main__":
    sys.exit(main())
