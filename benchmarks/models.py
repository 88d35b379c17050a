"""Whether the package reads the head of every architecture right, beside each model's own logits.

    python -m benchmarks.models                     # all; writes benchmarks/results/models.json and docs/models.md
    python -m benchmarks.models gemma2 granite      # prints these

For every architecture of transformers' causal, image-text-to-text and sequence-to-sequence mappings it builds a tiny
model with random weights, in float32, whose scales, caps, biases and windows have values that show. It asks the package
for the head (``head_of``), reads log p and entropy of the last tokens of a left-padded batch through ``with_head``, and
compares them with the softmax of the model's own logits; and the gradient of a weighted sum of both, in every weight,
with autograd's through the logits. Vision-language models get an image, where one can be made by hand. Of a model that
is read right it asks whether it packs, and from which length on it does not (``row_limit``); where it does not, why.
Outcomes:

    right      log p and entropy agree to ``TOLERANCE`` nat, and gradients to ``GRADIENT_TOLERANCE``
    refused    the package raised a ValueError
    WRONG      they differ, or a token's log p depends on the tokens after it
    fails      the package raised anything else, or the process died after the model was built
    not built  the tiny config, or the model's own forward, does not work here: nothing is known

WRONG and fails end the command with status 1. The column ``padding`` says by how many nats a row's numbers change when
it stands left-padded in a batch: some recurrent models read their padding.

Every architecture has a forked process of its own, with limits on time and memory: one that hangs is a row.
"""

from __future__ import annotations

import argparse
import inspect
import math
import multiprocessing
import os
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from benchmarks import table
from benchmarks.measure import environment, write
from egrsd_kernels import Head, head_of, linear_logp, with_head
from egrsd_kernels.packing.proof import row_limit

RESULTS = table.ROOT / "benchmarks" / "results" / "models.json"
TOLERANCE = 1e-4  # nat: 26 roundings of a float32 logit of 100; a head that is read otherwise is off by 1e-2 and more
GRADIENT_TOLERANCE = 1e-4  # of its length: sums of float32 products in another order, through some layers
SECONDS = 60.0  # for an architecture
MEMORY = 4 << 30  # bytes
PARAMETERS = 20_000_000  # more is not tiny: a setting that the config has under another name
ROWS, LENGTH, WIDTH = 3, 24, 16  # the last WIDTH tokens of a row are its completion
PADDING = (0, 3, 6)  # of each row, on the left
VOCABULARY = 320
ORDINARY = range(10, 75)  # token ids that no config has a special meaning for

# ---------------------------------------------------------------------------------------------------------- settings

# What shows in the logits when it is overlooked.
TELLING = {
    "final_logit_softcapping": 2.0,
    "logits_soft_cap": 1.0,
    "output_logit_soft_cap": 2.0,
    "logit_scale": 0.25,
    "logits_scaling": 8.0,
    "output_multiplier": 0.25,
    "lm_head_multiplier": 0.05,
    "logits_mup_width_multiplier": 4.0,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.25,
    "dim_model_base": 16,
    "unpadded_vocab_size": 300,
    "lm_head_bias": True,
    "decoder_bias": True,
    "word_embed_proj_dim": 32,
    "sliding_window": 8,
    "image_token_id": 290,
    "image_token_index": 290,
    "video_token_id": 291,
    "audio_token_id": 292,
    "vision_start_token_id": 293,
    "vision_end_token_id": 294,
    "mm_tokens_per_image": 4,
    "image_grid_pinpoints": [[28, 28]],
}
TEXT = TELLING | {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,  # so many that hybrids have a layer of either kind
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "is_decoder": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    # the same under other names
    "d_model": 64,
    "n_embd": 64,
    "embedding_size": 64,
    "attention_hidden_size": 64,
    "n_inner": 64,
    "ffn_dim": 64,
    "ffn_hidden_size": 64,
    "decoder_ffn_dim": 64,
    "encoder_ffn_dim": 64,
    "dim_ff": 64,
    "dff": 64,
    "d_inner": 64,
    "d_ff": 64,
    "intermediate_size_mlp": 64,
    "shared_intermediate_size": 64,
    "n_layer": 4,
    "n_layers": 4,
    "num_layers": 4,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "n_positions": 512,
    "n_ctx": 512,
    "max_seq_len": 512,
    "context_length": 512,
    "rotary_dim": 8,
    "projector_hidden_size": 64,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "expert_ffn_size": 32,
    "expert_intermediate_size": 32,
    "moe_num_shared_experts": 1,
    "zero_expert_num": 0,
    "num_dense_layers": 1,
    "first_k_dense_replace": 1,
    "moe_layer_start_index": 1,
    # latent, linear and sparse attention, state spaces
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "index_topk": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "linear_num_heads": 2,
    "linear_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_d_ssm": 128,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "use_mamba_kernels": False,
    "max_window_layers": 1,
    # per-layer embeddings
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCABULARY,
    "num_kv_shared_layers": 0,
    "laurel_rank": 8,
}
# Sub-configs that are no language model: images, sound, what joins them to the text. They see no input here.
SENSES = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_heads": 2,
    "head_dim": 16,
    "depth": 1,
    "num_layers": 1,
    "encoder_layers": 1,
    "embed_dim": 32,
    "d_model": 32,
    "out_hidden_size": 64,
    "encoder_hidden_size": 32,
    "image_size": 28,
    "patch_size": 14,
    "num_channels": 3,
    "in_channels": 3,
    "latent_channels": 32,
    "base_channels": 32,
    "num_embeddings": 32,
    "projection_dim": 64,
    "image_token_embed_dim": 64,
    "text_hidden_size": 64,
    "mm_embed_dim": 32,
    "mm_posemb_size": 16,
    "output_proj_dims": 64,
    "codebook_dim": 32,
}

