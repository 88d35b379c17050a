"""Sequence advantages from running statistics of the reward (arXiv 2605.13255)."""

import math

import torch
from torch import Tensor

from egrsd_kernels.checks import expect, number, tensor


class WelfordAdvantage:
    """A_i = (r_i − r̄_{<s}) / σ_{<s}, with running statistics over all rewards of the steps before step s.

    A batch is whitened with the statistics that precede it and merged into them afterwards, so no rollout takes part in
    its own baseline. For the first ``warmup_steps`` steps, when there is little history, A_i = r_i − 0.5.

    Under data parallelism gather the rewards of all ranks first: every rank then holds the same statistics.

    A rollout that no verifier could judge has no reward: where ``judged`` is False, A = 0 and the reward, which may be
    NaN, enters no statistics. A batch in which nothing is judged is no step, so it uses up none of ``warmup_steps``.

    Args:
        warmup_steps: steps that use the fixed baseline.
        warmup_baseline: that baseline.
        min_std: a σ at or below this counts as "every reward so far was the same". There is no scale to divide by then,
            and dividing by a tiny floor would blow up the first reward that differs, so A is left at r − r̄.

    Example::

        advantage = WelfordAdvantage()
        for rewards in batches:          # (B,) each
            A = advantage(rewards)       # (B,) float32; with NaN among them: judged=~rewards.isnan()
    """

    def __init__(self, warmup_steps: int = 10, warmup_baseline: float = 0.5, min_std: float = 1e-6):
        if warmup_steps < 1:
            raise ValueError(f"warmup_steps: expected at least 1 (the first step has no history), got {warmup_steps}")
        self.warmup_steps = warmup_steps
        self.warmup_baseline = number("warmup_baseline", warmup_baseline)
        self.min_std = number("min_std", min_std, low=0)
        self.steps = 0
        # Python floats are float64: long runs neither lose small updates nor depend on the default dtype.
        self.count = 0
        self.mean = 0.0
        self._m2 = 0.0  # Σ (r − r̄)²

    @property
    def std(self) -> float:
        """σ over all rewards merged so far (population form, Σ (r − r̄)² / n); 0 before the first."""
        return math.sqrt(self._m2 / self.count) if self.count else 0.0

    def __call__(self, rewards: Tensor, judged: Tensor | None = None) -> Tensor:
        """Advantages (B,) float32 of one step's rewards (B,), then merge the rewards into the statistics.

        judged: (B,) bool, False for a rollout that has no reward. Default: all have one.
        """
        tensor("rewards", rewards)
        expect(rewards.ndim == 1 and rewards.numel() > 0, "rewards", rewards, "shape (B,) with B > 0")
        expect(not rewards.is_complex(), "rewards", rewards, "real numbers", TypeError)
        values = rewards.detach().double()
        if judged is not None:
            tensor("judged", judged, shape=rewards.shape, like=rewards)
            expect(judged.dtype == torch.bool, "judged", judged, "a bool tensor", TypeError)
            values = values[judged]
            if not len(values):
                return torch.zeros_like(rewards, dtype=torch.float32)
        batch_mean, batch_m2 = values.mean().item(), (values - values.mean()).square().sum().item()
        if not math.isfinite(batch_mean + batch_m2):  # one NaN would poison the statistics for the rest of the run
            raise ValueError(
                f"rewards: expected finite values of finite variance (see judged for one not known), "
                f"got {rewards.tolist()}"
            )

        if self.steps < self.warmup_steps:
            advantages = values - self.warmup_baseline
        else:
            std = self.std
            advantages = (values - self.mean) / (std if std > self.min_std else 1.0)

        self._merge(len(values), batch_mean, batch_m2)
        self.steps += 1
        if judged is not None:
            advantages = torch.zeros_like(rewards, dtype=torch.float64).masked_scatter_(judged, advantages)
        return advantages.float()

    def _merge(self, count: int, mean: float, m2: float) -> None:
        # Chan, Golub & LeVeque: Welford's update for a whole batch at once. Unlike Σr² − (Σr)²/n it subtracts no two
        # large, nearly equal numbers.
        total = self.count + count
        shift = mean - self.mean
        self._m2 += m2 + shift * shift * self.count * count / total
        self.mean += shift * count / total
        self.count = total

    def state_dict(self) -> dict[str, int | float]:
        """Plain numbers that resume the statistics exactly, also through JSON."""
        return {"steps": self.steps, "count": self.count, "mean": self.mean, "m2": self._m2}

    def load_state_dict(self, state: dict[str, int | float]) -> None:
        """Resume from :meth:`state_dict`."""
        expected = self.state_dict().keys()
        if state.keys() != expected:
            raise ValueError(f"state: expected the keys {sorted(expected)}, got {sorted(state)}")
        self.steps, self.count = int(state["steps"]), int(state["count"])
        self.mean, self._m2 = float(state["mean"]), float(state["m2"])
