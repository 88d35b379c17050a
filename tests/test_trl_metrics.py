import math

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")

from egrsd_kernels import fused_egrsd_loss
from egrsd_kernels.trl.metrics import peak_memory_gib, token_metrics

SETTINGS = {"gamma": 0.8, "gate_floor": 0.1, "clip_eps": 0.2, "tau_low": 0.1, "tau_high": 0.5}
LOG_VOCAB = math.log(20)


def statistics(lookahead=2):
    """Tokens of a real loss, whose entropies reach from certain to undecided."""
    torch.manual_seed(0)
    sharpness = torch.logspace(-1.5, 1, 40)[torch.randperm(40)].view(4, 10, 1)
    _, stats = fused_egrsd_loss(
        torch.randn(4, 10, 8),
        torch.randn(20, 8),
        torch.randn(4, 10, 8) * sharpness,
        torch.randint(20, (4, 10)),
        torch.randn(4),
        gamma=0.8,
        lookahead=lookahead,
        entropy_scale=2.0,
        return_stats=True,
    )
    return {name: value.flatten() for name, value in stats._asdict().items()}


def metrics(stats, **changes):
    return token_metrics(stats, **{**SETTINGS, "scale": 2.0, "log_vocab": LOG_VOCAB, **changes})


def test_every_metric_by_hand():
    stats = statistics()
    got = metrics(stats)
    rows = [dict(zip(stats, values, strict=True)) for values in zip(*(v.tolist() for v in stats.values()), strict=True)]

    def mean(values):
        values = list(values)
        return pytest.approx(sum(values) / len(values), abs=1e-5)

    def regime(row):
        h, ahead = row["teacher_entropy"] / LOG_VOCAB, row["lookahead_entropy"] / LOG_VOCAB
        if h <= 0.1:
            return "lock"
        if h < 0.5:
            return "mid"
        return "fork" if ahead >= 0.5 else "pivot" if ahead <= 0.1 else "mid"

    assert got["teacher_entropy/mean"] == mean(row["teacher_entropy"] for row in rows)
    assert got["lookahead_entropy/mean"] == mean(row["lookahead_entropy"] for row in rows)
    assert got["gate/mean"] == mean(row["gate"] for row in rows)
    assert got["magnitude/mean"] == mean(row["magnitude"] for row in rows)
    assert got["magnitude/clipped"] == mean(abs(abs(row["magnitude"] - 1) - 0.2) < 1e-6 for row in rows)
    for row in rows:
        row["distance"] = abs(row["teacher_logp"] - row["student_logp"])
        row["regime"] = regime(row)
        row["restored"] = row["gate"] - min(max(1 - 0.8 * row["teacher_entropy"] / 2.0, 0.1), 1)
    assert got["abs_log_ratio/mean"] == mean(row["distance"] for row in rows)
    rows.sort(key=lambda row: row["teacher_entropy"])
    for decile in range(10):
        part = rows[4 * decile : 4 * decile + 4]
        assert got[f"abs_log_ratio/entropy_decile_{decile}"] == mean(row["distance"] for row in part)
    assert {row["regime"] for row in rows} == {"lock", "fork", "pivot", "mid"}
    for name in ("lock", "fork", "pivot", "mid"):
        assert got[f"regime/{name}"] == mean(row["regime"] == name for row in rows)
        assert got[f"restored/{name}"] == mean(row["restored"] for row in rows if row["regime"] == name)
    assert got["restored/pivot"] > 0.1
    for index in range(10):  # nine steps by the same factor from 0.01 nat to log V, and what is below
        low, high = (0.01 * (LOG_VOCAB / 0.01) ** (step / 9) for step in (index - 1, index))
        inside = ((low if index else -1) < row["teacher_entropy"] <= (high if index < 9 else math.inf) for row in rows)
        assert got[f"teacher_entropy/bin_{index}"] == pytest.approx(sum(inside) / 40, abs=1e-6)
    for name, low, high in (("gate", 0, 1), ("magnitude", 0.8, 1.2)):
        shares = [got[f"{name}/bin_{i}"] for i in range(10)]
        assert sum(shares) == pytest.approx(1)
        middle = sum(shares[:5])
        assert middle == pytest.approx(sum(row[name] < (low + high) / 2 for row in rows) / 40, abs=0.03)


def test_without_lookahead_nothing_is_restored():
    got = metrics(statistics(lookahead=0))
    assert all(abs(got[name]) < 1e-6 for name in got if name.startswith("restored/"))


def test_without_a_magnitude_there_is_no_histogram_of_it():
    got = metrics(statistics(), clip_eps=0.0)
    assert "magnitude/mean" in got
    assert not {"magnitude/clipped", "magnitude/bin_0"} & got.keys()


def test_sparse_gradients_show_what_they_leave_out():
    stats = statistics()
    assert not [name for name in metrics(stats) if name.startswith("gradient/")]
    stats["gradient_error_bound"] = torch.arange(40) % 4 * 1e-5
    got = metrics(stats, sparse_calls=3)
    assert got["gradient/error_bound"] == pytest.approx(10 * 6e-5 / 3)
    assert got["gradient/exact"] == 0.25


def test_few_tokens_and_none():
    few = {name: value[:3] for name, value in statistics().items()}
    assert "abs_log_ratio/entropy_decile_2" in metrics(few)
    assert "abs_log_ratio/entropy_decile_3" not in metrics(few)
    assert metrics({name: value[:0] for name, value in few.items()}) == {}


def test_peak_memory_is_that_of_a_process_with_torch():
    assert 0.05 < peak_memory_gib(torch.device("cpu")) < 500
