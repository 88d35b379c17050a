"""What the trainer is given, refused before TRL builds anything of it."""

import inspect
from collections.abc import Mapping, Sized
from typing import Any

from .config import EGRSDConfig


def check_arguments(
    args: EGRSDConfig,
    model: Any,
    reward_funcs: Any,
    train_dataset: Any,
    eval_dataset: Any,
    environments: bool,
    adapters: bool,
) -> None:
    """Refuse what cannot train.

    Args:
        environments: there is an environment_factory. adapters: they are what is trained.

    Raises:
        TypeError, ValueError: in one line that names the argument.
    """
    if not reward_funcs and not environments:
        raise ValueError("reward_funcs: expected at least one reward function")
    listed = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs] if reward_funcs else []
    for index, reward in enumerate(listed):
        if inspect.isclass(reward) or not (callable(reward) or isinstance(reward, str)):
            raise TypeError(f"reward_funcs[{index}]: expected a function or a model, got {reward!r}")
    if (getattr(model, "_tp_size", None) or 1) > 1:
        raise ValueError("model: expected one that is whole on each process, tensor parallelism is not supported")
    if args.sync_ref_model and adapters:
        raise ValueError("sync_ref_model: expected False with adapters, whose reference is no model of its own")
    if isinstance(train_dataset, Sized):  # else TRL would train nothing, and say nothing
        prompts = args.generation_batch_size // args.num_generations
        if len(train_dataset) < prompts:
            raise ValueError(
                f"train_dataset: expected at least {prompts} rows, the prompts of one generation "
                f"(generation_batch_size / num_generations), got {len(train_dataset)}"
            )
    for part in eval_dataset.values() if isinstance(eval_dataset, Mapping) else [eval_dataset]:
        if isinstance(part, Sized) and not len(part) and args.eval_strategy != "no":
            raise ValueError("eval_dataset: expected at least 1 row, got 0")
