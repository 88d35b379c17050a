"""The README's examples run: the loss as it stands, the trainer with settings for a tiny model on a CPU.

Of the command line, the config and the options are parsed.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.support.doc_examples import blocks, language_model

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
    from tests.support import trl_tiny

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


def test_commands_are_understood(tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="TRL is not installed")
    from egrsd_kernels import cli
    from egrsd_kernels.cli.train import find_config, read_config
    from egrsd_kernels.trl.settings import parse_settings

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("egrsd_kernels.trl.EGRSDConfig.world_size", 8)
    (config,) = blocks("README.md", "yaml")
    (shell,) = (block for block in blocks("README.md", "sh") if "egrsd train" in block)
    Path("config.yaml").write_text(config)
    settings = []
    for line in shell.splitlines():
        words = re.sub(r"^(egrsd|accelerate launch -m egrsd_kernels) ", "", line)
        args, overrides = cli.build_parser().parse_known_args(shlex.split(words, comments=True))
        settings.append(parse_settings(read_config(find_config(args.config)), [*overrides, "--use_cpu"]))
    assert [training.lookahead for _, training, _ in settings] == [3, 3, 3, 3]
    assert settings[0][1].learning_rate == 1e-5
    assert all(arguments.reward_funcs == ["rewards.py:correct"] for arguments, _, _ in settings)
