"""The README's examples run: the loss as it stands, the trainer with settings for a tiny model on a CPU."""

from __future__ import annotations

import pytest

from tests.examples import blocks, language_model

LOSS, WITH_TRL = blocks("README.md")


def test_example_trains_the_adapters():
    names = language_model()
    exec(LOSS, names)
    # The adapters start as the identity, so the loss is that of plain likelihoods under the gate.
    assert names["loss"].isfinite() and names["loss"] != 0
    gradients = {name: p.grad for name, p in names["model"].named_parameters() if p.requires_grad}
    assert all("lora" in name for name in gradients)
    assert any(g.abs().max() > 0 for g in gradients.values())


def test_example_with_trl(tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="TRL is not installed")
    from egrsd_kernels.rollouts import find_rollout_files
    from tests import trl_tiny

    monkeypatch.chdir(tmp_path)
    options = {name: value for name, value in trl_tiny.OPTIONS.items() if name not in ("gamma", "lookahead")}
    names = {
        "model": trl_tiny.tiny_model(), "reward_funcs": trl_tiny.correct, "dataset": trl_tiny.dataset(),
        "lora": trl_tiny.LORA, "options": options, "tokenizer": trl_tiny.tokenizer(),
    }  # fmt: skip
    example = WITH_TRL.replace("rollout_steps=50)", "rollout_steps=1, **options)")
    example = example.replace("peft_config=lora)", "peft_config=lora, processing_class=tokenizer)")
    exec(example, names)
    assert len(find_rollout_files("run")) == options["max_steps"]