MROPE = {  # the halves of a head's 16 columns
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
}
IMAGE_TOKENS = {f"IMGIMG{c}Z": 280 + i for i, c in enumerate("ABCD")} | {"<image>": 290}
# Per model type, sub-configs included: what the settings above leave unbuildable or large.
OVERRIDES: dict[str, dict[str, Any]] = {
    # positions in three dimensions
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text", "paddleocr_vl_text"), MROPE),
    **dict.fromkeys(("glm4v_text", "glm46v_text", "glm_ocr_text", "glmga_text", "cosmos3_edge_text"), MROPE),
    **dict.fromkeys(("hy_v4_vl_text", "hunyuan_vl_text"), MROPE),
    "glm4v_moe_text": {
        "rope_parameters": MROPE["rope_parameters"] | {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
    },
    # layers of several kinds
    "bamba": {"attn_layer_indices": [1]},
    "bailing_hybrid": {"layer_group_size": 2},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")
        },
    },
    "dory": {"n_input_layers": 1, "n_output_layers": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 8},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "minimax_m3_vl_text": {"layer_types": ["minimax_m3_sparse", "full_attention"] * 2},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 128,
        "n_mamba_heads": 2,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    # mixtures of experts
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "dots1": {"n_shared_experts": 1},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [32, 32]},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 64,
    },
    "zaya": {"num_experts_per_tok": 1},
    # state spaces
    "falcon_mamba": {"state_size": 8, "time_step_rank": 8},
    "mamba": {"state_size": 8, "time_step_rank": 8},
    "mamba2": {"num_heads": 8, "state_size": 16, "n_groups": 1, "chunk_size": 8},
    "xlstm": {"chunk_size": 1, "mode": "train", "qk_dim_factor": 1.0},  # it divides the length of every row
    # images
    "aria": {"projector_patch_to_query_dict": {4: 4}},
    "qwen2_vl_vision": {"embed_dim": 32, "hidden_size": 64},
    "chameleon": {"vocabulary_map": IMAGE_TOKENS},
    "emu3": {"vocabulary_map": {"<|extra_200|>": 281, "<image>": 290, "<|visual token 000000|>": 282}},
    "granite4_vision": {  # its projector has a head for every 64 columns
        "vision_config": SENSES | {"model_type": "siglip_vision_model", "hidden_size": 64},
        "deepstack_layer_map": [],
        "downsample_rate": "1/2",
        "spatial_target_layers": [],
    },
    "molmo2_vision": {"image_size": [28, 28]},
    "muse_spark_audio": {"patch_sizes": [4], "hidden_sizes": [32], "depths": [1]},
    # the rest
    "xlm": {"causal": True},
    "mistral4": {"qk_rope_head_dim": 8, "head_dim": 8},
    "reformer": {"axial_pos_embds": False},
    "rembert": {"output_embedding_size": 64, "input_embedding_size": 64},
    "xmod": {"default_language": "en_XX"},
}

