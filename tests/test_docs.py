"""The examples of docs/ run, page by page and block after block, and do what their page says."""

from __future__ import annotations

import difflib
import json
import math
import pkgutil
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import egrsd_kernels
from egrsd_kernels import fused_egrsd_loss, head_of, linear_logp, read_hidden, token_statistics
from egrsd_kernels.credit import REGIMES
from egrsd_kernels.rl import response_hidden, token_stats
from tests.support.doc_examples import ROOT, blocks, language_model

PAGES = sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def run(page: str, names: dict[str, Any]) -> dict[str, Any]:
    """Every block of the page in one namespace, as a reader would paste them; what they left there."""
    for index, block in enumerate(blocks(page), 1):
        exec(compile(block, f"{page}, python block {index}", "exec"), names)
    return names


def test_every_page_is_linked_and_in_the_navigation():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page for page in PAGES if page != "index.md" and f"(docs/{page})" not in readme] == []
    assert [page for page in PAGES if not re.search(rf"^ *- .*: {page}$", site, re.MULTILINE)] == []


def test_every_public_name_is_in_the_reference():
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    shown = re.findall(r"^::: (\S+)$", page, re.MULTILINE)
    for name in shown:
        if not name.startswith("egrsd_kernels.trl"):
            assert pkgutil.resolve_name(name).__doc__
    assert {f"egrsd_kernels.{name}" for name in egrsd_kernels.__all__} <= set(shown)
    assert {f"egrsd_kernels.{name}" for name in ("credit", "rl", "rollouts", "presets")} <= set(shown)


def test_every_page_with_examples_is_tested():
    """By a test below, that is."""
    assert [page for page in PAGES if blocks(f"docs/{page}")] == [
        "divergences.md",
        "from-grpo.md",
        "own-loop.md",
        "own-method.md",
        "packing.md",
        "trl-trainers.md",
        "tuning.md",
    ]
    assert [page for page in PAGES if blocks(f"docs/{page}", "yaml")] == ["command-line.md"]


# ------------------------------------------------------------------------------------------------------- from-grpo.md


def test_the_diff_turns_the_grpo_script_into_the_egrsd_script():
    grpo, egrsd = (script.splitlines(keepends=True) for script in blocks("docs/from-grpo.md")[:2])
    (shown,) = blocks("docs/from-grpo.md", "diff")
    assert shown == "".join(difflib.unified_diff(grpo, egrsd, "grpo.py", "egrsd.py", n=0))


def tiny(config: type) -> type:
    """``config`` with what a tiny model on a CPU needs, whatever an example asks for."""
    from tests.support import trl_tiny

    fields = config.__dataclass_fields__
    settings = {key: value for key, value in trl_tiny.OPTIONS.items() if key not in ("gamma", "lookahead")}
    settings = {key: value for key, value in settings.items() if key in fields}

    class Tiny(config):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | settings)

    return Tiny


@pytest.fixture
def trainers(tmp_path, monkeypatch) -> list[Any]:
    """The trainers that scripts make, beside a model under the path that they name and a data file of sums."""
    trl = pytest.importorskip("trl", reason="TRL is not installed")

    import egrsd_kernels.trl
    from tests.support import trl_tiny

    monkeypatch.chdir(tmp_path)
    trl_tiny.tiny_model().save_pretrained("Qwen/Qwen3-4B")
    trl_tiny.tokenizer().save_pretrained("Qwen/Qwen3-4B")
    rows = [json.dumps(row) for row in trl_tiny.dataset()]
    Path("problems.jsonl").write_text("\n".join(rows), encoding="utf-8")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for module, name in ((trl, "GRPOConfig"), (egrsd_kernels.trl, "EGRSDConfig")):
        monkeypatch.setattr(module, name, tiny(getattr(module, name)))
    made: list[Any] = []
    for module, name in ((trl, "GRPOTrainer"), (egrsd_kernels.trl, "EGRSDTrainer")):
        cls = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, cls=cls, **k: made.append(cls(*a, **k)) or made[-1])
    return made


