"""Tiny vision-language models with their processors, and a dataset with images, without a download."""

from __future__ import annotations

import copy
import functools

import torch
from datasets import Dataset, Image, Sequence
from PIL import Image as Picture
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen3Config,
)

from tests.support.trl_tiny import row, tokenizer

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}"
    "{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}{% endfor %}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3, "pad_token_id": 0,
    "eos_token_id": 1, "bos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip


def with_images(words: PreTrainedTokenizerFast, *tokens: str) -> PreTrainedTokenizerFast:
    """A tokenizer with tokens of images."""
    made = copy.deepcopy(words)
    made.add_tokens([*tokens], special_tokens=True)
    return made


@functools.cache
def llava_processor() -> ProcessorMixin:
    pictures = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return LlavaProcessor(
        pictures, with_images(tokenizer(), "<image>"), patch_size=4, chat_template=CHAT.replace("IMAGE", "<image>"),
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip


def llava() -> LlavaForConditionalGeneration:
    """Each image is pixels by itself, and 4 tokens."""
    torch.manual_seed(0)
    words = llava_processor().tokenizer
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4,
        projection_dim=16,
    )  # fmt: skip
    text = Qwen3Config(vocab_size=len(words), head_dim=16, **TEXT)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )  # fmt: skip
    return _lively(LlavaForConditionalGeneration(config))


@functools.cache
def qwen2_vl_processor(words: PreTrainedTokenizerFast | None = None, template: str = "") -> ProcessorMixin:
    """With the tiny tokenizer and a template of its own, or others."""
    from transformers import Qwen2VLProcessor

    words = with_images(words or tokenizer(), "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    pictures = Qwen2VLImageProcessor(patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024, temporal_patch_size=2)
    template = template or CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")

    class Processor(Qwen2VLProcessor):
        """Without videos, whose processor needs torchvision."""

        attributes = ["image_processor", "tokenizer"]  # noqa: RUF012

        def __init__(self, image_processor, tokenizer, chat_template=None):
            self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
            self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
            self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
            self.video_processor = None
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    return Processor(pictures, words, chat_template=template)


def qwen2_vl(processor: ProcessorMixin | None = None) -> Qwen2VLForConditionalGeneration:
    """All images' patches are in one tensor; positions are of time, height and width."""
    torch.manual_seed(0)
    processor = processor or qwen2_vl_processor()
    token = processor.tokenizer.convert_tokens_to_ids
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2,
              "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3}  # fmt: skip
    text = TEXT | {"vocab_size": len(processor.tokenizer), "rope_theta": 1e4,
                   "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}  # fmt: skip
    ids = {
        "image_token_id": token("<|image_pad|>"), "video_token_id": token("<|video_pad|>"),
        "vision_start_token_id": token("<|vision_start|>"), "vision_end_token_id": token("<|vision_end|>"),
    }  # fmt: skip
    config = Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    config.text_config.pad_token_id = 0
    return _lively(Qwen2VLForConditionalGeneration(config))


def _lively(model):
    """With images that matter: fresh vision towers say next to nothing."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ("vision" in name or "visual" in name or "projector" in name) and weight.ndim > 1:
                weight.normal_(std=0.3)
    model.generation_config.eos_token_id = 1
    model.generation_config.pad_token_id = 0
    return model


VLMS = {"llava": (llava, llava_processor), "qwen2-vl": (qwen2_vl, qwen2_vl_processor)}


def picture(seed: int, width: int = 8, height: int = 8) -> Picture.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Picture.fromarray(pixels.numpy())


def dataset_with_images(n: int = 12, sizes=((8, 8), (16, 8), (8, 16))) -> Dataset:
    """Rows of one image, and of two; TRL takes no row without one among them."""
    rows = []
    for index in range(n):
        count = 1 + index % 2
        images = [picture(10 * index + i, *sizes[(index + i) % len(sizes)]) for i in range(count)]
        rows.append(row(index + 1, 2) | {"images": images})
    return Dataset.from_list(rows).cast_column("images", Sequence(Image()))
