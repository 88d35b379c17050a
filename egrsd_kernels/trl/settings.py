"""From the keys of a YAML file and the options of a command line to the dataclasses of a run."""

import argparse
import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from trl import ModelConfig, TrlParser

from .config import EGRSDConfig
from .former import RENAMED


@dataclass
class RunArguments:
    """What a run needs beside EGRSDConfig and ModelConfig; names that TRL's own scripts have are theirs."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "A data set of the Hub, a folder that save_to_disk wrote, or a .jsonl or .parquet file."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration, where it has several."})
    dataset_train_split: str = field(default="train", metadata={"help": "The split to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "The split that eval_strategy evaluates on."})
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "Each package.module.function, path/to/file.py:function, or a reward of trl.rewards."},
    )
    teacher_template: list[dict] | None = field(
        default=None,
        metadata={"help": "Messages (role, content) that follow the prompt in the teacher's conversation; YAML only."},
    )


KINDS = (RunArguments, EGRSDConfig, ModelConfig)
REQUIRED = ("model_name_or_path", "dataset_name", "reward_funcs", "output_dir")


def parse_settings(
    config: Mapping[str, Any], overrides: Sequence[str] = ()
) -> tuple[RunArguments, EGRSDConfig, ModelConfig]:
    """The settings of a run: ``config``'s, and above them those of a command line, ``--field value ...``.

    TrlParser by itself takes a YAML's values as they are, whatever their types. Here scalars pass through argparse
    like a command line's, so that both are checked alike, and the rest is held against the field's annotation.

    Raises:
        ValueError: in one line that names the key.
    """
    hints: dict[str, Any] = {}
    for kind in KINDS:
        every = typing.get_type_hints(kind)
        hints |= {f.name: every[f.name] for f in fields(kind) if f.init}
    parser = TrlParser(KINDS, allow_abbrev=False, exit_on_error=False)
    parser.set_defaults(output_dir="")  # TrainingArguments would make one up
    options = []
    named = {option[2:].split("=")[0].replace("-", "_") for option in overrides if option.startswith("--")}
    named_now = {RENAMED.get(name, name) for name in named}
    for key, value in config.items():
        _expect_known(key, hints)
        if RENAMED.get(key, key) in named_now and key not in named:  # overridden by its other name
            continue
        if value is None or isinstance(value, (list, Mapping)):
            if not any(_fits(value, kind) for kind in _members(hints[key])):
                raise ValueError(f"{key}: expected {_text(hints[key])}, got {value!r}")
            parser.set_defaults(**{key: value})
        elif value is False and bool not in _members(hints[key]):
            options.append(f"--{key}=no")  # what YAML takes for a boolean in "save_strategy: no"
        else:
            options.append(f"--{key}={value}")
    try:
        *settings, rest = parser.parse_args_into_dataclasses(
            [*options, *overrides], return_remaining_strings=True, look_for_args_file=False
        )
    except argparse.ArgumentError as error:
        name = error.argument_name or "options"
        raise ValueError(f"{name.split('/')[0].lstrip('-')}: {error.message}") from error
    except TypeError as error:  # a check of EGRSDConfig
        raise ValueError(str(error)) from error
    for option in rest:
        if not option.startswith("--"):
            raise ValueError(f"{option}: expected --field value")
        _expect_known(option[2:].split("=")[0].replace("-", "_"), hints)
    values = {key: value for part in settings for key, value in vars(part).items()}
    for key in REQUIRED:
        if not values[key]:
            raise ValueError(f"{key}: missing")
    return tuple(settings)


def _expect_known(key: str, known: Iterable[str]) -> None:
    if key not in known:
        near = difflib.get_close_matches(str(key), known, n=1)
        raise ValueError(f"{key}: unknown key" + (f"; did you mean {near[0]}?" if near else ""))


def _members(hint: Any) -> tuple[Any, ...]:
    """The types that a union is made of; any other annotation alone."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _fits(value: Any, kind: Any) -> bool:
    """Whether null, a list or a mapping is what a member of an annotation allows."""
    if not isinstance(value, list):
        return kind in (Any, type(None)) if value is None else dict in (kind, typing.get_origin(kind))
    (item,) = typing.get_args(kind) if typing.get_origin(kind) is list else (None,)
    return item is not None and all(isinstance(one, (int, float) if item is float else item) for one in value)


def _text(hint: Any) -> str:
    names = {type(None): "null"}
    return " or ".join(
        names.get(kind) or (str(kind) if typing.get_args(kind) else kind.__name__) for kind in _members(hint)
    )
