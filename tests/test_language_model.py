"""The sparsity of a language model's softmax rows: the report's figures, and the way from sources to report."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from benchmarks import language_model, plots

TINY = ["--seconds=4", "--megabytes=0.1", "--vocabulary=400", "--width=64", "--layers=1", "--context=32", "--batch=4"]


def test_what_is_kept_is_within_the_tolerance_and_no_more_than_needed():
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(300, 16, generator=generator)
    hidden = torch.randn(1500, 16, generator=generator) * torch.logspace(-2, 1, 1500)[:, None]
    p = (hidden @ head.T).softmax(-1)
    targets = torch.multinomial(p, 1, generator=generator)[:, 0]
    found = language_model.sparsity(hidden, head, targets)
    off = p.scatter(1, targets[:, None], 0)
    mass = 2 * off.sum().item()
    entropy = torch.special.entr(p).sum(-1)
    assert found["rows"] == 1500
    assert found["entropy_mean"] == pytest.approx(entropy.mean().item(), rel=1e-4)
    assert found["share_entropy_below_0.01"] == pytest.approx((entropy < 0.01).float().mean().item(), abs=2e-3)
    tail = p.sort(-1, descending=True).values[:, 16:].sum(-1)[entropy.argsort()[-150:]].mean()
    assert found["ranks"] == [2**k for k in range(9)]
    assert found["mass_beyond_rank_by_entropy"][-1][4] == pytest.approx(tail.item(), rel=1e-4)
    for at in found["tolerances"]:
        tenths = at["by_entropy"]
        assert [tenth["entropy"] for tenth in tenths] == sorted(tenth["entropy"] for tenth in tenths)
        dropped = 150 * sum(tenth["dropped_mean"] for tenth in tenths)
        kept = 150 * sum(tenth["kept_mean"] for tenth in tenths)
        # Thresholds are half powers of two: the next one would drop too much.
        threshold = next(
            edge for k in range(80) if off[off <= (edge := 2.0 ** (-k / 2))].sum() <= at["tolerance"] * mass
        )
        assert kept == pytest.approx((off > threshold).sum().item() + 1500, rel=2e-3)
        assert dropped == pytest.approx(off[off <= threshold].sum().item(), rel=2e-3)
        assert dropped <= at["tolerance"] * mass * (1 + 1e-5)
        counts = (off > threshold).sum(-1) + 1
        assert at["share_above_64"] == pytest.approx((counts > 64).float().mean().item(), abs=5e-3)


@pytest.mark.slow
def test_from_sources_to_report(tmp_path, capsys):
    path = tmp_path / "report.json"
    language_model.main([*TINY, "--rows=64", "--curves=2", "--device=cpu", "--output", str(path)])
    report = json.loads(path.read_text())
    assert report["steps"] > 1 and report["losses"][-1] < report["losses"][0] * 1.1
    assert report["sparsity"].keys() == {"held-out text", "own samples"}
    assert all(found["rows"] > 32 for found in report["sparsity"].values())
    for figures in report["gradients"].values():
        assert all(len(figures[name]["times"]) == 2 for name in ("frozen", "trained"))
        assert all(figures[name]["share_made_exactly"] == 1 for name in ("frozen", "trained"))
    # PyTorch's gradients are exact in every mode.
    exact, *others = (report["curves"][mode] for mode in language_model.MODES)
    assert len(exact) == 2 and all(losses == exact for losses in others)
    assert "--vocabulary 400" in report["command"] and report["device"] == "CPU"
    plots.main([str(path), "--output", str(tmp_path / "pictures")])
    assert (tmp_path / "pictures" / "sparsity.png").read_bytes().startswith(b"\x89PNG")
    assert "held-out loss" in capsys.readouterr().out
