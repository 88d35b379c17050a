"""What a training loop needs around the loss: advantages, rewards, the teacher's prompt, and aligned batches."""

from .advantages import WelfordAdvantage
from .alignment import AlignedBatch, align_responses, pad_inputs, response_hidden, response_positions
from .prompts import TWO_TURN, Message, teacher_messages
from .rewards import length_shaped_reward
from .token_advantages import (
    TOKEN_ADVANTAGES,
    ContextStatistics,
    TokenAdvantage,
    TokenEvidence,
    apply_token_advantage,
    position_weights,
    token_stats,
)

__all__ = [
    "TOKEN_ADVANTAGES", "TWO_TURN", "AlignedBatch", "ContextStatistics", "Message", "TokenAdvantage", "TokenEvidence",
    "WelfordAdvantage", "align_responses", "apply_token_advantage", "length_shaped_reward", "pad_inputs",
    "position_weights", "response_hidden", "response_positions", "teacher_messages", "token_stats",
]  # fmt: skip
