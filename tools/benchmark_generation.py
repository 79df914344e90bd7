"""The pipeline's own cost while it makes pairs, and what one prefill for all turns of a document saves.

python tools/benchmark_generation.py --results benchmarks/results
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `benchmarks`, which is no part of the installed package

from benchmarks.generation.run import main

if __name__ == "__main__":
    main()
