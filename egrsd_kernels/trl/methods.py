"""What a token advantage that is chosen by name makes of a config's settings: it fixes some, and lacks others."""

from typing import Any

from egrsd_kernels.checks import expect
from egrsd_kernels.rl import TOKEN_ADVANTAGES

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
    "lookahead": ("lookahead_filter", "lookahead_decay"),
}  # fmt: skip
LACKS = {
    "grpo": ("teacher", "gate", "lookahead"),
    "reinforce": ("teacher", "gate", "lookahead"),
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
