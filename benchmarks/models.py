"""Whether the package reads the head of every architecture right, beside each model's own logits.

    python -m benchmarks.models --output benchmarks/results/models.json
    python -m benchmarks.models gemma2 granite

For every architecture of transformers' causal and image-text-to-text mappings it builds a tiny model with random
weights, in float32, whose scales, caps, biases and windows have values that show. It asks the package for the head,
as the trainer does at construction, reads log p and entropy of the last tokens of a left-padded batch through
``token_statistics``, and compares them with the softmax of the model's own logits. Outcomes:

    right      log p and entropy agree to ``TOLERANCE`` nat
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
import json
import logging
import math
import multiprocessing
import os
import resource
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
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
)

from benchmarks.measure import environment, write
from egrsd_kernels import token_statistics
from egrsd_kernels.trl.hidden import check_head, hand_out_hidden_states

TOLERANCE = 1e-4  # nat: 16 roundings of a float32 logit of 100; a head that is read otherwise is off by 1e-2 and more
SECONDS = 60.0  # for an architecture
MEMORY = 4 << 30  # bytes
PARAMETERS = 20_000_000  # more is not tiny: a setting that the config has under another name
ROWS, LENGTH, WIDTH = 3, 24, 16  # the last WIDTH tokens of a row are its completion
PADDING = (0, 3, 6)  # of each row, on the left
VOCABULARY = 320
ORDINARY = range(10, 75)  # token ids that no config has a special meaning for

# ---------------------------------------------------------------------------------------------------------- settings

# What shows in the logits when it is overlooked.
TELLING = dict(
    final_logit_softcapping=2.0,
    logits_soft_cap=1.0,
    output_logit_soft_cap=2.0,
    logit_scale=0.25,
    logits_scaling=8.0,
    output_multiplier=0.25,
    lm_head_multiplier=0.05,
    logits_mup_width_multiplier=4.0,
    embedding_multiplier=2.0,
    residual_multiplier=0.5,
    attention_multiplier=0.25,
    dim_model_base=16,
    lm_head_bias=True,
    decoder_bias=True,
    word_embed_proj_dim=32,
    sliding_window=8,
)
TEXT = TELLING | dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    initializer_range=0.15,
    is_decoder=True,
    bos_token_id=2,
    eos_token_id=1,
    pad_token_id=0,
    # the same under other names
    d_model=64,
    n_embd=64,
    embedding_size=64,
    attention_hidden_size=64,
    n_inner=64,
    ffn_dim=64,
    ffn_hidden_size=64,
    decoder_ffn_dim=64,
    encoder_ffn_dim=64,
    dim_ff=64,
    dff=64,
    d_inner=64,
    d_ff=64,
    intermediate_size_mlp=64,
    shared_intermediate_size=64,
    n_layer=2,
    n_layers=2,
    num_layers=2,
    encoder_layers=2,
    decoder_layers=2,
    n_head=4,
    n_heads=4,
    num_heads=4,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    n_positions=512,
    n_ctx=512,
    max_seq_len=512,
    context_length=512,
    rotary_dim=8,
    # mixtures of experts
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    moe_num_experts=4,
    num_experts_per_tok=2,
    moe_k=2,
    moe_topk=2,
    n_group=1,
    topk_group=1,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
    moe_shared_expert_intermediate_size=32,
    expert_ffn_size=32,
    expert_intermediate_size=32,
    moe_num_shared_experts=1,
    zero_expert_num=0,
    num_dense_layers=1,
    first_k_dense_replace=1,
    moe_layer_start_index=1,
    # latent, linear and sparse attention, state spaces
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
    index_topk=8,
    index_n_heads=2,
    index_head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    mamba_n_heads=8,
    mamba_d_head=16,
    mamba_d_state=16,
    mamba_d_ssm=128,
    mamba_n_groups=1,
    mamba_chunk_size=8,
    use_mamba_kernels=False,
    max_window_layers=1,
    # per-layer embeddings
    hidden_size_per_layer_input=16,
    vocab_size_per_layer_input=VOCABULARY,
    num_kv_shared_layers=0,
    laurel_rank=8,
    # dropout would be two draws
    dropout=0.0,
    attention_dropout=0.0,
    activation_dropout=0.0,
    hidden_dropout=0.0,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    attn_pdrop=0.0,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
)
# Sub-configs that are no language model: images, sound, what joins them to the text. They see no input here.
SENSES = dict(
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    num_heads=2,
    head_dim=16,
    depth=1,
    num_layers=1,
    encoder_layers=1,
    embed_dim=32,
    d_model=32,
    out_hidden_size=64,
    encoder_hidden_size=32,
    image_size=28,
    patch_size=14,
)

# Per model type, sub-configs included: what the settings above leave unbuildable or large.
OVERRIDES: dict[str, dict[str, Any]] = {}

# ------------------------------------------------------------------------------------------------------------- build


class Architecture(NamedTuple):
    kind: str  # "causal" or "vision-language"
    model_type: str
    class_name: str


def architectures() -> Iterator[Architecture]:
    """Each (config, model class) of the two mappings once, as vision-language where it stands in both."""
    seen = set()
    for kind, mapping in (
        ("vision-language", MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
        ("causal", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    ):
        for model_type, names in mapping.items():
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
    model = getattr(transformers, class_name)(config).float().eval()
    parameters = sum(p.numel() for p in model.parameters())
    if parameters > PARAMETERS:
        raise ValueError(f"{parameters / 1e6:.0f} M parameters: the tiny config is not tiny")
    randomise(model)
    return model


# ----------------------------------------------------------------------------------------------------------- compare


class Numbers(NamedTuple):
    logp: Tensor
    entropy: Tensor

    def off(self, other: Numbers) -> float:
        """The largest difference in nats; a NaN is as wrong as can be."""
        worst = max((a - b).abs().max().item() for a, b in zip(self, other, strict=True))
        return math.inf if math.isnan(worst) else worst


def read_head(model: nn.Module) -> float | None:
    """What the trainer does at construction: the softcap, or a ValueError. The one place that knows the package's way."""
    softcap = check_head(model)
    hand_out_hidden_states(model)
    return softcap


