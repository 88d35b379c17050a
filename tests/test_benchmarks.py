"""The benchmark suite on the CPU: data, timing rules, checks against float64, merging, the table and the pictures."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable

import pytest
import torch

from benchmarks import compare, losses, measure, plots, sparse, table, trl_head
from benchmarks.data import GENERATORS, head_weight, summary, teacher_hidden
from benchmarks.peers import PEERS, Calls, Peer, without_parents
from benchmarks.problem import Exact, Problem, Step, wrong
from benchmarks.updates import WAYS
from egrsd_kernels.backends import triton as triton_backend
from egrsd_kernels.backends.triton import sparse as sparse_kernels

CPU = torch.device("cpu")
VOCABULARY = 2000


def draw(data: str, n: int = 400, size: int = 256):
    generator = torch.Generator().manual_seed(0)
    weight = head_weight(VOCABULARY, size, generator)
    hidden, targets = GENERATORS[data](weight, n, generator)
    return weight, hidden, targets


def log_p(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (hidden.double() @ weight.double().t()).log_softmax(-1)


# ------------------------------------------------------------------------------------------------ data


@pytest.mark.parametrize("data", GENERATORS)
def test_data_is_reproducible_and_valid(data):
    first, second = draw(data), draw(data)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    weight, hidden, targets = first
    assert hidden.shape == (400, 256) and hidden.dtype == weight.dtype == torch.bfloat16
    assert hidden.isfinite().all()
    assert targets.dtype == torch.int64 and targets.min() >= 0 and targets.max() < VOCABULARY


def test_peaked_rows_are_mostly_decided():
    weight, hidden, targets = draw("peaked")
    figures = summary(log_p(hidden, weight), targets)
    assert 0.4 < figures["share_entropy_below_0.01"] < 0.56 < figures["share_entropy_below_0.1"] < 0.8
    assert figures["entropy_median"] < 0.1 < figures["entropy_80th_percentile"] < 2
    # Sampled targets: log p is about -H on average.
    assert figures["logp_mean"] == pytest.approx(-figures["entropy_mean"], abs=0.2)


def test_flat_rows_are_nearly_uniform():
    weight, hidden, targets = draw("flat")
    figures = summary(log_p(hidden, weight), targets)
    assert figures["entropy_mean"] == pytest.approx(math.log(VOCABULARY), abs=0.02)
    assert figures["logp_mean"] == pytest.approx(-math.log(VOCABULARY), abs=0.05)


def test_teacher_is_near_the_student():
    weight, hidden, targets = draw("peaked")
    moved = teacher_hidden(hidden, torch.Generator().manual_seed(1))
    delta = (log_p(moved, weight) - log_p(hidden, weight)).gather(1, targets[:, None]).abs()
    assert 1e-4 < delta.mean() < 0.1 and delta.median() < 0.01


def test_summary_of_known_rows():
    certain = torch.tensor([[0.0, -math.inf, -math.inf, -math.inf]]).clamp(min=-1e30)
    even = torch.full((1, 4), -math.log(4.0))
    figures = summary(torch.cat([certain, even]), torch.tensor([0, 3]))
    assert figures["entropy_mean"] == pytest.approx(math.log(4) / 2)
    assert figures["share_entropy_below_0.01"] == figures["share_entropy_below_0.1"] == 0.5
    assert figures["logp_mean"] == pytest.approx(-math.log(4) / 2)
    assert figures["entries_above_2^-12_mean"] == 2.5


# ------------------------------------------------------------------------------------------------ timing


class FakeTimer:
    """Times come from a table; what was run is noted."""

    def __init__(self, cost: dict[str, float]):
        self.cost, self.order = cost, []

    def time(self, run: Callable[[], str], repeats: int = 1) -> tuple[float, float]:
        name = run()
        self.order += [name] * repeats
        return self.cost[name], self.cost[name] / 10

    def peak(self, run: Callable[[], str]) -> tuple[float, float]:
        return 7.0, self.cost[run()]

    def free(self) -> None:
        pass


def test_rounds_are_interleaved_and_follow_the_budget():
    timer = FakeTimer({"quick": 1.0, "slow": 900.0})
    times = measure.interleaved({name: lambda name=name: name for name in timer.cost}, timer, rounds=5, budget=1.0)
    assert "".join(name[0] for name in timer.order) == "qqsqqsqs"
    assert times["quick"] == {"ms": 1, "low": 1, "high": 1, "host_ms": 0.1, "peak_mib": 7, "rounds": 5}
    assert times["slow"]["rounds"] == measure.MIN_ROUNDS


def test_sustained_subjects_run_back_to_back():
    timer = FakeTimer({"quick": 60.0, "slow": 900.0})
    subjects = {name: lambda name=name: name for name in timer.cost}
    times = measure.interleaved(subjects, timer, rounds=5, budget=1.5, sustained=True)
    assert "".join(name[0] for name in timer.order) == "q" * 10 + "ss" + "q" * 10 + "ss" + "q" * 5 + "ss"
    assert times["quick"]["rounds"] == 5 and times["slow"]["rounds"] == measure.MIN_ROUNDS


def test_a_failing_subject_stops_nothing():
    calls = iter(range(100))

    def late() -> str:
        if next(calls) > 3:
            raise RuntimeError("too late\nand more")
        return "late"

    def memory() -> str:
        raise torch.OutOfMemoryError("tried to allocate")

    subjects = {"memory": memory, "late": late, "good": lambda: "good"}
    times = measure.interleaved(subjects, FakeTimer({"late": 1.0, "good": 1.0}), rounds=5)
    assert times["memory"] == {"note": "out of memory"}
    assert times["late"] == {"note": "RuntimeError: too late"}
    assert times["good"]["rounds"] == 5


def test_environment_names_what_is_there():
    found = measure.environment(CPU, ["torch", "no-such-package"], commit="abc")
    assert found["device"] == "CPU" and found["commit"] == "abc"
    assert list(found["packages"]) == ["torch"]


# ------------------------------------------------------------------------------------------------ peers and checks


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem.draw(32, 48, 300, "peaked", CPU)


def exact_step(p: Problem) -> Step:
    """By autograd in float64."""
    hidden, weight = (x.double().requires_grad_() for x in (p.hidden, p.weight))
    student = log_p(hidden, weight).gather(1, p.targets[:, None]).squeeze(1)
    student.backward(p.credit.double())
    teacher = log_p(p.teacher_hidden, p.weight)
    return Step(
        teacher.gather(1, p.targets[:, None]).squeeze(1), -(teacher.exp() * teacher).sum(-1), student.detach(),
        p.credit, hidden.grad, weight.grad,
    )  # fmt: skip


def test_exact_agrees_with_autograd(problem):
    errors = Exact(problem).errors(exact_step(problem))
    assert errors.keys() == {"logp_max_nat", "entropy_max_nat", "dhidden_relative", "dweight_relative"}
    assert max(errors.values()) < 1e-12
    assert wrong(errors) is None


@pytest.mark.parametrize("field", ["teacher_logp", "entropy", "logp", "d_hidden", "d_weight"])
def test_exact_sees_each_result(problem, field):
    right = exact_step(problem)
    errors = Exact(problem).errors(right._replace(**{field: getattr(right, field) * 1.5 + 1}))
    assert "wrong result" in wrong(errors)


def test_not_a_number_is_wrong():
    assert wrong({"dhidden_relative": math.nan})


def installed(key: str) -> Peer:
    peer = PEERS[key]
    if peer.package and measure.version(peer.package) is None:
        pytest.skip(f"{peer.package} is not installed")
    return peer


@pytest.mark.parametrize("key", ["ours", "ours-pointer", "ours-torch", "ours-logp", "eager", "trl", "liger-scaled"])
@pytest.mark.parametrize("trained", [False, True])
def test_peer_is_right(problem, key, trained):
    if not key.startswith("ours"):
        installed(key)
    calls = PEERS[key].build(problem)
    step = calls.step(trained)
    assert (step.d_weight is not None) == trained
    assert wrong(Exact(problem).errors(step)) is None
    assert all(torch.equal(a, b) for a, b in zip(calls.statistics(), step[:2], strict=True))


def test_missing_packages_give_a_row_that_says_so(problem):
    exact, timer = Exact(problem), measure.timer_of(CPU)
    for peer in PEERS.values():
        if peer.package and measure.version(peer.package) is None:
            row, subjects = compare.check(peer, problem, exact, timer)
            assert row["note"].startswith("missing: ") and row["version"] is None and not subjects


def test_module_without_its_parents(tmp_path, monkeypatch):
    inner = tmp_path / "heavy_package" / "ops"
    inner.mkdir(parents=True)
    (inner.parent / "__init__.py").write_text("import no_such_extension\n")
    (inner / "__init__.py").write_text("")
    (inner / "light.py").write_text("from heavy_package.ops import other\nvalue = other.value\n")
    (inner / "other.py").write_text("value = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    assert without_parents("heavy_package.ops.light").value == 3
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        without_parents("no_such_package.ops.light")


# ------------------------------------------------------------------------------------------------ the comparison


def absent(p: Problem) -> Calls:
    import no_such_package

    return no_such_package


def failing(p: Problem) -> Calls:
    def step(trained: bool) -> Step:
        if trained:
            raise torch.OutOfMemoryError("tried to allocate")
        return PEERS["eager"].build(p).step(trained)

    return Calls(None, step)


def doubled(p: Problem) -> Calls:
    def step(trained: bool) -> Step:
        right = PEERS["eager"].build(p).step(trained)
        return right._replace(d_hidden=2 * right.d_hidden)

    return Calls(None, step)


@pytest.fixture
def odd_peers(monkeypatch) -> None:
    for build in (absent, failing, doubled):
        key = build.__name__
        monkeypatch.setitem(PEERS, key, Peer(key, key, build, None, None, True))


def run(path, *arguments: str) -> dict:
    common = ["--device", "cpu", "--vocabulary", "300", "--budget", "0", "--rounds", "3", "--commit", "0123456789"]
    compare.main(["--output", str(path), *common, *arguments])
    return json.loads(path.read_text())


def rows_of(report: dict, shape: int = 0) -> dict[str, dict]:
    return {row["peer"]: row for row in report["shapes"][shape]["rows"]}


def test_compare(tmp_path, odd_peers, capsys):
    path = tmp_path / "new" / "compare.json"
    report = run(path, "--shapes", "32:48", "--only", "ours,eager,absent,failing,doubled")
    (entry,) = report["shapes"]
    assert (entry["hidden_size"], entry["tokens"], entry["vocabulary"], entry["data"]) == (32, 48, 300, "peaked")
    assert entry["distribution"]["rows"] == 48
    rows = rows_of(report)
    assert set(rows["ours"]) >= {"statistics", "frozen", "trained", "error", "version"}
    bare = {name: time["ms"] for name, time in entry["products"].items()}
    floors = {"statistics": bare["forward"], "frozen": 2 * bare["forward"] + bare["dhidden"]}
    floors["trained"] = floors["frozen"] + bare["dweight"]
    for figure, floor in floors.items():
        time = rows["ours"][figure]
        assert time["floor_ms"] == pytest.approx(floor) and time["ratio"] == pytest.approx(time["ms"] / floor)
    assert rows["absent"]["note"] == "missing: no_such_package"
    assert rows["failing"]["trained"] == {"note": "out of memory"} and "ms" in rows["failing"]["frozen"]
    for figure in ("frozen", "trained"):
        assert rows["doubled"][figure]["note"].startswith("wrong result: dhidden_relative = 1")
    assert "--only ours,eager" in report["runs"][0]["command"] and str(tmp_path) not in path.read_text()
    assert "missing: no_such_package" in capsys.readouterr().out


def test_row_of_a_peer_that_does_everything(tmp_path):
    installed("trl")
    row = rows_of(run(tmp_path / "compare.json", "--shapes", "32:48", "--only", "trl"))["trl"]
    assert row["version"] == measure.version("trl") and row["cannot"] is None and row["per_token"]
    assert row["error"].keys() == {"logp_max_nat", "entropy_max_nat", "dhidden_relative", "dweight_relative"}
    assert all("ms" in row[figure] for figure in compare.FLOORS)
    cells = dict(zip(table.HEADINGS, table._cells(row["name"], row)[1:], strict=True))
    assert cells["log p, nat"] == table.power(row["error"]["logp_max_nat"])
    assert cells["gradient"] == table.power(row["error"]["dhidden_relative"])
    assert cells["cannot"] == ""


def test_versions_of_the_peers_and_of_their_compiler_are_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "version", lambda package: f"{package} of today")
    (made,) = run(tmp_path / "compare.json", "--shapes", "16:32", "--only", "eager")["runs"]
    for package in ("trl", "liger-kernel", "quack-kernels", "nvidia-cutlass-dsl"):
        assert made["packages"][package] == f"{package} of today"


def test_runs_are_merged(tmp_path, odd_peers, monkeypatch):
    path = tmp_path / "compare.json"
    first = run(path, "--shapes", "32:48", "--only", "ours-torch,eager")
    second = run(path, "--shapes", "32:48,16:32", "--only", "eager")
    assert [(entry["hidden_size"], entry["tokens"]) for entry in second["shapes"]] == [(16, 32), (32, 48)]
    rows = rows_of(second, 1)
    assert rows["ours-torch"] == rows_of(first)["ours-torch"] and rows["ours-torch"]["run"] == 1
    assert rows["eager"]["run"] == 2
    assert [made["id"] for made in second["runs"]] == [1, 2]
    # Once all its rows are replaced, a run is forgotten.
    third = run(path, "--shapes", "32:48,16:32", "--only", "ours-torch,eager")
    assert [made["id"] for made in third["runs"]] == [3]
    # Another distribution is another shape.
    assert len(run(path, "--shapes", "32:48", "--only", "eager", "--data", "flat")["shapes"]) == 3
    # A package that is no longer there takes no time away.
    monkeypatch.setitem(PEERS, "eager", Peer("eager", "eager", absent, None, None, True))
    assert "ms" in rows_of(run(path, "--shapes", "16:32", "--only", "eager"))["eager"]["frozen"]


def test_results_of_two_devices_are_kept_apart():
    entry = dict.fromkeys(compare.SHAPE, 1) | {"rows": []}
    report = compare.merge({}, {"id": 1, "device": "one"}, entry)
    with pytest.raises(ValueError, match="results are of one"):
        compare.merge(report, {"id": 2, "device": "another"}, entry)


def test_arguments(tmp_path, capsys):
    assert compare.parse_shapes("8b:16384,96:7") == [(4096, 16384), (96, 7)]
    with pytest.raises(SystemExit):
        run(tmp_path / "x.json", "--only", "nobody")
    assert "nobody" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ table and pictures

FACTOR = {"ours": 1.1, "eager": 3.0, "compile": 2.0, "verl": 4.0, "liger": 1.2}


def synthetic(sizes=(2560, 4096), tokens=(4096, 16384)) -> dict:
    report: dict = {}
    made = {"id": 1, "device": "GPU", "driver": "1.2", "torch": "2.11", "triton": "3.6", "cuda": "13.0"}
    made |= {"packages": {"verl": "0.9.1"}, "commit": "0123456789", "command": "python -m benchmarks.compare"}
    for size in sizes:
        for n in tokens:
            rows = []
            for key, factor in FACTOR.items():
                peer = PEERS[key]
                row = {"peer": key, "name": peer.name, "version": "1", "cannot": peer.cannot, "error": {}}
                row |= {"per_token": peer.per_token}
                for figure, floor in (("statistics", 1.0), ("frozen", 3.0), ("trained", 4.0)):
                    time = {"ms": factor * floor, "floor_ms": floor, "ratio": factor, "peak_mib": 1000.0 * factor}
                    row[figure] = {"note": "out of memory"} if key == "eager" and n > 4096 else time
                rows.append(row)
            shape = {"hidden_size": size, "tokens": n, "vocabulary": 151_936, "dtype": "bfloat16", "data": "peaked"}
            report = compare.merge(report, made, shape | {"rows": rows})
    return report


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "compare-gpu.json").write_text(json.dumps(synthetic()))
    return folder


@pytest.fixture
def pages(tmp_path):
    """A README.md and a benchmarks/README.md with markers, by their names."""
    pages = {name: tmp_path / name for name in table.PLACES}
    for page in pages.values():
        page.parent.mkdir(exist_ok=True)
        page.write_text(f"# before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    return pages


def test_table(tmp_path, results, pages):
    options = ["--root", str(tmp_path), "--results", str(results)]
    with pytest.raises(SystemExit, match=r"^README\.md is out of date"):
        table.main([*options, "--check"])
    table.main(options)
    first = {name: page.read_text() for name, page in pages.items()}
    table.main([*options, "--check"])
    table.main(options)
    assert first == {name: page.read_text() for name, page in pages.items()}
    for text in first.values():
        assert text.startswith("# before\n") and text.endswith("after\n") and "old" not in text
    for text in (first["README.md"], first["benchmarks/README.md"]):
        assert "| **egrsd_kernels** | 1.10 ms, 1.10 × | 3.30 ms, 1.10 × | 4.40 ms, 1.10 × | 1,100 / 1,100 |" in text
        assert "One GPU" in text
    text = first["benchmarks/README.md"]
    assert "PyTorch eager, full logits (out of memory)" in text
    # The fastest with a weight for each token is torch.compile; Liger's mean, without, stands apart.
    assert "| 8B (D = 4096) | 1.10 / 1.10; 1.82 / 1.82; 1.09 / 1.09 | 1.10 / 1.10; 1.82 / 1.82; 1.09 / 1.09 |" in text
    for fact in ("torch 2.11", "driver 1.2", "verl 0.9.1", "commit 0123456", "(results/compare-gpu.json)"):
        assert fact in text
    assert "python -m benchmarks.compare --output benchmarks/results/compare-gpu.json" in text

    pages["benchmarks/README.md"].write_text(text.replace("2.00 ×", "1.00 ×"))
    with pytest.raises(SystemExit, match=r"^benchmarks/README\.md is out of date"):
        table.main([*options, "--check"])


def test_the_readme_has_three_rows_of_figures(results):
    rows = [line.split(" | ")[0] for line in table.summary(results).splitlines() if line.startswith("| ")]
    assert rows[0] == "| 8B (D = 4096), N = 16,384"
    assert rows[2:] == ["| **egrsd_kernels**", f"| {PEERS['compile'].name}", f"| {PEERS['eager'].name}"]
    assert "(benchmarks/README.md#figures)" in table.summary(results)
    (results / "compare-gpu.json").write_text(json.dumps(synthetic(tokens=(4096,))))
    assert table.summary(results) == ""


def test_table_of_other_shapes(results):
    (results / "compare-gpu.json").write_text(json.dumps(synthetic(sizes=(1024,), tokens=(1024,))))
    assert "| 0.6B (D = 1024) | 1.10 / 1.10; 1.82 / 1.82; 1.09 / 1.09 |" in table.section(results)


def updates_report() -> dict:
    """Every way at 1.7B, the n-th in n · 100 ms, two of which failed; two of them elsewhere."""
    figure = {
        "tokens": 16000,
        "products_ms": 50.0,
        "peak_gib": 20.0,
        "above_weights_gib": 16.0,
        "kept": True,
        "size": 8,
    }
    profile = {"busy_ms": 60.0, "launches": 30,
               "kinds": [{"kind": "matrix products", "ms": 45.0, "launches": 20},
                         {"kind": "attention", "ms": 15.0, "launches": 10}]}  # fmt: skip
    rows = []

    def add(shape: str, way: str, setting: str = "", **found) -> None:
        cell = "/".join(filter(None, (shape, way, setting)))
        row = {"cell": cell, "shape": shape, "way": way, "setting": setting, "commit": "0123456789", "command": "go"}
        rows.append(row | found)

    for n, way in enumerate(WAYS, 1):
        time = {"ms": 100.0 * n, "tokens_per_second": 16e4 / n}
        add("1.7b", way, **figure, **time, **({"profile": profile} if way == "trl" else {}))
    for n, error in ((1, "status -11: a|b"), (4, "out of memory")):
        rows[n] = {name: value for name, value in rows[n].items() if isinstance(value, str)} | {"error": error}
    for way, ms in (("trl", 600.0), ("prefix-fused", 80.0)):
        again = {"kept": False, "size": 32, "ms": 1.5 * ms, "above_weights_gib": ms / 100}
        add("8b", way, "grpo", **figure, ms=ms, tokens_per_second=1.0, tried=[figure | {"ms": ms}, again])
    rows[-1]["alloc_retries"] = 2
    add("1.7b", "trl", "largest", largest_rollouts=123)
    settings = {"groups": 4, "group": 8, "prompt": 300, "solution": 600, "response": 1024, "layers": None, "gib": 78.0}
    machine = {"device": "GPU", "torch": "2.11", "triton": "3.6", "driver": "1.2", "packages": {"trl": "1.16.0"}}
    return machine | {"settings": settings, "rows": rows}


def test_the_page_on_whole_updates(tmp_path, results, pages):
    options = ["--root", str(tmp_path), "--results", str(results)]
    page = tmp_path / "docs" / "performance.md"
    table.main(options)
    assert not page.exists()  # as long as there is nothing to say
    (results / "end_to_end-gpu.json").write_text(json.dumps(updates_report()))
    with pytest.raises(SystemExit, match=r"^docs/performance\.md is out of date"):
        table.main([*options, "--check"])
    table.main(options)
    table.main([*options, "--check"])
    text = page.read_text()
    assert "4 groups of 8 rollouts" in text and "500 tokens on average" in text
    assert "| TRL | 100 | 1.00 | 160,000 | 2.00 × | 16.0 / 20.0 | kept, 8 | 123 |" in text
    assert "| **ours, one prefix, compiled** | 1,100 | 11.00 | 14,545 | 22.00 × | 16.0 / 20.0 | kept, 8 | – |" in text
    assert "Not measured: TRL, torch_compile (status -11: a/b); Unsloth (out of memory)." in text
    assert "\n| 8B, GRPO | 600 ms | 80 ms | **7.5 ×** | 12.00 × / 1.60 × |" in text
    assert "\n| 1.7B, EGRSD | 100 ms | 1,000 ms | **0.1 ×** | 2.00 × / 20.00 × | one prefix |" in text  # the fastest
    again = text.split("Where both compute layers again:")[1]
    assert "\n| 8B, GRPO | 900 ms | 120 ms | **7.5 ×** | 6.0 / 0.8 | **0.13** |" in again and "1.7B, E" not in again
    graphs = "| **ours, one prefix, CUDA graphs** | 1,300 | 13.00 | 12,308 | 26.00 × | 16.0 / 20.0 reserved | kept, 8 |"
    assert graphs in text
    assert "| 1.7B, TRL: 100 ms | ms | of the update | launches |" in text
    assert "| matrix products | 45.0 | 45 % | 20 |" in text and "| the GPU waits | 40.0 | 40 % |  |" in text
    assert "trl 1.16.0; commit 0123456." in text and "(../benchmarks/results/end_to_end-gpu.json)" in text
    assert "\ngo --output benchmarks/results/end_to_end-gpu.json\n" in text


def test_the_picture_of_whole_updates(tmp_path):
    path = tmp_path / "end_to_end-gpu.json"
    path.write_text(json.dumps(updates_report()))
    plots.main([str(path), "--output", str(tmp_path)])
    assert (tmp_path / "end_to_end.png").read_bytes().startswith(b"\x89PNG")


def divergence_report() -> dict:
    """At one shape; TRL's JSD and everything eager came to nothing."""
    rows = []
    for n, kind in enumerate(table.KINDS_OF_DIVERGENCE, 1):
        for trained in (False, True):
            for factor, made_by in enumerate(("ours", "trl", "liger", "eager"), 1):
                row = {"kind": kind, "made_by": made_by, "trained": trained, "kept": False}
                row["error"] = {"dhidden_worst_row": 3e-3 * factor}
                timed = {"ms": 30.0 * n * factor, "ratio": 1.0 * n * factor, "peak_mib": 1000.0 * factor}
                failed = made_by == "eager" or (kind, made_by) == ("jsd", "trl")
                rows.append(row | ({"note": "wrong result: x = 1|2"} if failed else timed))
    accuracy = [{"kind": "jsd", "teacher": "far", "made_by": made_by, "mean_nat": 0.1, "error": {}}
                for made_by in ("ours", "trl")]  # fmt: skip
    shape = {"hidden_size": 2560, "tokens": 4096, "vocabulary": 151_936, "dtype": "bfloat16"}
    machine = {"device": "GPU", "commit": "0123456789", "command": "go"}
    return machine | {"shapes": [shape | {"rows": rows, "accuracy": accuracy}]}


