"""What a training loop needs around the loss: advantages, rewards, the teacher's prompt, and aligned batches."""

from .advantages import WelfordAdvantage
from .alignment import AlignedBatch, align_responses, pad_inputs, response_hidden, response_positions
from .prompts import TWO_TURN, Message, teacher_messages
from .rewards import length_shaped_reward

__all__ = [
    "TWO_TURN", "AlignedBatch", "Message", "WelfordAdvantage", "align_responses", "length_shaped_reward", "pad_inputs",
    "response_hidden", "response_positions", "teacher_messages",
]  # fmt: skip
