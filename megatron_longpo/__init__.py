"""LongPO on Megatron-Core: grow a language model from short to long context by itself."""

import warnings

# Megatron-Core says these in every process at import; they are true of every machine without TE or Apex, and no news.
for _message in (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "The imports here result in a cyclic import",
    "The following imports from `dynamic_context.py`",
    "full scope is deprecated",
    "`torch.jit.script",
):
    warnings.filterwarnings("ignore", message=f".*{_message}")