def test_divergences_on_their_page(tmp_path, results, pages):
    options = ["--root", str(tmp_path), "--results", str(results)]
    page = pages["docs/divergences.md"]
    page.write_text("# no figures yet\n")  # and no place for them
    table.main(options)
    assert page.read_text() == "# no figures yet\n"
    (results / "divergence-gpu.json").write_text(json.dumps(divergence_report()))
    with pytest.raises(ValueError, match=r"docs/divergences\.md: expected one section between"):
        table.main(options)
    page.write_text(f"# figures\n{table.BEGIN}\n{table.END}\n")
    table.main(options)
    table.main([*options, "--check"])
    text = page.read_text()
    assert "|  | 4B (D = 2560), N = 4,096 |\n" in text and "One GPU, bfloat16, V = 151,936:" in text
    assert "\n| reverse KL, frozen: **egrsd_kernels** | 30.0 ms, 1.00 ×, 1,000 MiB, 3.0e-3 |\n" in text
    assert "\n| forward KL, frozen: TRL ChunkedDivergenceFunction | 120 ms, 4.00 ×, 2,000 MiB, 6.0e-3 |\n" in text
    assert "\n| JSD, frozen: TRL ChunkedDivergenceFunction | wrong result: x = 1/2 |\n" in text
    assert "eager" not in text and "trained:" not in text
    whole = pages["benchmarks/README.md"].read_text()
    assert "reverse KL, trained: **egrsd_kernels**" in whole and "full logits | wrong result: x = 1/2 |" in whole


