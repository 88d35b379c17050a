"""Two gloo processes in packs train as one process does padded, with TRL's losses and with ours."""

from __future__ import annotations

import importlib.util
import random
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")

from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

import egrsd_kernels.trl.packed_rows as packed_rows
from egrsd_kernels.trl import EGRSDTrainer, pack
from tests.support.egrsd_processes import SHARDED, train_in_two
from tests.support.processes import in_processes
from tests.support.trl_tiny import make, weights
from tests.test_train import config, history, home  # noqa: F401

pytestmark = pytest.mark.slow

# SGD: Adam would turn a gradient that is zero but for rounding into a step of full size.
OPTIONS = {"max_steps": 2, "max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 0.3}
BUDGET = 24  # some groups are one pack, others two: processes have unequally many
SETTINGS = {
    "on policy": {"cls": EGRSDTrainer, "peft": True},
    "TRL's loss, all weights": {"cls": EGRSDTrainer, "peft": False, "delta": 4.0},
    "two updates": {"cls": EGRSDTrainer, "peft": True, "num_iterations": 2, "beta": 0.1},
    "GRPO": {"cls": GRPOTrainer, "config": GRPOConfig, "peft": True, "beta": 0.1},
    "GRPO, checkpointed": {"cls": GRPOTrainer, "config": GRPOConfig, "peft": False, "gradient_checkpointing": True},
    "RLOO": {"cls": RLOOTrainer, "config": RLOOConfig, "peft": False, "beta": 0.0},
}


def fixed_completions(self, prompt_ids, *_, **__):
    """Completions by prompt, occurrence and step: what is sampled must not depend on the number of processes."""
    rows, offset = [], self.accelerator.process_index * len(prompt_ids)
    for index, ids in enumerate(prompt_ids):
        rng = random.Random(f"{ids}{(offset + index) % 2}{self.state.global_step}")
        rows.append([rng.randrange(6, 60) for _ in range(rng.randrange(1, 12))] + [1])
    return rows if isinstance(self, RLOOTrainer) else (rows, None)


def train(path: Path, world: int, packing: bool) -> dict:
    """Every setting once, on however many processes there are; what they came to."""
    out, company = {}, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GRPOTrainer, "_generate_single_turn", fixed_completions)
        patch.setattr(RLOOTrainer, "_generate_single_turn", fixed_completions)
        own = packed_rows._company
        patch.setattr(packed_rows, "_company", lambda *given: company.append(1) or own(*given))
        for name, options in SETTINGS.items():
            ours = options["cls"] is EGRSDTrainer
            batch = {"per_device_train_batch_size": 4 // world}
            batch |= {"packing": packing, "max_tokens_per_pack": BUDGET} if ours else {}
            run, logs = make(path / name, **OPTIONS | batch | options)
            if packing and not ours:
                pack(run, max_tokens_per_pack=BUDGET)
            run.train()
            out[name] = {"weights": weights(run), "rows": logs.steps, "company": len(company)}
            company.clear()
    return out


def worker(rank: int, path: Path) -> dict:
    return train(path, 2, True)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict]:
    return in_processes(worker, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> dict:
    return train(tmp_path_factory.mktemp("one"), 1, False)


def check_equal(got: dict, expected: dict) -> None:
    for key in ("loss", "gate/mean", "reward"):  # what does not depend on how a step is cut into micro-batches
        assert [row.get(key, 0) for row in got["rows"]] == pytest.approx(
            [row.get(key, 0) for row in expected["rows"]], rel=1e-4, abs=1e-6
        ), key
    assert got["weights"].keys() == expected["weights"].keys()
    for key, value in expected["weights"].items():
        torch.testing.assert_close(got["weights"][key], value, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_two_packed_processes_equal_one_padded(one, two, name):
    for got in two:
        check_equal(got[name], one[name])
    for key, value in two[0][name]["weights"].items():
        assert torch.equal(value, two[1][name]["weights"][key]), key


def test_some_process_had_fewer_packs_than_another(two):
    assert all(two[0][name]["company"] + two[1][name]["company"] > 0 for name in SETTINGS)


def test_packs_under_fsdp2(config, home, tmp_path):  # noqa: F811
    """Sharded and packed, two processes come to what they come to under DDP, padded."""
    run, sharded = tmp_path / "run", tmp_path / "sharded"
    keys = {"optim": "sgd", "learning_rate": 0.3, "max_grad_norm": 0.0, "lora_dropout": 0.0}
    train_in_two(home, config(**keys))
    layers = {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"]}
    keys |= {"fsdp": "full_shard auto_wrap", "fsdp_config": layers, "packing": True, "max_tokens_per_pack": BUDGET}
    said = train_in_two(home, config(**keys, output_dir=str(sharded)), fsdp=True)
    assert all(some == every != "0" for some, every in re.findall(f"{SHARDED} (\\d+) of (\\d+)", said))
    assert len(history(run)) == 2
    for mine, theirs in zip(history(sharded), history(run), strict=True):
        for key in ("loss", "grad_norm", "gate/mean", "abs_log_ratio/mean"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4), key


# TRL's loss: every pack is read twice.
ZERO = {"cls": EGRSDTrainer, "peft": True, "loss_type": "dapo", "delta": 4.0}


def zero_worker(rank: int, path: Path) -> dict[int, dict]:
    """By stage, what a packed run came to."""
    import deepspeed
    from accelerate.state import AcceleratorState

    out = {}
    for stage in (2, 3):
        AcceleratorState._reset_state(reset_partial_state=True)  # what it knows of DeepSpeed is of one run
        zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
        settings = {"zero_optimization": zero, "zero_allow_untested_optimizer": True, "gradient_clipping": "auto"}
        settings |= dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
        packs = {"per_device_train_batch_size": 2, "packing": True, "max_tokens_per_pack": BUDGET}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GRPOTrainer, "_generate_single_turn", fixed_completions)
            run, logs = make(path / str(stage), **OPTIONS | ZERO | packs, deepspeed=settings)
            run.train()
        assert run.model_wrapped.zero_optimization_stage() == stage
        with deepspeed.zero.GatheredParameters([*run.model.parameters()]):
            out[stage] = {"weights": weights(run), "rows": logs.steps}
    return out


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_packs_under_deepspeed(tmp_path, monkeypatch):
    """ZeRO steps once an optimizer step, not once a pack, and comes to what one process comes to, padded."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with monkeypatch.context() as patch:
        patch.setattr(GRPOTrainer, "_generate_single_turn", fixed_completions)
        run, logs = make(tmp_path / "one", **OPTIONS | ZERO)
        run.train()
    expected = {"weights": weights(run), "rows": logs.steps}
    # Accelerate knows no DeepSpeed where it is told that all is on CPUs.
    for results in in_processes(zero_worker, tmp_path, gloo=False):
        for got in results.values():
            check_equal(got, expected)
