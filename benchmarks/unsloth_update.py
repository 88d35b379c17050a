"""Unsloth's update of the same model: FastLanguageModel, its GRPO trainer, its packing and its shared prefixes.

Unsloth's loss takes one advantage a rollout and gives no entropies, so an update of EGRSD is less than the others':
the teacher's log p (the pass that Unsloth makes for a reference model), and the student's pass with GRPO's loss.
Unsloth is to be imported before transformers. Where it falls back from a shared prefix, the note says so.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch

from benchmarks.rollouts import LORA_MODULES
from benchmarks.updates import Padded, Plan, Seen, Task, Update, trl_tokenizer


def load(task: Task, plan: Plan, folder: str) -> tuple[Any, Any]:
    """(model, tokenizer) with the weights of the other ways, which go through a checkpoint on disk."""
    from unsloth import FastLanguageModel

    model = task.model(Plan(True, 0))
    adapters = {name: value.cpu() for name, value in model.state_dict().items() if "lora_" in name}
    model.unload().save_pretrained(folder)
    trl_tokenizer().save_pretrained(folder)
    del model
    loaded, tokenizer = FastLanguageModel.from_pretrained(
        folder, max_seq_length=8192, dtype=torch.bfloat16, load_in_4bit=False, local_files_only=True,
        use_gradient_checkpointing=not plan.kept,
    )  # fmt: skip
    loaded = FastLanguageModel.get_peft_model(
        loaded, r=64, lora_alpha=128, target_modules=LORA_MODULES, use_gradient_checkpointing=not plan.kept
    )
    missing = loaded.load_state_dict(adapters, strict=False)
    if missing.unexpected_keys:
        raise RuntimeError(f"Unsloth's adapters have other names: {missing.unexpected_keys[0]}")
    return loaded, tokenizer


def update_of(task: Task, plan: Plan) -> Update:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from trl.models.utils import disable_gradient_checkpointing

    count = len(task.rollouts.responses)
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = load(task, plan, folder)
        trainer = GRPOTrainer(
            model=model, reward_funcs=[lambda completions, **_: [0.0] * len(completions)], processing_class=tokenizer,
            args=GRPOConfig(
                folder, per_device_train_batch_size=plan.size, gradient_accumulation_steps=count // plan.size,
                num_generations=min(task.rollouts.group, plan.size), bf16=True, report_to="none", beta=0.0,
                max_completion_length=int(task.rollouts.lengths.max()), gradient_checkpointing=not plan.kept,
                loss_type="dapo",
            ),
            train_dataset=Dataset.from_list([{"prompt": "-"}]),
        )  # fmt: skip
    trainer.current_gradient_accumulation_steps = count // plan.size
    student, teacher = Padded.of(task, False), Padded.of(task, True)
    responses = student.completion_mask.bool()
    items, advantages = responses.sum(), task.rollouts.advantages.to(task.device)
    checked: list[torch.Tensor] = []

    def logp(rows: Padded) -> torch.Tensor:
        off = disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs)
        with torch.no_grad(), off:
            found = trainer._get_per_token_logps_and_entropies(
                trainer.model, *rows.rows, responses.shape[1], batch_size=plan.size
            )
        return found[0][responses].float()

    def update() -> Seen:
        trainer.model.zero_grad()
        seen = task.nothing_seen()
        if not checked:  # its loss shows no log p: once, by the pass that is shown
            checked.append(logp(student))
        seen.student_logp.copy_(checked[0])
        if task.has_teacher:
            with trainer.model.disable_adapter():
                seen.teacher_logp.copy_(logp(teacher))
        for which in torch.arange(count).split(plan.size):
            here = slice(int(which[0]), int(which[-1]) + 1)
            inputs = {name: value[here] for name, value in student._asdict().items()}
            inputs |= {"advantages": advantages[here], "num_items_in_batch": items}
            loss = trainer.compute_loss(trainer.model, inputs)
            trainer.accelerator.backward(loss)
            seen.loss.add_(loss.detach())
        shared = any("prefix_grouper_grad_verified" in name for part in trainer.model.modules() for name in vars(part))
        update.note = "" if shared else "Unsloth fell back from its shared prefix"
        return seen

    return update