def test_from_grpo(trainers):
    """The scripts run as they stand."""
    names = run("docs/from-grpo.md", {})
    steps = [(type(trainer).__name__, trainer.state.global_step) for trainer in trainers]
    assert steps == [("GRPOTrainer", 2), ("EGRSDTrainer", 2), ("EGRSDTrainer", 0)]
    assert (trainers[1].args.gamma, trainers[1].args.lookahead) == (0.3, 3)
    assert names["messages"][1]["content"].startswith("A correct solution, for reference:\n")
    assert trainers[1].train_dataset[0]["solution"] in names["messages"][1]["content"]
    assert names["rlsd"].gamma == 0 and names["rlsd"].clip_eps == 0.2 and names["rlsd"].lookahead == 0
    assert names["reinforce"].clip_eps == 0 and names["reinforce"].advantage == "welford"
    assert names["grpo"].advantage == "group" and names["grpo"].length_beta == 0
    assert names["model_config"].model_name_or_path == "Qwen/Qwen3-4B"
    assert (names["config"].gamma, names["config"].lookahead) == (0.3, 3)


def test_trl_trainers(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    pytest.importorskip("trl", reason="TRL is not installed")

    from egrsd_kernels.trl import unfuse_heads
    from egrsd_kernels.trl.fused_head import FusedForward
    from tests.support import trl_tiny

    answers = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    settings = {name: trl_tiny.OPTIONS[name] for name in ("max_steps", "report_to", "bf16", "use_cpu", "disable_tqdm")}
    ids = torch.arange(6, 22).view(2, 8)
    names = {
        "model": trl_tiny.tiny_model(), "policy": trl_tiny.tiny_model(), "tokenizer": trl_tiny.tokenizer(),
        "dataset": trl_tiny.dataset().map(lambda row: answers).select_columns(["prompt", *answers]),
        "settings": settings | {"output_dir": str(tmp_path), "beta": 1.0, "gradient_checkpointing": False},
        "ids": ids, "labels": ids.masked_fill(ids < 9, -100), "advantages": torch.tensor([1.0, -0.5]),
        "student": trl_tiny.tiny_model(), "correct": trl_tiny.correct, "prompts": trl_tiny.dataset(),
        "rollout_settings": settings | {
            "output_dir": str(tmp_path / "sdpo"), "num_generations": 2, "max_completion_length": 4,
            "teacher_model_kind": "live", "per_device_train_batch_size": 2,
        },
    }  # fmt: skip
    names["model"].save_pretrained(tmp_path / "model")
    names["model"].config._name_or_path = str(tmp_path / "model")  # where DPO loads its reference from
    try:
        names = run("docs/trl-trainers.md", names)
    finally:
        unfuse_heads()
    trainer = names["trainer"]
    assert trainer.state.global_step == names["sdpo"].state.global_step == 2
    assert all(isinstance(model.forward, FusedForward) for model in (trainer.model, trainer.ref_model))
    logp = names["policy"](input_ids=ids).logits.div(0.8).log_softmax(-1)[:, :-1]
    expected = logp.gather(2, ids[:, 1:, None]).squeeze(2).masked_fill(~names["out"].label_mask, 0)
    torch.testing.assert_close(names["out"].log_probs, expected, rtol=1e-5, atol=1e-5)
    assert names["out"].label_mask.sum() == 12 and names["policy"].lm_head.weight.grad.any()


# ------------------------------------------------------------------------------------------------------ own-method.md


def test_own_method(trainers):
    """A larger model, an earlier student and two contexts teach; one's own loop has the gradient of the fused loss."""
    import transformers

    from tests.support import trl_tiny

    torch.manual_seed(1)
    config = trl_tiny.tiny_model().config.to_dict() | {"hidden_size": 48, "num_hidden_layers": 3, "layer_types": None}
    transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**config)).save_pretrained("Qwen/Qwen3-8B")
    trl_tiny.tokenizer().save_pretrained("Qwen/Qwen3-8B")
    names = run("docs/own-method.md", {})
    larger, best, contrast = trainers
    assert [trainer.state.global_step for trainer in trainers] == [2, 2, 2]
    assert best.teacher is names["best"] and math.isfinite(best.teacher.best)
    assert best.teacher.best == max(row["reward"] for row in best.state.log_history if "reward" in row)
    teacher = larger.teacher.model
    assert teacher.dtype == torch.bfloat16 and teacher.config.hidden_size == 48
    logged = [set(row) for row in contrast.state.log_history if "loss" in row]
    assert all({"right_entropy/mean", "wrong_abs_log_ratio/mean", "token_advantage/abs_mean"} <= row for row in logged)
    logp, evidence = names["logp"], names["evidence"]
    stats = token_stats(evidence)
    assert stats.magnitude.unique().numel() > 2 and stats.gate.unique().numel() > 2
    torch.testing.assert_close(logp.grad, -stats.token_advantage / 18)


