import megatron_longpo.platform  # noqa: F401  before anything of Megatron-Core
