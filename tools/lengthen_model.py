"""Make a folder of a model for a server that reads whole documents:

    python tools/lengthen_model.py --hf-model DIR --save DIR --max-position-embeddings 135168 --rotary-base 1e7

docs/generation.md says when.
"""

from megatron_longpo.generation.long_model import main

if __name__ == "__main__":
    main()
