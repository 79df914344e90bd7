"""Speed and peak memory of checkpoint conversion on a random checkpoint, against transformers.

python tools/benchmark_conversion.py --gigabytes 8 --results benchmarks/results
"""

import sys

from megatron_longpo.conversion.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
