"""Element-wise work of the model in one pass over memory each, as Triton kernels.

On a GPU the operators between matrix products are as slow as what they read and write. torch's own take a pass for
every operation, and on halves of a tensor at a third of the memory's speed. Every kernel here has a plain twin of
torch's operators beside its caller, which computes the same on CPUs, in fp64 and where Triton is missing.
"""

from megatron_longpo.gpu_kernels.available import has_kernels

__all__ = ["has_kernels"]
