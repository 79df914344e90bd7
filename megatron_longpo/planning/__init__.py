"""Plans of runs: memory measured without a GPU, time predicted, layouts ranked."""

import megatron_longpo.platform  # noqa: F401  before anything of Megatron-Core
