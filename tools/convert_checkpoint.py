"""Convert checkpoints between Hugging Face and Megatron, and compare the two.

python tools/convert_checkpoint.py hf-to-megatron --hf-model DIR --save DIR
python tools/convert_checkpoint.py megatron-to-hf --load DIR --hf-model TEMPLATE_DIR --save DIR
python tools/convert_checkpoint.py verify --hf-model DIR --megatron DIR --torchrun tp=1 tp=2 pp=2
"""

import sys

from megatron_longpo.convert_checkpoint import main
from megatron_longpo.processes import take_sigterm_as_ctrl_c

if __name__ == "__main__":
    take_sigterm_as_ctrl_c()
    sys.exit(main())
