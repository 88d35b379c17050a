"""Token advantages by name, or of one's own, and contexts by name, in the trainer."""

from __future__ import annotations

import pytest

pytest.importorskip("trl", reason="TRL is not installed")

from trl import TrlParser

from egrsd_kernels.rl import TOKEN_ADVANTAGES
from egrsd_kernels.trl import EGRSDConfig
from egrsd_kernels.trl.methods import FIXED, LACKS
from tests.support.trl_tiny import OPTIONS

BASE = {name: OPTIONS[name] for name in ("use_cpu", "bf16", "report_to", "num_generations", "max_steps")}


def config(**options) -> EGRSDConfig:
    return EGRSDConfig("unused", **BASE | options)


# --------------------------------------------------------------------------------------------------------- the config


def settled(made: EGRSDConfig) -> tuple:
    return made.gamma, made.lookahead, made.clip_eps, made.advantage


def test_what_each_name_makes_of_the_settings():
    assert settled(config()) == (0.3, 0, 0.2, "welford")
    of = {name: settled(config(token_advantage=name)) for name in TOKEN_ADVANTAGES}
    assert of == {
        "grpo": (0.0, 0, 0.0, "group"),
        "reinforce": (0.0, 0, 0.0, "welford"),
        "rlsd": (0.0, 0, 0.2, "welford"),
        "egrsd": (0.3, 0, 0.2, "welford"),
        "cl_egrsd": (0.3, 3, 0.2, "welford"),
    }
    assert FIXED.keys() == LACKS.keys() == TOKEN_ADVANTAGES.keys()
    # By name or by number, it is the same run.
    by_name, by_number = config(token_advantage="rlsd", gate_floor=0.1), config(gamma=0)
    assert by_name.of_the_run() == by_number.of_the_run()
    assert [name for name in TOKEN_ADVANTAGES if not config(token_advantage=name).direct] == ["grpo", "reinforce"]


def test_what_fits_a_name_is_taken():
    assert settled(config(token_advantage="rlsd", gamma=0, clip_eps=0.1, advantage="group")) == (0, 0, 0.1, "group")
    assert config(token_advantage="cl_egrsd", lookahead=5, gamma=1).lookahead == 5
    assert config(token_advantage="grpo", scale_rewards="none", teacher_model_kind="base").advantage == "group"
    arguments = ["--output_dir", "x", "--use_cpu", "true", "--bf16", "false", "--token_advantage", "egrsd",
                 "--teacher_model_init_kwargs", '{"dtype": "bfloat16"}', "--gamma", "0.7"]  # fmt: skip
    (parsed,) = TrlParser((EGRSDConfig,)).parse_args_and_config(arguments)
    assert (parsed.token_advantage, parsed.gamma) == ("egrsd", 0.7)
    assert parsed.teacher_model_init_kwargs == {"dtype": "bfloat16"}


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"token_advantage": "ppo"},
            "token_advantage: expected one of grpo, reinforce, rlsd, egrsd, cl_egrsd, or None",
        ),
        ({"token_advantage": "rlsd", "gamma": 0.3}, "gamma: expected 0.0, as token_advantage is 'rlsd', got 0.3"),
        ({"token_advantage": "egrsd", "lookahead": 2}, "lookahead: expected 0, as token_advantage is 'egrsd', got 2"),
        (
            {"token_advantage": "cl_egrsd", "lookahead": 0},
            "lookahead: expected at least 1, as token_advantage is 'cl_egrsd', got 0",
        ),
        (
            {"token_advantage": "grpo", "advantage": "welford"},
            "advantage: expected 'group', as token_advantage is 'grpo', got 'welford'",
        ),
        (
            {"token_advantage": "reinforce", "teacher_model_kind": "ema"},
            "teacher_model_kind: expected 'base', as token_advantage 'reinforce' has no teacher, got 'ema'",
        ),
        (
            {"token_advantage": "grpo", "rollout_steps": 5},
            "rollout_steps: expected 0, as token_advantage 'grpo' has no teacher, got 5",
        ),
        (
            {"token_advantage": "rlsd", "gamma_schedule": "linear", "gamma_end": 1},
            "gamma_schedule: expected 'constant', as token_advantage 'rlsd' has no gate, got 'linear'",
        ),
        (
            {"token_advantage": "egrsd", "lookahead_filter": "discounted"},
            "lookahead_filter: expected 'minimum', as token_advantage 'egrsd' has no lookahead, got 'discounted'",
        ),
    ],
)
def test_what_a_name_does_not_have_is_refused(options, message):
    with pytest.raises(ValueError) as caught:
        config(**options)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
