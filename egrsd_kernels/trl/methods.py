"""Which token advantage a run has, and what it makes of the config's settings and of the teacher's contexts.

One that is chosen by name fixes some settings, and lacks others.
"""

from collections.abc import Callable, Mapping
from typing import Any

from egrsd_kernels.checks import expect
from egrsd_kernels.credit import LOOKAHEAD_SETTINGS
from egrsd_kernels.rl import TOKEN_ADVANTAGES, TokenAdvantage
from egrsd_kernels.rl.token_advantages import WITHOUT_TEACHER

Context = Callable[[Mapping[str, Any]], Any]
"""From a row of the dataset to the teacher's messages."""

# In the config None tells what is not given from what is.
TEACHER: dict[str, Any] = {"teacher_model_kind": "base", "teacher_update_rate": 0.001, "teacher_sync_steps": 1}
DEFAULTS: dict[str, Any] = {"gamma": 0.3, "lookahead": 0, "clip_eps": 0.2, "advantage": "welford", **TEACHER}
_NO_TEACHER = {"gamma": 0.0, "lookahead": 0, "clip_eps": 0.0}
FIXED: dict[str, dict[str, Any]] = {
    "grpo": {**_NO_TEACHER, "advantage": "group"},
    "reinforce": {**_NO_TEACHER, "advantage": "welford"},
    "rlsd": {"gamma": 0.0, "lookahead": 0},
    "egrsd": {"lookahead": 0},
    "cl_egrsd": {},
}
PUBLISHED_LOOKAHEAD = 3  # of the smallest model

PARTS = {
    "teacher": (
        *TEACHER, "teacher_model_name_or_path", "teacher_model_revision", "teacher_model_init_kwargs", "rollout_steps",
        "tau_low", "tau_high",
    ),
    "gate": ("gate_floor", "gamma_schedule", "gamma_end", "gamma_steps", "entropy_scale", "min_entropy_scale"),
    "lookahead": LOOKAHEAD_SETTINGS,
    "weight of a token": ("position_weight", "prefix_weight"),
}  # fmt: skip
LACKS = {
    "grpo": ("teacher", "gate", "lookahead", "weight of a token"),
    "reinforce": ("teacher", "gate", "lookahead", "weight of a token"),
    "rlsd": ("gate", "lookahead"),
    "egrsd": ("lookahead",),
    "cl_egrsd": (),
}


def settle(config: Any) -> None:
    """Put the defaults into an EGRSDConfig, as its token_advantage has them.

    Raises:
        ValueError: in one line, for a setting that the token advantage fixes to another value, or lacks.
    """
    method = config.token_advantage
    known = method is None or method in TOKEN_ADVANTAGES
    expect(known, "token_advantage", method, f"one of {', '.join(TOKEN_ADVANTAGES)}, or None")
    fixed = FIXED.get(method, {})
    for name, default in DEFAULTS.items():
        value = getattr(config, name)
        if value is None:
            published = PUBLISHED_LOOKAHEAD if (method, name) == ("cl_egrsd", "lookahead") else default
            setattr(config, name, fixed.get(name, published))
        elif name in fixed:
            expect(value == fixed[name], name, value, f"{fixed[name]!r}, as token_advantage is {method!r}")
    if method == "cl_egrsd":
        expect(config.lookahead != 0, "lookahead", 0, "at least 1, as token_advantage is 'cl_egrsd'")
    for part in LACKS.get(method, ()):
        for name in PARTS[part]:
            value, default = getattr(config, name), type(config).__dataclass_fields__[name].default
            default = DEFAULTS.get(name, default)
            expect(value == default, name, value, f"{default!r}, as token_advantage {method!r} has no {part}")


def function_of(config: Any, given: Any) -> TokenAdvantage | None:
    """The function that was ``given`` to the trainer, or None where an EGRSDConfig says which one it is.

    Raises:
        TypeError, ValueError: in one line; it is no function, or the config names another.
    """
    if given is None:
        return None
    expect(callable(given), "token_advantage", given, "a function of a TokenEvidence", TypeError)
    name = config.token_advantage
    expect(name is None, "token_advantage", name, "None in args, as the trainer is given a function")
    why = "0, as a token_advantage of one's own has no gate to show"
    expect(not config.rollout_steps, "rollout_steps", config.rollout_steps, why)
    return given


def contexts_of(config: Any, own: bool, given: Any, default: Context) -> dict[str, Context]:
    """By name, the contexts in which the teacher reads. own: the token advantage is a function of the user's.

    Raises:
        TypeError, ValueError: in one line, for what no context is, or what the token advantage cannot read.
    """
    method = config.token_advantage
    taught = own or method not in WITHOUT_TEACHER
    if given is None:
        return {"teacher": default} if taught else {}
    expect(isinstance(given, Mapping), "contexts", given, "functions by name", TypeError)
    expect(taught, "contexts", ", ".join(given), f"None, as token_advantage {method!r} has no teacher")
    for name, context in given.items():
        named = isinstance(name, str) and name.isidentifier()
        expect(named, "contexts", name, "names as Python has them", TypeError)
        expect(callable(context), f"contexts: {name}", context, "a function of a row of the dataset", TypeError)
    expect(own or len(given) == 1, "contexts", ", ".join(given), "one, unless token_advantage is a function")
    return dict(given)


def teacher_model_of(config: Any, given: Any, taught: bool) -> Any:
    """The teacher that is no model of the student's: what was ``given`` to the trainer, a name of the config, or None.

    Raises:
        ValueError: in one line; it is given twice, beside another kind of teacher, or where nothing is taught.
    """
    name = config.teacher_model_name_or_path
    expect(given is None or name is None, "teacher_model_name_or_path", name, "None beside the trainer's teacher_model")
    model = name if given is None else given
    if model is None:
        for setting in ("teacher_model_revision", "teacher_model_init_kwargs"):
            value = getattr(config, setting)
            expect(value is None, setting, value, "None without a teacher_model_name_or_path")
        return None
    kind = config.teacher_model_kind
    expect(kind == "base", "teacher_model_kind", kind, "'base' beside a teacher_model, which stays as it is")
    if not taught:
        raise ValueError("teacher_model: expected None, as no context is read by a teacher")
    return model
