"""The former names of settings: taken with a warning, and read where a checkpoint holds them.

They gave way to the words that TRL's self-distillation (SDFTConfig, SDPOConfig) has for the same things.
"""

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from egrsd_kernels.checks import expect, integer, number

RENAMED = {
    "teacher": "teacher_model_kind",
    "teacher_ema_decay": "teacher_update_rate",
    "teacher_copy_steps": "teacher_sync_steps",
}
KINDS = ("auto", "adapters_off", "frozen", "ema", "copy")


def check_former(settings: Mapping[str, Any]) -> None:
    """A TypeError or ValueError for a value that a former name would not have taken; None: it is not given."""
    kind, decay, steps = (settings.get(name) for name in RENAMED)
    expect(kind is None or kind in KINDS, "teacher", kind, "one of " + ", ".join(KINDS))
    if decay is not None:
        number("teacher_ema_decay", decay, low=0, high=1)
    if steps is not None:
        integer("teacher_copy_steps", steps, low=1)


def in_present_words(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``settings`` under the names, and with the values, that they have now; a former one without effect is gone."""
    present = {name: value for name, value in settings.items() if name not in RENAMED}
    kind, decay, steps = (settings.get(name) for name in RENAMED)
    if kind == "copy":  # a moving average that forgets all
        steps = 100 if steps is None else steps
        present |= {"teacher_model_kind": "ema", "teacher_update_rate": 1.0, "teacher_sync_steps": steps}
    else:
        if kind is not None:
            present["teacher_model_kind"] = "base" if kind == "auto" else kind
        if decay is not None:  # in decimals: 0.001 for 0.999
            present["teacher_update_rate"] = float(1 - Decimal(repr(float(decay))))
        if steps is not None and kind is None:
            present["teacher_sync_steps"] = steps
    if present.get("grad_mode") == "auto":
        present["grad_mode"] = "exact"
    return present
