"""The check of what reward functions return. What no statistics could hold is taken out of it."""

import functools
import logging
import math
import textwrap
from collections.abc import Mapping, Sequence, Set
from numbers import Complex, Real
from typing import Any

from torch import Tensor, cat, nn
from trl.trainer.utils import is_async_callable

from .errors import RewardError

logger = logging.getLogger(__name__)
# Statistics of rewards are float32 in TRL: squares, and sums of many squares, have to stay finite.
LARGEST = 1e18


def checked(function: Any, name: str) -> Any:
    """``function``, with a :class:`RewardError` for what it should not return. A reward model stays as it is."""
    if isinstance(function, nn.Module):
        return function
    if is_async_callable(function):

        @functools.wraps(function)
        async def reward(*args: Any, **kwargs: Any) -> list[float]:
            return _rewards(name, await function(*args, **kwargs), len(kwargs["prompts"]))
    else:

        @functools.wraps(function)
        def reward(*args: Any, **kwargs: Any) -> list[float]:
            return _rewards(name, function(*args, **kwargs), len(kwargs["prompts"]))

    return reward


def without_infinite(rewards: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Take the rollouts with infinite rewards out of the rewards (N, F) of N rollouts by F functions.

    Returns:
        The rewards with NaN, for "not judged", in the place of what is infinite or beyond ``LARGEST``, and in all of
        a row where that function has a weight or where the weighted sum is so large; and (N, F + 1) bool: which
        rewards those were, the weighted sum last.
    """
    infinite = rewards.abs() > LARGEST
    rest = rewards.masked_fill(infinite, math.nan)
    overflow = (rest * weights).nansum(dim=1).abs() > LARGEST
    skipped = (infinite & (weights != 0)).any(dim=1) | overflow
    return rest.masked_fill(skipped[:, None], math.nan), cat([infinite, overflow[:, None]], dim=1)


class InfiniteRewards:
    """Warns of the first infinite reward of each function."""

    def __init__(self, names: Sequence[str]):
        self.names = (*names, "the weighted sum of the rewards")
        self.named: set[str] = set()

    def warn(self, rewards: Tensor, infinite: Tensor, prompts: list, completions: list, process: int) -> None:
        """Say it on the process that has the rollout.

        Args:
            rewards: (N, F), as the functions returned them, of all processes' rollouts.
            infinite: (N, F + 1), as :func:`without_infinite` tells.
            prompts, completions: those of this ``process``.
        """
        for column, name in enumerate(self.names):
            rows = infinite[:, column].nonzero().flatten().tolist()
            if not rows or name in self.named:
                continue
            self.named.add(name)
            owner, row = divmod(rows[0], len(prompts))
            if owner == process:
                got = rewards[rows[0], column].item() if column < rewards.shape[1] else "too large"
                logger.warning(
                    f"reward_funcs: {name}: expected a finite number, at most {LARGEST:g} in size, got {got} for the "
                    f"answer {excerpt(completions[row])} to {excerpt(prompts[row])}; such rollouts are left out of the "
                    f"training and, from now on, only counted, in rewards/infinite"
                )


def excerpt(messages: Any) -> str:
    """The beginning of what the last of ``messages`` says, on one line."""
    return repr(textwrap.shorten(str(messages[-1].get("content")), 80, placeholder=" …"))


def _rewards(name: str, returned: Any, count: int) -> list[float]:
    def fault(got: str) -> RewardError:
        return RewardError(
            f"reward_funcs: {name}: expected a list of {count} numbers or None, one for each completion, got {got}"
        )

    if isinstance(returned, Tensor):
        returned = returned.detach().cpu()  # one copy, not one for each reward
    try:
        rewards = iter(returned)
    except TypeError:
        raise fault(_described(returned)) from None
    if isinstance(returned, (str, bytes, Mapping, Set)):
        raise fault(_described(returned))
    rewards = list(rewards)
    if len(rewards) != count:
        raise fault(f"{len(rewards)}")
    values = []
    for index, reward in enumerate(rewards):
        value = _value(reward)
        if value is None:
            raise fault(f"{_described(reward)} at index {index}")
        values.append(value)
    return values


def _value(reward: Any) -> float | None:
    """The reward as a float, NaN for None; None where it is no real number."""
    if reward is None:
        return math.nan
    # float() reads strings, and takes some complex numbers for real ones.
    if isinstance(reward, Tensor):
        unreal = reward.is_complex()
    else:
        unreal = isinstance(reward, Complex) and not isinstance(reward, Real)
    if unreal or isinstance(reward, (str, bytes)):
        return None
    try:
        return float(reward)
    except OverflowError:  # an integer beyond any float
        return math.inf if reward > 0 else -math.inf
    except (TypeError, ValueError, RuntimeError):
        return None


def _described(value: Any) -> str:
    if isinstance(value, (str, Complex)):
        return f"{type(value).__name__} {textwrap.shorten(repr(value), 60, placeholder=' …')}"
    return "None" if value is None else type(value).__name__