def test_the_picture_of_divergences(tmp_path):
    path = tmp_path / "divergence-gpu.json"
    path.write_text(json.dumps(divergence_report()))
    plots.main([str(path), "--output", str(tmp_path)])
    assert (tmp_path / "divergence.png").read_bytes().startswith(b"\x89PNG")


def test_a_page_without_markers_is_refused():
    with pytest.raises(ValueError, match="performance: begin"):
        table.replaced("# no markers", "text")


def test_plots(tmp_path, results):
    plots.main([str(results / "compare-gpu.json"), "--output", str(tmp_path / "pictures")])
    names = {f"{f}-{q}-by-{a}.png" for f in ("frozen", "trained") for q in plots.QUANTITIES for a in plots.AXES}
    written = {path.name: path.read_bytes() for path in (tmp_path / "pictures").iterdir()}
    assert written.keys() == names
    assert all(content.startswith(b"\x89PNG") and len(content) > 10_000 for content in written.values())


def test_sparse_beside_exact(tmp_path, capsys):
    """On the CPU every gradient is exact: all tokens are, nothing is left out, and nothing is off."""
    path = tmp_path / "sparse.json"
    options = ["--shapes=64:100,96:100", "--vocabulary=300", "--device=cpu", "--rounds=3", "--tolerances", "-10", "-6"]
    sparse.main([*options, "--output", str(path)])
    report = json.loads(path.read_text())
    shapes = {(entry["hidden_size"], entry["data"]): entry for entry in report["shapes"]}
    assert shapes.keys() == {(size, data) for size in (64, 96) for data in GENERATORS}
    for (_, data), entry in shapes.items():
        modes = ["exact", "2^-10", "2^-6"] if data == "peaked" else ["exact", "2^-10"]
        assert [(row["mode"], row["head"]) for row in entry["rows"]] == [(m, h) for m in modes for h in sparse.FIGURES]
        for row in entry["rows"]:
            floor = sum(
                count * product["ms"]
                for count, product in zip(compare.FLOORS[row["head"]], entry["products"].values(), strict=True)
            )
            assert row["time"]["ratio"] == pytest.approx(row["time"]["ms"] / floor)
            if row["mode"] != "exact":
                assert row["dense_share"] == 1 and row["bound"] == 0 and not any(row["error"])
                assert len(row["error"]) == (2 if row["head"] == "trained" else 1)
                assert row["tolerance"] == 2.0 ** int(row["mode"].removeprefix("2^"))
    assert "--tolerances -10 -6" in report["command"] and "2^-6" in capsys.readouterr().out
    plots.main([str(path), "--output", str(tmp_path / "pictures")])
    assert (tmp_path / "pictures" / "sparse.png").read_bytes().startswith(b"\x89PNG")


