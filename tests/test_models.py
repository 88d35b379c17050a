"""The comparison of heads with the models' own logits, on an architecture of every kind."""

from __future__ import annotations

import json
import os
import time

import pytest
import torch

pytest.importorskip("transformers")
from benchmarks import models, table
from benchmarks.models import Architecture
from egrsd_kernels import Head, with_head

ARCHITECTURES = {(a.kind, a.model_type): a for a in models.architectures()}
# By kind: (scale, softcap, read with an image).
RIGHT = {
    "plain": ("causal", "qwen3", 1, None, False),
    "tied, learned positions": ("causal", "gpt2", 1, None, False),
    "projected before the head": ("causal", "opt", 1, None, False),
    "a transform before the head": ("causal", "modernbert-decoder", 1, None, False),
    "a bias": ("causal", "phi", 1, None, False),
    "a softcap": ("causal", "gemma2", 1, 2.0, False),
    "divided": ("causal", "granite", 0.125, None, False),
    "multiplied, under another name": ("causal", "falcon_h1", 0.05, None, False),
    "multiplied, then capped": ("vision-language", "muse_glimmer", 0.25, 2.0, False),
    "a state space": ("causal", "mamba2", 1, None, False),
    "a model that is its own backbone": ("causal", "llama4", 1, None, False),
    "vision-language": ("vision-language", "qwen2_5_vl", 1, None, True),
    "vision-language, another body": ("vision-language", "llava", 1, None, True),
}
NO_PACKS = ("falcon_h1", "llama4", "mamba2")  # of these: state spaces, and a scale that counts a forward's tokens
REFUSED = {
    "masked logits": ("vision-language", "chameleon"),
    "cut vocabulary": ("causal", "inkling_text"),
    "further streams": ("causal", "prophetnet"),
    "the answer in the encoder": ("sequence-to-sequence", "plbart"),
}


def architecture_of(key: tuple[str, str]) -> Architecture:
    if key not in ARCHITECTURES:
        pytest.skip(f"the installed transformers has no {key[0]} {key[1]}")
    return ARCHITECTURES[key]


@pytest.mark.parametrize(("kind", "model_type", "scale", "softcap", "image"), RIGHT.values(), ids=RIGHT)
def test_heads_that_are_read_right(kind, model_type, scale, softcap, image):
    row = models.judge(architecture_of((kind, model_type)))
    assert row["outcome"] == "right", row
    assert max(row["logp"], row["entropy"], row.get("padding", 0)) <= models.TOLERANCE
    assert row["gradient"] <= models.GRADIENT_TOLERANCE
    assert row["scale"] == pytest.approx(scale, rel=1e-6)
    assert row["softcap"] == (softcap and pytest.approx(softcap, rel=1e-6))
    assert row["image"] == image
    assert row["packs"] == (model_type not in NO_PACKS) and ("not_packed" in row) != row["packs"]


@pytest.mark.parametrize("rope, limit", [("dynamic", 511), ("linear", None)])
def test_up_to_which_length_a_model_packs(rope, limit):
    """One less than the length that its tiny config has."""
    config = models.tiny_config(models.CONFIG_MAPPING["llama"])
    config.rope_parameters = {"rope_type": rope, "factor": 2.0, "rope_theta": 1e4}
    assert models.packing(models.build("LlamaForCausalLM", config)) == {"packs": True, "row_limit": limit}


@pytest.mark.parametrize("key", REFUSED.values(), ids=REFUSED)
def test_no_head_is_read_wrong(key):
    row = models.judge(architecture_of(key))
    assert row["outcome"] == "refused", row
    assert row["reason"].startswith("model: ") and "\n" not in row["reason"]


@pytest.mark.slow
def test_every_architecture_is_right_or_refused():
    """As docs/models.md has it."""
    rows = [a._asdict() | row for a, row in models.isolated(models.judge, [*ARCHITECTURES.values()], 2, models.SECONDS)]
    assert [row for row in rows if row["outcome"] in ("WRONG", "fails")] == []
    right = [row for row in rows if row["outcome"] == "right"]
    assert sum(row["kind"] == "causal" for row in right) >= 140
    assert sum(row["kind"] == "vision-language" and row["image"] for row in right) >= 20
    assert sum(row["packs"] for row in right) >= 170


