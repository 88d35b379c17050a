"""A tiny Qwen3, its tokenizer and a dataset: what the tests of egrsd_kernels.trl train, without a download."""

from __future__ import annotations

import functools
import os
import random

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TrainerCallback

from egrsd_kernels.rollouts import Rollout, find_rollout_files, read_rollouts
from egrsd_kernels.trl import EGRSDConfig, EGRSDTrainer

# So small a model gains nothing from two threads, and loses twentyfold where they have to share a core.
torch.set_num_threads(1)

SPECIAL = ["<pad>", "<end>", "<user>", "<assistant>", "<think>", "</think>"]
CHARACTERS = sorted("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 +-=.,?\n")
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>"
    "{% if not enable_thinking | default(true) %}<think></think>{% endif %}{% endif %}"
)
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *CHARACTERS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<end>",
        additional_special_tokens=SPECIAL[2:],
        chat_template=CHAT,
        padding_side="left",
        # As Qwen's: older versions of transformers would add a third.
        model_input_names=["input_ids", "attention_mask"],
    )


def tiny_config(vocab_size: int | None = None, **sizes: int) -> Qwen3Config:
    sizes = {"hidden_size": 32, "head_dim": 16} | sizes
    return Qwen3Config(
        vocab_size=vocab_size or len(tokenizer()),
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        tie_word_embeddings=False,
        **sizes,
    )


def tiny_model(vocab_size: int | None = None) -> Qwen3ForCausalLM:
    """The same weights every time."""
    torch.manual_seed(0)
    return Qwen3ForCausalLM(tiny_config(vocab_size))


def row(a: int, b: int) -> dict:
    prompt = [{"role": "user", "content": f"{a}+{b}?"}]
    return {"prompt": prompt, "solution": f"{a} plus {b} is {a + b}.", "answer": str(a + b)}


def dataset(n: int = 12) -> Dataset:
    rng = random.Random(0)
    return Dataset.from_list([row(rng.randint(1, 99), rng.randint(1, 9)) for _ in range(n)])


def correct(completions, answer, **_) -> list[float]:
    """Right by a rule that an untrained model meets half of the time."""
    return [float(sum(map(ord, completion[0]["content"])) % 2) for completion in completions]


class Logs(TrainerCallback):
    """What the run logged for each step, in order."""

    def __init__(self):
        self.rows = []

    def on_log(self, args, state, control, logs=None, **_):
        self.rows.append({"step": state.global_step, **logs})

    @property
    def steps(self) -> list[dict]:
        return [row for row in self.rows if "loss" in row]


OPTIONS = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_generations": 2,
    "max_completion_length": 12,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "constant",
    "max_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "packing": False,
    "gamma": 0.8,
    "lookahead": 3,
    "welford_warmup_steps": 1,
}


def make(path, peft=True, cls=EGRSDTrainer, config=EGRSDConfig, callbacks=(), **options) -> tuple[EGRSDTrainer, Logs]:
    """A trainer of ``cls`` and its logs. Keywords that a config does not know go to the trainer."""
    arguments = {"model": tiny_model(), "reward_funcs": correct, "train_dataset": dataset()}
    arguments["processing_class"] = tokenizer()
    fields = config.__dataclass_fields__
    arguments |= {name: options.pop(name) for name in list(options) if name not in fields}
    known = {name: value for name, value in (OPTIONS | options).items() if name in fields}
    logs = Logs()
    run = cls(
        args=config(str(path), **known),
        peft_config=LORA if peft else None,
        callbacks=[logs, *callbacks],
        **arguments,
    )
    return run, logs


def exported(run) -> list[Rollout]:
    """The rollouts under a run's folder, in the order of its files."""
    return [rollout for file in find_rollout_files(run) for rollout in read_rollouts(file)]


def weights(run) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}