# --------------------------------------------------------------------------------------------------------- packing.md


def test_packing(tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed")

    from egrsd_kernels.trl import unpack
    from tests.support import trl_tiny

    names = (
        "max_steps", "report_to", "bf16", "use_cpu", "disable_tqdm", "num_generations", "max_completion_length",
        "save_strategy",
    )  # fmt: skip
    names = {
        "model": trl_tiny.tiny_model(), "student": trl_tiny.tiny_model(), "reward": trl_tiny.correct,
        "tokenizer": trl_tiny.tokenizer(), "dataset": trl_tiny.dataset(), "lora": trl_tiny.LORA,
        "settings": {name: trl_tiny.OPTIONS[name] for name in names} | {
            "output_dir": str(tmp_path), "gradient_checkpointing": False, "per_device_train_batch_size": 4,
        },
    }  # fmt: skip
    grpo, egrsd = blocks("docs/packing.md")
    exec(grpo, names)
    assert names["trainer"].state.global_step == 2 and "_prepare_inputs" in vars(names["trainer"])
    unpack(names["trainer"])
    assert "_prepare_inputs" not in vars(names["trainer"])
    exec(egrsd, names)
    assert names["trainer"].state.global_step == 2 and names["trainer"]._packed.max_tokens_per_pack == 8192


# -------------------------------------------------------------------------------------------------------- own-loop.md


@pytest.fixture
def one_process(tmp_path):
    """A process group of one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def some_model(kind: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """(a tiny model, what it is called with)"""
    from benchmarks import models

    architecture = next(a for a in models.architectures() if a.model_type == kind)
    model = models.build(architecture.class_name, models.tiny_config(models.CONFIG_MAPPING[kind]))
    given = models.batch() if architecture.kind == "causal" else models.with_image(model)
    return model, dict(given.inputs)


@pytest.mark.parametrize("kind", ["qwen3", "granite", "qwen2_5_vl"])
def test_the_first_lines_are_right_for_any_model(kind):
    pytest.importorskip("transformers", reason="transformers is not installed")
    model, inputs = some_model(kind)
    targets = inputs["input_ids"][:, 1:]
    names = {"model": model, "inputs": inputs, "targets": targets}
    exec(blocks("docs/own-loop.md")[0], names)
    found = [p.grad for p in model.parameters()]
    assert ("pixel_values" in inputs) == (kind == "qwen2_5_vl")
    own = model(**inputs).logits[:, :-1].log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    torch.testing.assert_close(names["logp"], own, rtol=0, atol=1e-4)
    model.zero_grad(set_to_none=True)
    (-own.mean()).backward()
    for got, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-3, atol=1e-6)


def test_own_loop(one_process):
    """All ways of the page to compute the loss of one batch give the same gradients and the same number."""
    names = language_model()
    model = names["model"]
    with torch.no_grad():  # adapters that change something: teacher and student differ
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.1)
    trained = [p for p in model.parameters() if p.requires_grad]
    found = []
    written = torch.tensor([1, 1, 0, 1, 1, 1])
    names |= {"inputs": {"input_ids": torch.arange(12)[None]}, "targets": torch.arange(1, 12)[None], "written": written}
    for block in blocks("docs/own-loop.md"):
        exec(block, names)
        if any(p.grad is not None for p in trained):
            found.append([p.grad.clone() for p in trained])
            model.zero_grad(set_to_none=True)

    batch, head = names["batch"], head_of(model)
    read = lambda inputs, positions: response_hidden(read_hidden(model, **inputs), positions)  # noqa: E731
    with torch.no_grad(), model.disable_adapter():
        teacher_hidden = read(batch.teacher, batch.teacher_positions)
    hidden = read(batch.student, batch.student_positions)
    options = {"mask": batch.mask, "gamma": 0.3, "lookahead": 3}
    loss, stats = fused_egrsd_loss(
        hidden, head, teacher_hidden, batch.target_ids, names["advantages"], return_stats=True, **options
    )
    expected = torch.autograd.grad(loss, trained)
    assert max(g.abs().max() for g in expected) > 1e-3
    assert blocks("docs/own-loop.md")[1] == blocks("README.md")[0]
    _, loop, in_packs, *same = found
    same.append(loop)
    assert len(same) == 4  # in packs, in one batch, accumulated, and under DistributedDataParallel
    for gradients in same:
        for got, want in zip(gradients, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)

    # A loss with an entropy bonus, from full logits.
    log_p = torch.nn.functional.linear(read(batch.student, batch.student_positions), head.weight).log_softmax(-1)
    chosen = batch.target_ids.clamp(min=0)[..., None]
    logp, entropy = log_p.gather(-1, chosen)[..., 0], -(log_p.exp() * log_p).sum(-1)
    bonus = names["advantages"][:, None] * (logp - logp.detach()).exp() + 0.01 * entropy
    policy_loss = -(bonus * batch.mask).sum() / batch.mask.sum()
    torch.testing.assert_close(names["policy_loss"], policy_loss)
    pairs = (torch.autograd.grad(x, trained) for x in (names["policy_loss"], policy_loss))
    for got, want in zip(*pairs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)

    # The clipped loss in packs, at a ratio of 1.
    kept = batch.mask.masked_scatter(batch.mask, written.bool())
    logp = linear_logp(read(batch.student, batch.student_positions), head, batch.target_ids, mask=batch.mask)
    expected = torch.autograd.grad(-(logp * names["advantages"][:, None] * kept).sum() / kept.sum(), trained)
    for got, want in zip(in_packs, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)

    # verl's tensors: the whole sequences packed, what belongs to responses (bsz, T).
    rows = [p + r for p, r in zip(names["student_prompts"], names["responses"], strict=True)]
    packed = {
        "input_ids": torch.tensor([[token for row in rows for token in row]]),
        "position_ids": torch.tensor([[index for row in rows for index in range(len(row))]]),
    }
    lengths = [len(p) + len(r) for p, r in zip(names["student_prompts"], names["responses"], strict=True)]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    from_verl = names["egrsd_from_verl_tensors"](
        read_hidden(model, **packed),
        head.weight,
        torch.nested.nested_tensor_from_jagged(packed["input_ids"][0], offsets),
        torch.tensor([len(prompt) for prompt in names["student_prompts"]]),
        batch.mask,
        names["advantages"][:, None].expand(batch.mask.shape),
        stats.teacher_logp,
        stats.teacher_entropy,
        normalizer=batch.mask.sum(),
        entropy_scale=names["entropy_scale"],
        gamma=0.3,
        lookahead=3,
    )
    torch.testing.assert_close(from_verl, loss)


# ---------------------------------------------------------------------------------------------------------- tuning.md


def test_the_metrics_of_the_page_are_logged(tmp_path):
    """Every name with a slash, where … stands for any ending."""
    pytest.importorskip("trl", reason="TRL is not installed")
    from tests.support import trl_tiny

    trainer, logs = trl_tiny.make(tmp_path, max_steps=1)
    trainer.train()
    text = (ROOT / "docs/tuning.md").read_text(encoding="utf-8")
    names = set(re.findall(r"`(\w+/\w*…?)[` ]", text))
    assert len(names) > 10
    regimes = {f"restored/{name}" for name in REGIMES}  # there only with a token in them
    for name in names:
        assert any(re.fullmatch(name.replace("…", ".*"), key) for key in (*logs.steps[0], *regimes)), name


def test_tuning():
    torch.manual_seed(0)
    head, mask = torch.randn(50, 16), torch.ones(3, 40, dtype=torch.bool)
    mask[1, 30:] = False
    scale = torch.linspace(0.05, 1.5, 40)[:, None]  # from undecided to decided
    names = {
        "student_hidden": (torch.randn(3, 40, 16) * scale).requires_grad_(),
        "teacher_hidden": torch.randn(3, 40, 16) * scale,
        "head": head,
        "target_ids": torch.randint(50, (3, 40)),
        "advantages": torch.tensor([1.0, -0.5, 0.3]),
        "mask": mask,
    }
    run("docs/tuning.md", names)
    names["loss"].backward()
    assert names["student_hidden"].grad.abs().max() > 0
    entropy = token_statistics(names["teacher_hidden"], head, names["target_ids"], mask=mask).entropy[mask]
    assert 1 < names["scale"] < entropy.max()
    torch.testing.assert_close(names["gate"], 1 - 0.3 * names["stats"].lookahead_entropy[mask] / names["scale"])


# ----------------------------------------------------------------------------------------------------- divergences.md


def test_divergences(monkeypatch):
    pytest.importorskip("trl", reason="TRL is not installed")
    from egrsd_kernels import trl

    monkeypatch.setattr(trl, "EGRSDConfig", tiny(trl.EGRSDConfig))
    torch.manual_seed(0)
    head, mask = torch.randn(50, 16), torch.ones(3, 40, dtype=torch.bool)
    mask[1, 30:] = False
    names = {
        "student_hidden": torch.randn(3, 40, 16, requires_grad=True),
        "teacher_hidden": torch.randn(3, 40, 16) * torch.linspace(0.05, 1.5, 40)[:, None],
        "head": head,
        "target_ids": torch.randint(50, (3, 40)),
        "advantages": torch.tensor([1.0, -0.5, 0.3]),
        "mask": mask,
        "token_weights": torch.rand(3, 40),
        "old_logp": -5 * torch.rand(3, 40),
    }
    run("docs/divergences.md", names)
    switched = torch.where(names["unsure"], names["forward"], names["reverse"])
    assert (names["forward"] > 0).any() and (names["reverse"] > 0).any()
    assert torch.equal(switched, names["forward"] + names["reverse"])
    assert names["config"].divergence == "reverse_kl"
    first = names["student_hidden"].grad.clone()
    names["loss"].backward()
    assert first.any() and (names["student_hidden"].grad != first).any()


# ---------------------------------------------------------------------------------------------------- command-line.md


def test_commands_are_understood(tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="TRL is not installed")
    from egrsd_kernels import cli
    from egrsd_kernels.cli.train import find_config, read_config
    from egrsd_kernels.trl.settings import parse_settings

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("egrsd_kernels.trl.EGRSDConfig.world_size", 8)
    (config,) = blocks("docs/command-line.md", "yaml")
    (shell,) = (block for block in blocks("docs/command-line.md", "sh") if "egrsd train" in block)
    Path("config.yaml").write_text(config)
    settings = []
    for line in shell.splitlines():
        words = re.sub(r"^(egrsd|accelerate launch -m egrsd_kernels) ", "", line)
        args, overrides = cli.build_parser().parse_known_args(shlex.split(words, comments=True))
        settings.append(parse_settings(read_config(find_config(args.config)), [*overrides, "--use_cpu"]))
    assert [training.lookahead for _, training, _ in settings] == [3, 3, 3, 3]
    assert settings[0][1].learning_rate == 1e-5
    assert all(arguments.reward_funcs == ["rewards.py:correct"] for arguments, _, _ in settings)