# ------------------------------------------------------------------------------------------------------------- build


class Architecture(NamedTuple):
    kind: str  # "causal", "vision-language" or "sequence-to-sequence"
    model_type: str
    class_name: str


def architectures() -> Iterator[Architecture]:
    """Each (config, model class) of the mappings once, under the config's own name where it has several."""
    seen = set()
    for kind, mapping in (
        ("vision-language", MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
        ("sequence-to-sequence", MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
        ("causal", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    ):
        for model_type, names in sorted(
            mapping.items(), key=lambda item: CONFIG_MAPPING[item[0]].model_type != item[0]
        ):
            class_name = names if isinstance(names, str) else names[0]
            key = (CONFIG_MAPPING[model_type], class_name)
            if key not in seen:
                seen.add(key)
                yield Architecture(kind, model_type, class_name)


def tiny_config(config_class: type[PretrainedConfig], common: dict[str, Any] = TEXT) -> PretrainedConfig:
    """A config of that class with the common settings that it knows, and its model type's overrides."""
    overrides = OVERRIDES.get(config_class.model_type, {})
    try:
        default = config_class(**overrides)
    except Exception:  # some are valid only as a whole
        default = None
    known = {*getattr(config_class, "__dataclass_fields__", ()), *getattr(config_class, "attribute_map", ())}
    known |= set(default.to_dict()) if default is not None else set()
    settings = {name: value for name, value in common.items() if name in known}
    if "kv_lora_rank" in settings:  # latent attention has keys and values for every head
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    for name, sub_class in config_class.sub_configs.items():
        sub_default = getattr(default, name, None)
        sub_class = type(sub_default) if isinstance(sub_default, PretrainedConfig) else sub_class
        if hasattr(sub_class, "model_type"):  # not AutoConfig: the default has no such part
            settings[name] = tiny_config(sub_class, TEXT if name in ("text_config", "decoder") else SENSES)
    return config_class(**settings | overrides)


def randomise(model: nn.Module) -> None:
    """Biases and norms that are not 0 and 1, and weights wherever the initialisation left none."""
    generator = torch.Generator().manual_seed(1)
    state_space = ("A_log", "dt_bias", ".D")  # their initial values keep the recurrence stable
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not p.is_floating_point():
                continue
            noise = torch.randn(p.shape, generator=generator)
            usable = bool(p.isfinite().all()) and p.abs().max() < 50
            if p.ndim == 1 and usable and not name.endswith(state_space):
                p += 0.1 * noise
            elif not usable or (p.ndim > 1 and p.std() < 1e-6):
                p.copy_(0.15 * noise)


def build(class_name: str, config: PretrainedConfig) -> nn.Module:
    torch.manual_seed(0)
    model_class = getattr(transformers, class_name)
    for name, sub_class in config.sub_configs.items():  # a language model under the name of the whole
        if model_class.config_class is sub_class:
            config = getattr(config, name)
    model = model_class(config).float().eval()
    parameters = sum(p.numel() for p in model.parameters())
    if parameters > PARAMETERS:
        raise ValueError(f"{parameters / 1e6:.0f} M parameters: the tiny config is not tiny")
    randomise(model)
    return model


# ----------------------------------------------------------------------------------------------------------- compare


class Numbers(NamedTuple):
    logp: Tensor
    entropy: Tensor

    def off(self, other: Numbers) -> dict[str, float]:
        """The largest difference of each in nats; a NaN is as wrong as can be."""
        return {
            name: (a - b).abs().nan_to_num(nan=math.inf).max().item()
            for name, a, b in zip(self._fields, self, other, strict=True)
        }


class Batch(NamedTuple):
    """What a model is called with."""

    inputs: Mapping[str, Tensor]

    @property
    def ids(self) -> Tensor:
        return self.inputs["input_ids"]

    def row(self, index: int, start: int) -> Batch:
        return Batch({name: x[[index], start:] for name, x in self.inputs.items()})


def batch() -> Batch:
    """Left-padded rows (ROWS, LENGTH) of text."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(ORDINARY.start, ORDINARY.stop, (ROWS, LENGTH), generator=generator)
    mask = (torch.arange(LENGTH) >= torch.tensor(PADDING)[:, None]).long()
    return Batch({"input_ids": ids * mask, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)})


def with_image(model: nn.Module) -> Batch | None:
    """Two rows of an image and text, or None where this model's images are not made here.

    The image's inputs are the first of ``images()`` that the model takes. How many tokens it stands for, its features
    say. It has to show: another image gives other logits.
    """
    token = next((x for n in ("image_token_id", "image_token_index") if (x := getattr(model.config, n, None))), None)
    if token is None or not hasattr(model, "get_image_features"):
        return None
    text = batch().ids.clamp(min=ORDINARY.start)[:2]
    takes = inspect.signature(type(model).forward).parameters
    named = inspect.signature(model.get_image_features).parameters
    for image in images(model.config):
        image = {name: x for name, x in image.items() if name in takes}
        try:
            tokens = features_in(model.get_image_features(**{n: x for n, x in image.items() if n in named}))
            ids = torch.cat([text[:, :2], torch.full((2, tokens // 2), token), text[:, 2:]], dim=1)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            inputs |= {n: (ids == token).long() for n in ("mm_token_type_ids", "token_type_ids") if n in takes}
            one = Batch(inputs | image)
            another = Batch(inputs | image | {"pixel_values": image["pixel_values"].flip(0)})
            shows = (own_logits(model, one) - own_logits(model, another)).abs().max() > 1e-4
        except Exception:
            continue
        if shows:
            return one
    return None


def features_in(found: Any) -> int:
    """How many tokens two images stand for, by what get_image_features returns."""
    found = getattr(found, "pooler_output", found)
    parts = found if isinstance(found, (list, tuple)) else [found]
    return sum(part.shape[:-1].numel() for part in parts)


def images(config: PretrainedConfig) -> Iterator[dict[str, Tensor]]:
    """Two images, in the ways in which models take them."""
    vision = next((v for n in ("vision_config", "vision_tower_config") if (v := getattr(config, n, None))), config)
    random = torch.Generator().manual_seed(5)
    size, patch = (getattr(vision, name, None) for name in ("image_size", "patch_size"))
    patch = patch[0] if isinstance(patch, (list, tuple)) else patch or 14
    size = size[0] if isinstance(size, (list, tuple)) else size or 28
    for side in (size, 2 * size, 56, 112):
        picture = torch.randn(2, 3, side, side, generator=random)
        sizes = torch.tensor([[side, side]] * 2)
        yield {"pixel_values": picture, "image_sizes": sizes}
        pixels = {"pixel_mask": torch.ones(2, side, side, dtype=torch.bool)}
        yield {"pixel_values": picture, **pixels}
        several = {"pixel_values": picture[:, None], "pixel_attention_mask": pixels["pixel_mask"][:, None]}
        yield several | {"image_sizes": sizes}
        views = torch.randn(2, 2, 3, side, side, generator=random)
        yield {"pixel_values": views, "image_sizes": sizes}
    for frames in (2, 1):
        for grid in (4, 8):
            patches = torch.randn(2 * grid * grid, 3 * frames * patch * patch, generator=random)
            yield {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, grid, grid]] * 2)}
            yield {
                "pixel_values": patches.view(2, grid * grid, -1),
                "pixel_attention_mask": torch.ones(2, grid * grid, dtype=torch.long),
                "spatial_shapes": torch.tensor([[grid, grid]] * 2),
            }


def own_logits(model: nn.Module, given: Batch) -> Tensor:
    """(B, WIDTH, V) logits that predict the last tokens, as the model makes them."""
    return model(**given.inputs).logits[:, -WIDTH - 1 : -1].double()


def numbers_of(logits: Tensor, ids: Tensor) -> Numbers:
    log_p = logits.log_softmax(-1)
    logp = log_p.gather(-1, ids[:, -WIDTH:, None]).squeeze(-1)
    return Numbers(logp, -(log_p.exp() * log_p.clamp(min=-1e9)).sum(-1))  # 0, not NaN, where p = 0


def our_numbers(model: nn.Module, given: Batch, **options: Any) -> Numbers:
    """The same through the package."""

    def read(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor]:
        states, targets = hidden[:, -WIDTH - 1 : -1], given.ids[:, -WIDTH:]
        return linear_logp(states, head, targets, return_entropy=True, backend="torch", **options)

    (logp, entropy), _ = with_head(model, read, **given.inputs)
    return Numbers(logp.double(), entropy.double())


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    """(weights,) of all weights together."""
    weights = [p for p in model.parameters() if p.requires_grad]
    made = torch.autograd.grad(loss, weights, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(weights, made, strict=True)])


def gradients_off(model: nn.Module, given: Batch) -> float | None:
    """How far the gradient of a weighted sum of log p and entropies is from autograd's through the logits.

    By its length; None where autograd has none.
    """

    def weighed(numbers: Numbers) -> Tensor:
        return (numbers.logp * torch.linspace(-1, 1, WIDTH)).sum() - 0.3 * numbers.entropy.sum()

    with torch.enable_grad():
        try:
            own = gradient(model, weighed(numbers_of(own_logits(model, given), given.ids)))
        except (AssertionError, RuntimeError):
            return None
        if not own.isfinite().all():
            return None
        ours = gradient(model, weighed(our_numbers(model, given, entropy_grad=True)))
    off = ((ours - own).norm() / own.norm()).item()
    return math.inf if math.isnan(off) else off


def with_another_end(given: Batch) -> Batch:
    """The rows with another last token, from which nothing is predicted."""
    ids = given.ids.clone()
    ids[:, -1] = (ids[:, -1] + 1 - ORDINARY.start) % len(ORDINARY) + ORDINARY.start
    return Batch({**given.inputs, "input_ids": ids})


def own_numbers(model: nn.Module, given: Batch) -> tuple[Numbers, float]:
    """log p and entropy by the model's own logits, and by how many nats a token's change with the tokens after it."""
    logits = own_logits(model, given)
    if logits.shape[:2] != (len(given.ids), WIDTH):
        raise ValueError(f"its logits are {tuple(logits.shape)} where ({len(given.ids)}, {WIDTH}, V) were asked for")
    own = numbers_of(logits, given.ids)
    if not all(x.isfinite().all() for x in own):
        raise ValueError("its own log p is not finite")
    another = numbers_of(own_logits(model, with_another_end(given)), given.ids)
    return own, max(another.off(own).values())


def compare(model: nn.Module, given: Batch, own: Numbers, seen: float) -> dict[str, Any]:
    """The outcome for a model, beside its own numbers."""
    try:
        head = head_of(model)
        ours = our_numbers(model, given)
    except ValueError as error:
        return {"outcome": "refused", "reason": one_line(error)}
    row = {"scale": head.logit_scale, "softcap": head.softcap, **ours.off(own)}
    row["gradient"] = gradients_off(model, given)
    if (off := max(row["logp"], row["entropy"])) > TOLERANCE:
        return {"outcome": "WRONG", "reason": f"off by {off:.2g} nat", **row}
    if (row["gradient"] or 0) > GRADIENT_TOLERANCE:
        return {"outcome": "WRONG", "reason": f"its gradient is off by {row['gradient']:.2g} of its length", **row}
    if seen > TOLERANCE:
        return {"outcome": "WRONG", "reason": f"tokens after it change a token's log p by {seen:.2g} nat", **row}
    return {"outcome": "right", **row}


def packing(model: nn.Module) -> dict[str, Any]:
    """Whether rows of text may be packed, and up to which length where that has an end; else why not."""
    try:
        limit = row_limit(model)
    except ValueError as error:
        return {"packs": False, "not_packed": one_line(error)}
    return {"packs": True, "row_limit": None if limit == math.inf else int(limit)}


def refusal(model: nn.Module) -> dict[str, Any]:
    """The outcome for a model that has to be refused, whatever its own forward needs."""
    try:
        head_of(model)
    except ValueError as error:
        return {"outcome": "refused", "reason": one_line(error)}
    return {"outcome": "WRONG", "reason": "an encoder-decoder is not refused"}


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or "no message"
    return (text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}")[:400]


@torch.no_grad()
def judge(architecture: Architecture) -> dict[str, Any]:
    """Build and compare one architecture, in this process."""
    model = None
    try:
        model, given = build(architecture.class_name, tiny_config(CONFIG_MAPPING[architecture.model_type])), batch()
        if architecture.kind == "vision-language":
            given = with_image(model) or given
        own, seen = own_numbers(model, given)
    except Exception as error:
        if model is not None and model.config.is_encoder_decoder:  # which asks for more than tokens
            return refusal(model)
        return {"outcome": "not built", "reason": one_line(error)}
    image = {"image": "pixel_values" in given.inputs}
    try:
        row = compare(model, given, own, seen) | image
        if row["outcome"] == "right" and "position_ids" in given.inputs:
            alone = [our_numbers(model, given.row(i, n)) for i, n in enumerate(PADDING)]
            padded = Numbers(*map(torch.cat, zip(*alone, strict=True)))
            row["padding"] = max(our_numbers(model, given).off(padded).values())
        return row | packing(model) if row["outcome"] == "right" else row
    except Exception as error:
        return {"outcome": "fails", "reason": one_line(error)}


# ---------------------------------------------------------------------------------------------------------- isolation


def _child(pipe, function: Callable, argument: Any) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(null, stream)
    torch.set_num_threads(1)  # the processes share the cores, and a thread pool does not survive a fork
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    pipe.send(function(argument))


def isolated(
    function: Callable[[Any], dict], arguments: list, jobs: int, seconds: float
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """(argument, function(argument)) as they come, each from a forked process, so many at a time."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(reversed(arguments)), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            argument = waiting.pop()
            pipe, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(theirs, function, argument), daemon=True)
            process.start()
            theirs.close()
            running[pipe] = argument, process, time.monotonic() + seconds
        ready = wait(list(running), timeout=max(0, min(end for *_, end in running.values()) - time.monotonic()))
        for pipe, (argument, process, end) in list(running.items()):
            if pipe in ready:
                try:
                    found = pipe.recv()
                except EOFError:
                    process.join()
                    found = {"outcome": "fails", "reason": f"its process died (exit code {process.exitcode})"}
            elif time.monotonic() >= end:
                process.kill()
                found = {"outcome": "not built", "reason": f"took longer than {seconds:.0f} s"}
            else:
                continue
            process.join()
            pipe.close()
            del running[pipe]
            yield argument, found


# -------------------------------------------------------------------------------------------------------------- print


def line(row: dict[str, Any]) -> str:
    figures = ""
    if row["outcome"] == "right":
        figures = f"off by {max(row['logp'], row['entropy']):.1e} nat, gradient {row['gradient'] or math.nan:.1e}"
        figures += ", an image" * row["image"] + ", packs" * row["packs"]
    return f"{row['kind']:<22}{row['model_type']:<28}{row['outcome']:<10}{row.get('reason', figures)}"


def summary(rows: list[dict[str, Any]]) -> Iterator[str]:
    for kind in sorted({row["kind"] for row in rows}):
        counted = Counter(row["outcome"] for row in rows if row["kind"] == kind)
        packs = sum(row.get("packs", False) for row in rows if row["kind"] == kind)
        yield f"{kind}: " + ", ".join(f"{n} {outcome}" for outcome, n in counted.most_common()) + f"; {packs} pack"


def main(argv: list[str] | None = None) -> int:
    known = list(architectures())
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__.split("\n")[0])
    parser.add_argument("model_types", nargs="*", metavar="MODEL_TYPE", help="as transformers names them; default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for an architecture")
    parser.add_argument("--all-rows", action="store_true", help="print those that are right as well")
    parser.add_argument(
        "--output", type=Path, help="a result file (JSON); of all: models.json, and docs/models.md of it"
    )
    args = parser.parse_args(argv)
    if unknown := set(args.model_types) - {architecture.model_type for architecture in known}:
        parser.error(f"MODEL_TYPE: expected one that transformers {transformers.__version__} maps, got {min(unknown)}")
    chosen = [a for a in known if a.model_type in (args.model_types or {a.model_type})]
    rows = []
    for architecture, found in isolated(judge, chosen, args.jobs, args.seconds):
        rows.append(architecture._asdict() | found)
        if args.all_rows or found["outcome"] != "right":
            print(line(rows[-1]), flush=True)
    print(*summary(rows), sep="\n")
    if args.output or not args.model_types:
        rows.sort(key=lambda row: (row["kind"], row["model_type"], row["class_name"]))
        about = environment(torch.device("cpu"), ["transformers"])
        write(args.output or RESULTS, {"environment": about, "tolerance": TOLERANCE, "rows": rows})
    if not (args.output or args.model_types):
        table.main([])
    return int(any(row["outcome"] in ("WRONG", "fails") for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
