"""EGRSDTrainer with vLLM in its own process (colocate): the log p that vLLM returns, sync of weights, masks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.doc_examples import ROOT
from tests.support.ports import free_port

ENVIRONMENT = Path(f"{sys.prefix}-vllm")  # beside this one: vLLM pins much of what it stands on
LENGTH, END, PAD = 12, 1, 0  # of trl_tiny, which the environment imports with all of TRL
# How much more vLLM's float32 may be off than the model's own, from sums in another order.
ANOTHER_ORDER = 8

Record = dict[str, Any]  # of a generation, by vllm_run.py


@pytest.mark.slow
@pytest.mark.parametrize("case", ["adapters", "all weights"])
def test_two_generations_and_their_steps(case, tmp_path):
    if not (ENVIRONMENT / "ready").exists():
        pytest.skip(f"needs vLLM: make {ENVIRONMENT.name}/ready")
    records, logs = run(case, tmp_path)
    steps = 2 if case == "all weights" else 1  # of each generation
    assert len(records) == 2 and len(logs) == 2 * steps and all(step["grad_norm"] > 0 for step in logs)
    for record, log in zip(records, logs[::steps], strict=True):
        check_what_vllm_returned(record)
        check_sampling_logp(record)
        # One ratio a sequence is TRL's default, and a token's is what the other case asks for.
        check_importance_ratio(record, log, sequence=case == "all weights")
        check_masks(record, log, truncated_are_masked=case == "all weights")
    check_sync(*records)
    assert {bool(x) for record in records for x in truncated(record)} == {True, False}, "the case shows nothing"


# What the interpreter, or a test on several processes before this one, has left.
OF_OTHERS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "TRITON_INTERPRET"}


def run(case: str, folder: Path) -> tuple[list[Record], list[dict[str, float]]]:
    """What a run recorded of its generations, and what it logged of its steps."""
    settings = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # workers share the cores
        "VLLM_NO_USAGE_STATS": "1",
        "MASTER_PORT": str(free_port()),  # Accelerate's is the same for all runs at once
    }
    inherited = {name: value for name, value in os.environ.items() if name not in OF_OTHERS}
    command = [str(ENVIRONMENT / "bin/python"), "-m", "tests.support.vllm_run", case, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=inherited | settings, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
    found = torch.load(folder / f"{case}.pt")
    return found["records"], found["logs"]


def generated(record: Record) -> torch.Tensor:
    """(B, T): the tokens that vLLM returned."""
    lengths = torch.tensor([len(ids) for ids in record["returned"][0]])
    return torch.arange(record["completion_ids"].shape[1]) < lengths[:, None]


def truncated(record: Record) -> torch.Tensor:
    """(B,): the rollouts that vLLM did not end."""
    return torch.tensor([ids[-1] != END for ids in record["returned"][0]])


def allowed(record: Record) -> float:
    """What log p may be off in float32, where the model itself is off from float64 by so much."""
    return ANOTHER_ORDER * (record["float32"] - record["exact"])[generated(record)].abs().max().item()


def check_what_vllm_returned(record: Record) -> None:
    there, (ids, logp) = generated(record), record["returned"]
    assert record["completion_ids"][there].tolist() == [token for row in ids for token in row]
    assert (record["completion_ids"][~there] == PAD).all()
    assert torch.equal(record["sampling_per_token_logps"][there], torch.tensor([x for row in logp for x in row]))


def check_sampling_logp(record: Record) -> None:
    """It is the model's, at the rollout's temperature."""
    assert allowed(record) < 1e-3
    off = (record["sampling_per_token_logps"] - record["exact"])[generated(record)].abs()
    assert off.max() <= allowed(record)


def check_sync(first: Record, second: Record) -> None:
    """The second rollout is of trained weights: ``check_sampling_logp`` holds for them, and not for the first ones."""
    assert torch.equal(first["of the first weights"], first["exact"])
    moved = (second["sampling_per_token_logps"] - second["of the first weights"])[generated(second)].abs()
    assert moved.max() > 100 * allowed(second), "the case shows nothing"


def check_importance_ratio(record: Record, log: dict[str, float], sequence: bool) -> None:
    mask = record["completion_mask"].bool()
    assert (record["old_per_token_logps"] - record["exact"])[mask].abs().max() <= allowed(record)
    difference = (record["old_per_token_logps"] - record["sampling_per_token_logps"]).masked_fill(~mask, 0)
    if sequence:
        difference = difference.sum(1, keepdim=True)
    torch.testing.assert_close(record["importance_sampling_ratio"], difference.exp())
    # Both are off from float64 by as much as is allowed, and the ratio is rounded.
    near_1 = (LENGTH if sequence else 1) * 2 * allowed(record) + 2.0**-23
    assert difference.any() and (record["importance_sampling_ratio"] - 1).abs().max() <= 2 * near_1
    assert log["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=2 * near_1)


def check_masks(record: Record, log: dict[str, float], truncated_are_masked: bool) -> None:
    there, cut = generated(record), truncated(record)
    assert (there.sum(1)[cut] == LENGTH).all() and log["completions/clipped_ratio"] == cut.double().mean()
    expected = there & ~cut[:, None] if truncated_are_masked else there
    assert torch.equal(record["completion_mask"].bool(), expected)
    for name in ("teacher_logp", "teacher_entropy"):
        assert (record[name] != 0)[expected].all() and not record[name][~expected].any()
