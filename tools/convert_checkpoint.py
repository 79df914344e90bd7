"""Convert checkpoints between Hugging Face and Megatron, and compare the two.

python tools/convert_checkpoint.py hf-to-megatron --hf-model DIR --save DIR
python tools/convert_checkpoint.py megatron-to-hf --load DIR --hf-model TEMPLATE_DIR --save DIR
python tools/convert_checkpoint.py verify --hf-model DIR --megatron DIR --torchrun tp=1 tp=2 pp=2
"""

import sys

from megatron_longpo.convert_checkpoint import main

if __name__ == "__main__":
    sys.exit(main())
