"""Train with vLLM, in the environment that has it, and say what went in and what came back: for test_vllm.py.

python -m tests.support.vllm_run CASE FOLDER writes FOLDER/CASE.pt.
"""

from __future__ import annotations

import copy
import functools
import sys
from pathlib import Path
from typing import Any

import torch
import trl.generation.vllm_generation
import vllm
import vllm._custom_ops
from transformers import Qwen3ForCausalLM

from egrsd_kernels.trl import EGRSDTrainer
from tests.support import trl_tiny

# Two generations each.
CASES: dict[str, dict[str, Any]] = {
    "adapters": {"peft": True, "vllm_importance_sampling_mode": "token_truncate"},
    "all weights": {
        "peft": False,
        "temperature": 0.7,
        "mask_truncated_completions": True,
        "num_iterations": 2,
        "max_steps": 4,
    },
}
# vLLM's attention wants 64 numbers a head.
CONFIG = trl_tiny.tiny_config(hidden_size=64, head_dim=64)


def made_for_this() -> None:
    """Weights that take a sync, and in float32: a sync that failed would hide behind bfloat16's rounding.

    On a CPU vLLM packs weights for oneDNN and drops the originals, which TRL's sync writes to; without oneDNN it leaves
    them alone. TRL has no setting for the others, and bfloat16 is what vLLM makes of a float32 checkpoint.
    """
    vllm._custom_ops._supports_onednn = False
    trl.generation.vllm_generation.LLM = functools.partial(vllm.LLM, dtype="float32", enforce_eager=True)


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(model)
    return (model.merge_and_unload() if hasattr(model, "merge_and_unload") else model).state_dict()


@torch.no_grad()
def full_logp(weights: dict[str, torch.Tensor], batch: dict[str, Any], temperature: float, dtype: torch.dtype):
    """log p (B, T) of the completions by log_softmax of full logits, from a model that never was in a trainer."""
    model = Qwen3ForCausalLM(CONFIG).to(dtype)
    model.load_state_dict(weights)
    ids, mask = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    length = batch["completion_ids"].shape[1]
    # A truncated completion that is masked was generated, and it is scored, too.
    mask[:, -length:] = 1
    logits = model(ids, attention_mask=mask).logits[:, -length - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(2, batch["completion_ids"][..., None])[..., 0].double()


class Recorder(EGRSDTrainer):
    """Keeps each generation, with what the weights of its moment, and those of the beginning, say of it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.first, self.records = weights_of(self.model), []

    def _generate_single_turn(self, *args, **kwargs):
        out = super()._generate_single_turn(*args, **kwargs)
        self.returned = out[:2]  # token ids and their log p, as vLLM returned them
        return out

    def _generate_and_score_completions(self, inputs):
        out = super()._generate_and_score_completions(inputs)
        record = {k: v.clone() for k, v in out.items() if isinstance(v, torch.Tensor)}
        now, temperature = weights_of(self.model), self.temperature
        record["exact"] = full_logp(now, record, temperature, torch.float64)
        record["float32"] = full_logp(now, record, temperature, torch.float32)
        record["of the first weights"] = full_logp(self.first, record, temperature, torch.float64)
        record["returned"] = self.returned
        self.records.append(record)
        return out


def main(case: str, folder: str) -> None:
    made_for_this()
    torch.manual_seed(0)
    path = str(Path(folder, "model"))
    Qwen3ForCausalLM(CONFIG).save_pretrained(path)
    trl_tiny.tokenizer().save_pretrained(path)
    options = {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 128}
    run, logs = trl_tiny.make(Path(folder, "run"), cls=Recorder, model=path, **options | CASES[case])
    run.train()
    torch.save({"records": run.records, "logs": logs.steps}, Path(folder, f"{case}.pt"))


if __name__ == "__main__":
    main(*sys.argv[1:])
