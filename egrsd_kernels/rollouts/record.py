"""One response with its per-token numbers: what a rollout file holds a line of, and the token page shows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from egrsd_kernels.credit import TokenStats

NUMBERS = ("entropy", "lookahead_entropy", "gate", "magnitude", "log_ratio", "token_advantage")
"""Fields of :class:`Rollout` with one number for each token."""

OPTIONAL_NUMBERS = ("student_logp", "teacher_logp")
"""The same, where known."""


@dataclass(frozen=True)
class Rollout:
    """One response with its per-token numbers; the sequences have one entry for each token.

    Entropies and logarithms of probabilities are in nats. A ValueError names a sequence of the wrong length.

    ``prompt`` and ``reference`` are shown as text. ``tokens`` are the decoded tokens of the response, one string each.
    ``title`` is free, for example "step 40". ``vocab_size`` is V, and ``step`` the optimizer step that the response was
    sampled for; both may be unknown. ``reward`` is None or NaN where nothing could judge the response.
    """

    prompt: str
    tokens: Sequence[str]
    entropy: Sequence[float]
    lookahead_entropy: Sequence[float]
    gate: Sequence[float]
    magnitude: Sequence[float]
    log_ratio: Sequence[float]
    token_advantage: Sequence[float]
    reward: float | None
    advantage: float
    reference: str | None = None
    title: str = ""
    student_logp: Sequence[float] | None = None
    teacher_logp: Sequence[float] | None = None
    vocab_size: int | None = None
    step: int | None = None

    def __post_init__(self) -> None:
        for name, values in self.numbers().items():
            if len(values) != len(self.tokens):
                raise ValueError(
                    f"{name}: expected one value for each of the {len(self.tokens)} tokens, got {len(values)}"
                )

    def numbers(self) -> dict[str, Sequence[float]]:
        """The sequences with one number for each token, by field name; those that are None are left out."""
        values = {name: getattr(self, name) for name in (*NUMBERS, *OPTIONAL_NUMBERS)}
        return {name: sequence for name, sequence in values.items() if sequence is not None}

    @classmethod
    def from_stats(
        cls,
        stats: TokenStats,
        row: int,
        *,
        prompt: str,
        tokens: Sequence[str],
        reward: float | None,
        advantage: float,
        reference: str | None = None,
        title: str = "",
        vocab_size: int | None = None,
        step: int | None = None,
    ) -> "Rollout":
        """Row ``row`` of (B, T) statistics, whose first ``len(tokens)`` positions are the response."""

        def numbers(values: torch.Tensor) -> list[float]:
            return values[row, : len(tokens)].tolist()

        return cls(
            prompt=prompt,
            tokens=tokens,
            entropy=numbers(stats.teacher_entropy),
            lookahead_entropy=numbers(stats.lookahead_entropy),
            gate=numbers(stats.gate),
            magnitude=numbers(stats.magnitude),
            log_ratio=numbers(stats.teacher_logp - stats.student_logp),
            token_advantage=numbers(stats.token_advantage),
            student_logp=numbers(stats.student_logp),
            teacher_logp=numbers(stats.teacher_logp),
            reward=reward,
            advantage=advantage,
            reference=reference,
            title=title,
            vocab_size=vocab_size,
            step=step,
        )
