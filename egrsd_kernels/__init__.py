"""Fused Triton kernels for entropy-guided reinforced self-distillation (EGRSD, CL-EGRSD; arXiv 2605.13255)."""

from .backends import DivergenceStatistics, VocabularyStatistics
from .credit import TokenStats
from .divergence import linear_divergence
from .head import Head
from .logp import linear_logp
from .loss import fused_egrsd_loss
from .models import head_of, read_hidden, with_head
from .statistics import TokenStatistics, token_statistics

__version__ = "0.1.0"
__all__ = [
    "DivergenceStatistics", "Head", "TokenStatistics", "TokenStats", "VocabularyStatistics", "fused_egrsd_loss",
    "head_of", "linear_divergence", "linear_logp", "read_hidden", "token_statistics", "with_head",
]  # fmt: skip
