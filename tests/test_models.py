"""The comparison of heads with the models' own logits, on an architecture of every kind."""

from __future__ import annotations

import os
import time

import pytest
import torch

pytest.importorskip("trl")
from benchmarks import models
from benchmarks.models import Architecture

ARCHITECTURES = {(a.kind, a.model_type): a for a in models.architectures()}
RIGHT = {
    "plain": ("causal", "qwen3"),
    "tied, learned positions": ("causal", "gpt2"),
    "projected before the head": ("causal", "opt"),
    "a bias": ("causal", "phi"),
    "a softcap": ("causal", "gemma2"),
    "state space": ("causal", "mamba2"),
    "vision-language": ("vision-language", "qwen2_5_vl"),
    "vision-language, another body": ("vision-language", "llava"),
}
SCALED = {
    "divided": ("causal", "granite"),
    "multiplied": ("causal", "cohere"),
    "multiplied, under another name": ("causal", "falcon_h1"),
    "multiplied, then capped": ("vision-language", "muse_glimmer"),
}
UNREAD = {
    "a transform before the head": ("causal", "modernbert-decoder"),
    "a cap that the forward ignores": ("vision-language", "gemma3"),
    "masked logits": ("vision-language", "chameleon"),
    "the answer in the encoder": ("sequence-to-sequence", "plbart"),
}


def architecture_of(key: tuple[str, str]) -> Architecture:
    if key not in ARCHITECTURES:
        pytest.skip(f"the installed transformers has no {key[0]} {key[1]}")
    return ARCHITECTURES[key]


@pytest.mark.heavy
@pytest.mark.parametrize("key", RIGHT.values(), ids=RIGHT)
def test_heads_that_are_read_right(key):
    row = models.judge(architecture_of(key))
    assert row["outcome"] == "right", row
    assert row["off"] <= models.TOLERANCE
    assert row["padding"] <= models.TOLERANCE


def test_the_softcap_is_reported():
    assert models.judge(architecture_of(("causal", "gemma2")))["softcap"] == 2.0


@pytest.mark.heavy
@pytest.mark.parametrize("key", SCALED.values(), ids=SCALED)
def test_scaled_heads_are_right_or_refused(key):
    row = models.judge(architecture_of(key))
    assert row["outcome"] in ("right", "refused"), row


@pytest.mark.heavy
@pytest.mark.parametrize("key", UNREAD.values(), ids=UNREAD)
def test_no_head_is_read_wrong(key):
    row = models.judge(architecture_of(key))
    assert row["outcome"] in ("right", "refused"), row


@pytest.mark.heavy
@pytest.mark.parametrize(
    "key",
    [RIGHT["a softcap"], *SCALED.values(), UNREAD["a transform before the head"], UNREAD["the answer in the encoder"]],
    ids=lambda key: key[1],
)
def test_what_a_package_overlooks_shows(monkeypatch, key):
    """A reader that takes every head for h Wᵀ + b is found out."""
    monkeypatch.setattr(models, "read_head", models.hand_out_hidden_states)
    row = models.judge(architecture_of(key))
    assert row["outcome"] == "WRONG", row


def test_a_model_that_cannot_be_built_says_why(monkeypatch):
    monkeypatch.setattr(models, "PARAMETERS", 1000)
    row = models.judge(architecture_of(("causal", "qwen3")))
    assert row["outcome"] == "not built"
    assert row["reason"].endswith("the tiny config is not tiny")


def test_a_traceback_is_no_refusal(monkeypatch):
    def broken(model):
        raise KeyError("hidden")

    monkeypatch.setattr(models, "read_head", broken)
    assert models.judge(architecture_of(("causal", "qwen3"))) == {"outcome": "fails", "reason": "KeyError: 'hidden'"}


def _act(what: str) -> dict:
    if what == "hang":
        time.sleep(60)
    if what == "die":
        os.kill(os.getpid(), 9)
    return {"outcome": what}


@pytest.mark.slow
def test_one_that_hangs_or_dies_is_a_row():
    rows = dict(models.isolated(_act, ["hang", "die", "right"], jobs=2, seconds=2.0))
    assert rows["right"] == {"outcome": "right"}
    assert rows["die"] == {"outcome": "fails", "reason": "its process died (exit code -9)"}
    assert rows["hang"] == {"outcome": "not built", "reason": "took longer than 2 s"}


def test_numbers_that_are_not_numbers_are_off():
    one, nan = torch.ones(2), torch.tensor([1.0, torch.nan])
    for a, b in ((one, nan), (nan, one)):
        assert models.Numbers(a, b).off(models.Numbers(one, one)) == torch.inf


@pytest.mark.parametrize(
    "outcome, status", [("right", 0), ("refused", 0), ("not built", 0), ("WRONG", 1), ("fails", 1)]
)
def test_the_command_ends_with_a_status(monkeypatch, capsys, tmp_path, outcome, status):
    row = (
        {"outcome": outcome, "reason": "because"}
        if outcome != "right"
        else {"outcome": "right", "off": 0, "padding": 0}
    )
    monkeypatch.setattr(models, "judge", lambda architecture: row)
    file = tmp_path / "models.json"
    assert models.main(["qwen3", "--jobs", "1", "--output", str(file)]) == status
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"causal: 1 {outcome}"
    assert len(printed) == (1 if outcome == "right" else 2)
    assert f'"outcome": "{outcome}"' in file.read_text()


def test_an_unknown_model_type_is_refused(capsys):
    with pytest.raises(SystemExit):
        models.main(["qwen33"])
    assert "MODEL_TYPE: expected one that transformers" in capsys.readouterr().err