def test_losses_beside_the_bare_products(tmp_path, capsys, monkeypatch):
    path = tmp_path / "losses.json"
    options = ["--shapes=64:40", "--vocabulary=300", "--device=cpu", "--rounds=3", "--budget=0.01"]
    losses.main([*options, "--output", str(path)])
    (entry,) = json.loads(path.read_text())["shapes"]
    assert [row["name"] for row in entry["rows"]] == [subject.name for subject in losses.SUBJECTS]
    shown = "\n".join(table.losses_section(path))
    assert all(f"\n| {row['name']} | {row['ratio']:.2f} ×, " in shown for row in entry["rows"])
    for row in entry["rows"]:
        counts = zip((1, 1, int(row["trained"])), entry["products"].values(), strict=True)
        assert row["ratio"] == pytest.approx(row["ms"] / sum(count * product["ms"] for count, product in counts))
        assert ("entropy_max_nat" in row["error"]) == row["entropy"]
        assert ("dweight_relative" in row["error"]) == row["trained"]
    assert "entropy's gradient again" in capsys.readouterr().out
    # What is wrong has no time: entropies with the sign turned.
    right = losses.linear_logp

    def wrong(*args, **options):
        out = right(*args, **options)
        return (out[0], -out[1]) if isinstance(out, tuple) else out

    monkeypatch.setattr(losses, "linear_logp", wrong)
    losses.main([*options, "--output", str(path)])
    (entry,) = json.loads(path.read_text())["shapes"]
    assert all(("note" in row) == row["entropy"] and ("ms" in row) != row["entropy"] for row in entry["rows"])