@pytest.mark.heavy
@pytest.mark.parametrize("case", ["a softcap", "divided", "multiplied, under another name", "multiplied, then capped"])
def test_what_a_package_overlooks_shows(monkeypatch, case):
    """A reader that takes every head for h Wᵀ + b is found out."""

    def naive(model, function, **inputs):
        return with_head(model, lambda hidden, head: function(hidden, Head(head.weight, head.bias)), **inputs)

    monkeypatch.setattr(models, "with_head", naive)
    row = models.judge(architecture_of(RIGHT[case][:2]))
    assert row["outcome"] == "WRONG", row


def test_a_model_that_cannot_be_built_says_why(monkeypatch):
    monkeypatch.setattr(models, "PARAMETERS", 1000)
    row = models.judge(architecture_of(("causal", "qwen3")))
    assert row["outcome"] == "not built"
    assert row["reason"].endswith("the tiny config is not tiny")


def test_a_traceback_is_no_refusal(monkeypatch):
    def broken(model):
        raise KeyError("hidden")

    monkeypatch.setattr(models, "head_of", broken)
    row = models.judge(architecture_of(("causal", "qwen3")))
    assert row == {"outcome": "fails", "reason": "KeyError: 'hidden'"}


def _act(what: str) -> dict:
    if what == "hang":
        time.sleep(600)
    if what == "die":
        os.kill(os.getpid(), 9)
    return {"outcome": what}


@pytest.mark.slow
def test_one_that_hangs_or_dies_is_a_row():
    rows = dict(models.isolated(_act, ["hang", "die", "right"], jobs=2, seconds=10.0))
    assert rows["right"] == {"outcome": "right"}
    assert rows["die"] == {"outcome": "fails", "reason": "its process died (exit code -9)"}
    assert rows["hang"] == {"outcome": "not built", "reason": "took longer than 10 s"}


def test_numbers_that_are_not_numbers_are_off():
    one, nan = torch.ones(2), torch.tensor([1.0, torch.nan])
    for a, b in ((one, nan), (nan, one)):
        assert max(models.Numbers(a, b).off(models.Numbers(one, one)).values()) == torch.inf


@pytest.mark.parametrize(
    "outcome, status", [("right", 0), ("refused", 0), ("not built", 0), ("WRONG", 1), ("fails", 1)]
)
def test_the_command_ends_with_a_status(monkeypatch, capsys, tmp_path, outcome, status):
    row = (
        {"outcome": outcome, "reason": "because"}
        if outcome != "right"
        else {"outcome": "right", "logp": 0, "entropy": 0, "gradient": None, "image": False, "packs": True}
    )
    monkeypatch.setattr(models, "judge", lambda architecture: row)
    file = tmp_path / "models.json"
    assert models.main(["qwen3", "--jobs", "1", "--output", str(file)]) == status
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"causal: 1 {outcome}; {int(outcome == 'right')} pack"
    assert len(printed) == (1 if outcome == "right" else 2)
    assert f'"outcome": "{outcome}"' in file.read_text()


def test_an_unknown_model_type_is_refused(capsys):
    with pytest.raises(SystemExit):
        models.main(["qwen33"])
    assert "MODEL_TYPE: expected one that transformers" in capsys.readouterr().err


def test_the_page_of_models(tmp_path):
    path = tmp_path / "models.json"
    figures = {"scale": 0.125, "softcap": None, "logp": 1e-6, "entropy": 2e-6, "gradient": None, "image": True}
    rows = [
        {"kind": "causal", "model_type": "one", "outcome": "right", **figures, "packs": True, "row_limit": None},
        {"kind": "causal", "model_type": "six", "outcome": "right", **figures, "packs": True, "row_limit": 63},
        {"kind": "causal", "model_type": "ten", "outcome": "right", **figures, "packs": False, "not_packed": "off"},
        {"kind": "causal", "model_type": "two", "outcome": "refused", "reason": "a_b <c>"},
    ]
    versions = {"torch": "2", "packages": {"transformers": "5"}}
    path.write_text(json.dumps({"environment": versions, "rows": rows}), encoding="utf-8")
    text = table.models(tmp_path)
    assert "| Causal | 3 | 1 | 2 |" in text
    for name, packs in (("one", "yes"), ("six", "rows up to 63"), ("ten", "no")):
        assert f"| `{name}` | 0.125 |  | 1.0e-6 | 2.0e-6 |  | an image | {packs} |" in text
    assert "- `two`: a\\_b \\<c\\>" in text
