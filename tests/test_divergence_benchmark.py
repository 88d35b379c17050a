"""The benchmark of divergences, on the CPU: every row is checked before it is timed, and what is wrong is said."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import divergence, plots, table
from benchmarks.measure import version

OPTIONS = ["--device", "cpu", "--shapes", "64:96", "--vocabulary", "500", "--rounds", "3", "--budget", "0.001"]


@pytest.fixture(autouse=True)
def without_a_compiler(monkeypatch):
    makers = divergence.MAKERS | {"compile": divergence.MAKERS["ours"]}
    monkeypatch.setattr(divergence, "MAKERS", makers)


def report(path) -> dict:
    divergence.main([*OPTIONS, "--output", str(path)])
    return json.loads(path.read_text())["shapes"][0]


@pytest.mark.slow
def test_beside_the_bare_products(tmp_path, capsys):
    entry = report(tmp_path / "divergence.json")
    assert len(entry["rows"]) == len(divergence.SUBJECTS)
    for row in entry["rows"]:
        if row["made_by"] == "ours":
            assert row["ratio"] == row["ms"] / row["floor_ms"], row.get("note")
            assert row["error"]["dhidden_relative"] < 5e-3
        elif row["made_by"] == "eager" or (row["made_by"] == "trl" and version("trl")):
            assert row["ms"] > 0, row
    assert {row["teacher"] for row in entry["accuracy"]} == {*divergence.NOISE, "targets moved"}
    assert {row["made_by"] for row in entry["accuracy"]} == {"ours", "trl", "eager"}
    assert "reverse_kl, frozen: ours" in capsys.readouterr().out
    shown = "\n".join(table.divergence_section(tmp_path / "divergence.json"))
    ours = entry["rows"][0]
    assert f"| reverse KL, frozen: **egrsd_kernels** | {table.number(ours['ms'])} ms, {ours['ratio']:.2f} ×" in shown
    assert "reverse KL, targets moved" in shown and "(results/divergence.json)" in shown
    plots.main([str(tmp_path / "divergence.json"), "--output", str(tmp_path)])
    assert (tmp_path / "divergence.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_wrong_result_is_not_timed(tmp_path, monkeypatch):
    right = divergence.linear_divergence
    monkeypatch.setattr(divergence, "linear_divergence", lambda *args, **kwargs: 1.02 * right(*args, **kwargs))
    for row in report(tmp_path / "divergence.json")["rows"]:
        if row["made_by"] == "ours":
            assert "ms" not in row and row["note"].startswith("wrong result")


def test_plain_pytorchs_times_count_whatever_its_logits_are_rounded_by(monkeypatch):
    right = divergence.MAKERS["eager"]
    wrong = divergence.MAKERS | {"eager": lambda *args: 3 * right(*args), "trl": lambda *args: 3 * right(*args)}
    monkeypatch.setattr(divergence, "MAKERS", wrong)
    p = divergence.Problem.draw(64, 40, 500, "peaked", torch.device("cpu"))
    incoming = torch.ones(40)
    exact = divergence.Exact(p, incoming)
    for made_by, counts in (("eager", True), ("trl", False)):
        row = {}
        assert divergence.check(row, divergence.Subject("reverse_kl", False, made_by), p, incoming, exact) == counts
        assert row["error"]["dhidden_relative"] > 1


@pytest.mark.parametrize("kind", divergence.KINDS)
def test_the_gradient_is_that_of_the_definition(kind):
    z, t = torch.randn(2, 5, 7, dtype=torch.float64)
    z.requires_grad_()
    d, dz = divergence.dz_of(z.log_softmax(-1), t.log_softmax(-1), kind)
    torch.testing.assert_close(torch.autograd.grad(d.sum(), z)[0], dz.detach())
