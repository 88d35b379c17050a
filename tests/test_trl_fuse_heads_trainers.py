"""``fuse_heads()`` under TRL's own trainers: losses, gradients and every metric are those of TRL's own head."""

from __future__ import annotations

import contextlib
import copy
import functools
import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("PIL")

import trl
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, TrainerCallback

from egrsd_kernels.trl import fuse_heads
from egrsd_kernels.trl.fused_head import FusedForward
from tests.support.trl_tiny import correct, tiny_model, tokenizer
from tests.test_trl_models import MODELS, build

IMAGE = "<image>"
CHAT = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@functools.cache
def processor() -> LlavaProcessor:
    """Of images of 28 × 28 pixels, each four tokens."""
    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Images
    except ImportError:  # before transformers 5
        from transformers import CLIPImageProcessor as Images
    tokens = copy.deepcopy(tokenizer())
    tokens.add_special_tokens({"additional_special_tokens": [IMAGE]})
    images = Images(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return LlavaProcessor(
        images, tokens, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=CHAT,
    )  # fmt: skip


def vision_language() -> LlavaForConditionalGeneration:
    tokens = processor().tokenizer
    text = tiny_model(len(tokens)).config
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14,
        projection_dim=16,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text,
        image_token_id=tokens.convert_tokens_to_ids(IMAGE), vision_feature_select_strategy="default",
        image_seq_length=4, pad_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config)


KINDS = {
    "dense": lambda: build("qwen3"),
    "experts": lambda: build("mixtral", num_local_experts=4, router_aux_loss_coef=0.3),
    "vision": vision_language,
    "scaled": lambda: build("granite", **MODELS["granite"]),
    "capped": lambda: build("gemma2", **MODELS["gemma2"]),
}


def picture(seed: int) -> Image.Image:
    values = torch.randint(0, 256, (28, 28, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(values.numpy())


def rows(trainer: str, vision: bool, n: int = 12) -> Dataset:
    """Conversations with one question, an answer or two, and perhaps an image."""
    made, rng = [], random.Random(0)
    for index in range(n):
        a, b = rng.randint(1, 99), rng.randint(1, 9)
        right, wrong = ([{"role": "assistant", "content": f"It is {x}."}] for x in (a + b, a * 10 + b))
        prompt = [{"role": "user", "content": f"{a}+{b}?"}]
        row = {
            "SFT": {"prompt": prompt, "completion": right},
            "DPO": {"prompt": prompt, "chosen": right, "rejected": wrong},
            "KTO": {"prompt": prompt, "completion": (right, wrong)[index % 3 == 0], "label": index % 3 > 0},
        }.get(trainer, {"prompt": prompt, "answer": str(a + b)})
        made.append(row | ({"images": [picture(index)]} if vision else {}))
    return Dataset.from_list(made)


class Watch(TrainerCallback):
    """What each step logs, and the gradients that its optimizer gets."""

    def __init__(self):
        self.logs, self.gradients = [], []

    def on_log(self, args, state, control, logs=None, **_):
        self.logs.append(logs)

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        named = model.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})


COMMON = {
    "max_steps": 2, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "bf16": False, "use_cpu": True,
    "gradient_checkpointing": False, "disable_tqdm": True, "lr_scheduler_type": "constant", "optim": "sgd",
    "learning_rate": 0.1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
}  # fmt: skip
ROLLOUTS = {"num_generations": 2, "max_completion_length": 10, "temperature": 0.8}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
SETTINGS = {
    "GRPO": ROLLOUTS | {"beta": 0.1, "entropy_coef": 0.1, "top_entropy_quantile": 0.7, "num_iterations": 2},
    "RLOO": ROLLOUTS | {"beta": 0.1},
    "DPO": EVALUATED | {"use_weighting": True, "beta": 1.0},
    "KTO": EVALUATED,
    "SFT": EVALUATED | {"completion_only_loss": True},
}


def train(path: Path, trainer: str, kind: str, lora: bool, fused: bool, **settings) -> tuple[list, list]:
    """(logs, gradients) of two steps, from the same weights and random numbers every time."""
    vision = kind == "vision"
    model = KINDS[kind]()
    model.save_pretrained(path / "model")  # a reference model is loaded from where the model came from
    model = type(model).from_pretrained(path / "model", torch_dtype=torch.float32)
    config, cls = getattr(trl, f"{trainer}Config"), getattr(trl, f"{trainer}Trainer")
    more = {"reward_funcs": correct} if trainer in ("GRPO", "RLOO") else {}
    if more and vision:  # an answer with an image's token is none
        settings["generation_kwargs"] = {"suppress_tokens": [model.config.image_token_id]}
    peft_config = LoraConfig(r=4, lora_alpha=8, target_modules=r".*(q_proj|v_proj|o_proj)") if lora else None
    watch = Watch()
    with fuse_heads() if fused else contextlib.nullcontext():
        run = cls(
            model=model, args=config(str(path), seed=0, **COMMON | SETTINGS[trainer] | settings),
            train_dataset=rows(trainer, vision), processing_class=copy.deepcopy(processor() if vision else tokenizer()),
            eval_dataset=None if more else rows(trainer, vision, 8), peft_config=peft_config, callbacks=[watch], **more,
        )  # fmt: skip
    base = run.model.get_base_model() if lora else run.model
    assert isinstance(base.forward, FusedForward) == fused
    seen = []
    if vision:
        base.model.vision_tower.register_forward_hook(lambda *_: seen.append(1))
    run.train()
    assert bool(seen) == vision
    return watch.logs, watch.gradients


TIMES = ("step_time", "_runtime", "_per_second")


def check_same(ours: tuple[list, list], theirs: tuple[list, list], tolerance: float = 1e-5) -> None:
    close = functools.partial(torch.testing.assert_close, rtol=tolerance)
    for one, other in zip(ours[0], theirs[0], strict=True):
        assert one.keys() == other.keys()
        for name in [name for name in one if not name.endswith(TIMES)]:
            close(
                torch.tensor(one[name]),
                torch.tensor(other[name]),
                atol=tolerance,
                msg=lambda text, n=name: f"{n}: {text}",
            )
    assert len(ours[1]) == 2 and sum("loss" in log for log in ours[0]) == 2
    for one, other in zip(ours[1], theirs[1], strict=True):
        assert one.keys() == other.keys()
        largest = max(gradient.abs().max().item() for gradient in other.values())
        assert largest > 1e-5
        for name, gradient in other.items():
            close(one[name], gradient, atol=tolerance * min(1, 10 * largest), msg=lambda text, n=name: f"{n}: {text}")


# Every pair of a trainer and a model; full weights and adapters meet each trainer and each model.
COVER = [(trainer, kind, (i + j) % 2 == 1) for i, trainer in enumerate(SETTINGS) for j, kind in enumerate(KINDS)]


@pytest.mark.slow
@pytest.mark.parametrize("trainer, kind, lora", COVER, ids=[f"{t} {k} {'lora' if x else 'full'}" for t, k, x in COVER])
def test_two_steps_are_trls(tmp_path, trainer, kind, lora):
    check_same(*(train(tmp_path, trainer, kind, lora, fused) for fused in (True, False)))
