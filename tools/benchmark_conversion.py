"""Speed and peak memory of checkpoint conversion on a random checkpoint, against transformers.

python tools/benchmark_conversion.py --gigabytes 8 --results benchmarks/results
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `benchmarks`, which is no part of the installed package

from benchmarks.conversion import main

if __name__ == "__main__":
    sys.exit(main())
