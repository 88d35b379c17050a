"""verl's fused log p and entropy, by this package's kernels.

>>> from egrsd_kernels.verl import fuse_heads
>>> fuse_heads()

verl's workers are processes of their own, where ``actor_rollout_ref.model.external_lib`` does it, set to
``egrsd_kernels.verl.external_lib``. Importing this package changes nothing.
"""

from .fused_head import fuse_heads, linear_cross_entropy, unfuse_heads

__all__ = ["fuse_heads", "linear_cross_entropy", "unfuse_heads"]
