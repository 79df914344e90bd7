"""The model: shape, layer specs, rotary embedding, log-probs out."""

import megatron_longpo.platform  # noqa: F401  before anything of Megatron-Core
