"""The method in plain PyTorch over full logits: what every test trusts."""

from .egrsd import (
    IGNORE_INDEX,
    TokenStats,
    direction,
    egrsd_loss,
    entropy,
    entropy_scale,
    gate,
    log_prob,
    log_ratio,
    logits,
    lookahead_entropy,
    magnitude,
    normalised_entropy,
    token_advantage,
)

__all__ = [
    "IGNORE_INDEX",
    "TokenStats",
    "direction",
    "egrsd_loss",
    "entropy",
    "entropy_scale",
    "gate",
    "log_prob",
    "log_ratio",
    "logits",
    "lookahead_entropy",
    "magnitude",
    "normalised_entropy",
    "token_advantage",
]