def batch() -> tuple[Tensor, Tensor]:
    """(ids, mask) of left-padded rows (ROWS, LENGTH)."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(ORDINARY.start, ORDINARY.stop, (ROWS, LENGTH), generator=generator)
    mask = (torch.arange(LENGTH) >= torch.tensor(PADDING)[:, None]).long()
    return ids * mask, mask


def inputs_of(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """What the trainer passes to the model."""
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def own_logits(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """(B, WIDTH, V) logits that predict the last tokens, as the model makes them."""
    return model(**inputs_of(ids, mask)).logits[:, -WIDTH - 1 : -1].double()


def numbers_of(logits: Tensor, ids: Tensor) -> Numbers:
    log_p = logits.log_softmax(-1)
    logp = log_p.gather(-1, ids[:, -WIDTH:, None]).squeeze(-1)
    return Numbers(logp, -(log_p.exp() * log_p.clamp(min=-1e9)).sum(-1))  # 0, not NaN, where p = 0


def our_numbers(model: nn.Module, ids: Tensor, mask: Tensor, softcap: float | None) -> Numbers:
    """The same through the package, as the trainer reads them."""

    def read(hidden: Tensor, weight: Tensor, bias: Tensor | None):
        states = hidden[:, -WIDTH - 1 : -1]
        return token_statistics(states, weight, ids[:, -WIDTH:], bias=bias, softcap=softcap, backend="torch")

    out = model(**inputs_of(ids, mask), read_hidden=read)
    return Numbers(out.logp.double(), out.entropy.double())


@torch.no_grad()
def compare(model: nn.Module) -> dict[str, Any]:
    """The outcome for a model whose forward works."""
    ids, mask = batch()
    logits = own_logits(model, ids, mask)
    own = numbers_of(logits, ids)
    later = ids.clone()
    later[:, -1] = (later[:, -1] + 1 - ORDINARY.start) % len(ORDINARY) + ORDINARY.start  # no position predicts from it
    seen = numbers_of(own_logits(model, later, mask), ids).off(own)
    try:
        softcap = read_head(model)
    except ValueError as error:
        return {"outcome": "refused", "reason": one_line(error)}
    ours = our_numbers(model, ids, mask, softcap)
    alone = [our_numbers(model, ids[[i], n:], mask[[i], n:], softcap) for i, n in enumerate(PADDING)]
    off = ours.off(own)
    row = {"softcap": softcap, "off": off, "padding": ours.off(Numbers(*map(torch.cat, zip(*alone, strict=True))))}
    if off > TOLERANCE:
        return {"outcome": "WRONG", "reason": f"off by {off:.2g} nat", **row}
    if seen > TOLERANCE:
        return {"outcome": "WRONG", "reason": f"tokens after it change a token's log p by {seen:.2g} nat", **row}
    return {"outcome": "right", **row}


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or "no message"
    return (text if type(error) is ValueError else f"{type(error).__name__}: {text}")[:200]


def judge(architecture: Architecture) -> dict[str, Any]:
    """Build and compare one architecture, in this process."""
    try:
        model = build(architecture.class_name, tiny_config(CONFIG_MAPPING[architecture.model_type]))
        ids, mask = batch()
        with torch.no_grad():
            logits = model(input_ids=ids[:1]).logits
        if logits.shape[:2] != (1, LENGTH) or not logits.isfinite().any():
            raise ValueError(f"its logits are {tuple(logits.shape)}, or not finite")
    except Exception as error:
        return {"outcome": "not built", "reason": one_line(error)}
    try:
        return compare(model)
    except Exception as error:
        return {"outcome": "fails", "reason": one_line(error)}


# ---------------------------------------------------------------------------------------------------------- isolation


def _child(pipe, function: Callable, argument: Any) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(null, stream)
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
    return f"{row['kind']:<16}{row['model_type']:<28}{row['outcome']:<10}{row.get('reason', '')}".rstrip()


def summary(rows: list[dict[str, Any]]) -> Iterator[str]:
    for kind in sorted({row["kind"] for row in rows}):
        counted = Counter(row["outcome"] for row in rows if row["kind"] == kind)
        yield f"{kind}: " + ", ".join(f"{n} {outcome}" for outcome, n in counted.most_common())


def main(argv: list[str] | None = None) -> int:
    known = list(architectures())
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__.split("\n")[0])
    parser.add_argument("model_types", nargs="*", metavar="MODEL_TYPE", help="as transformers names them; default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for an architecture")
    parser.add_argument("--all-rows", action="store_true", help="print those that are right as well")
    parser.add_argument("--output", type=Path, help="a result file (JSON)")
    args = parser.parse_args(argv)
    if unknown := set(args.model_types) - {architecture.model_type for architecture in known}:
        parser.error(f"MODEL_TYPE: expected one that transformers {transformers.__version__} maps, got {min(unknown)}")
    chosen = [a for a in known if a.model_type in (args.model_types or {a.model_type})]
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)  # a fork of a thread pool hangs
    rows = []
    for architecture, found in isolated(judge, chosen, args.jobs, args.seconds):
        rows.append(architecture._asdict() | found)
        if args.all_rows or found["outcome"] != "right":
            print(line(rows[-1]), flush=True)
    print(*summary(rows), sep="\n")
    if args.output:
        rows.sort(key=lambda row: (row["kind"], row["model_type"], row["class_name"]))
        about = environment(torch.device("cpu"), ["transformers", "trl"])
        write(args.output, {"environment": about, "tolerance": TOLERANCE, "rows": rows})
    return int(any(row["outcome"] in ("WRONG", "fails") for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