def test_the_heads_step_beside_trls(tmp_path, capsys, monkeypatch):
    pytest.importorskip("trl", reason="TRL is not installed")
    path = tmp_path / "trl_head.json"
    options = ["--shapes=64:40", "--vocabulary=300", "--device=cpu", "--rounds=3", "--budget=0.01"]
    trl_head.main([*options, "--output", str(path)])
    (entry,) = json.loads(path.read_text())["shapes"]
    steps = [(row["trainer"], row["trained"]) for row in entry["rows"]]
    assert steps[::2] == steps[1::2] == trl_head.STEPS
    shown = "\n".join(table.trl_head_section(path))
    for ours, trls in zip(entry["rows"][::2], entry["rows"][1::2], strict=True):
        assert (ours["made_by"], trls["made_by"]) == ("ours", "trl")
        assert ours["speedup"] == pytest.approx(trls["ms"] / ours["ms"]) and "speedup" not in trls
        assert ours["error"]["logp_max_nat"] < 1e-4 < trls["error"]["logp_max_nat"]
        assert f"**{ours['speedup']:.2f} ×** ({ours['ratio']:.2f} / {trls['ratio']:.2f})" in shown
    assert "GRPO, entropy bonus, frozen: ours" in capsys.readouterr().out
    # What is wrong has no time, and no one is compared with it.
    right = trl_head.linear_logp
    monkeypatch.setattr(trl_head, "linear_logp", lambda *a, **o: [x + 0.01 for x in right(*a, **o)[:2]])
    trl_head.main([*options, "--output", str(path)])
    (entry,) = json.loads(path.read_text())["shapes"]
    assert all("wrong result" in row["note"] for row in entry["rows"][::2])
    assert "wrong result" in "\n".join(table.trl_head_section(path))


@pytest.mark.skipif(not triton_backend.takes(torch.zeros(1)), reason="needs Triton's interpreter")
def test_collection_ends_before_the_gradients(problem, monkeypatch):
    """It chooses entries and dense tokens for every token, and multiplies nothing."""
    for name in ("add_rows", "add_to_head"):
        monkeypatch.setattr(sparse_kernels, name, None)
    full = {name: getattr(problem, name).float() for name in ("hidden", "weight")}
    dense = sparse.collect(dataclasses.replace(problem, **full), 2.0**-4).dense
    assert len(dense) == len(problem.targets) and not dense.all()
