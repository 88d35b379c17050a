"""The README's examples run: the loss as it stands, the trainer with settings for a tiny model on a CPU.

Links, of this and of every page, lead somewhere.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from egrsd_kernels import fused_egrsd_loss, head_of, read_hidden
from egrsd_kernels.packing.proof import row_limit
from egrsd_kernels.rl import align_responses, response_hidden
from tests.support.doc_examples import ROOT, blocks, language_model
from tests.support.packing import Float64

PAGES = sorted(
    str(page.relative_to(ROOT)) for folder in ("", "docs", "benchmarks") for page in (ROOT / folder).glob("*.md")
)
LOSS, WITH_TRL = blocks("README.md")


def teacher_and_student(device: str) -> dict[str, Any]:
    """Groups that share prompts, a system prompt that all share, an empty response, adapters that change something."""
    names = language_model() | {"device": device}
    model = names["model"].to(device, torch.float64)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.3)
    ids = torch.randint(12, 97, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    draw = lambda count: [ids.pop() for _ in range(count)]  # noqa: E731
    system, solutions = draw(7), [draw(5), draw(9), draw(2)]
    prompts = [system + draw(3), system + draw(6), draw(9)]
    groups = [0, 0, 0, 1, 1, 2]
    names["student_prompts"] = [prompts[group] for group in groups]
    names["teacher_prompts"] = [prompts[group] + solutions[group] for group in groups]
    names["responses"] = [draw(length) for length in (8, 1, 13, 5, 6, 0)]
    names["advantages"] = torch.tensor([1.0, -0.5, 0.3, 2.0, -1.5, 1.0], device=device)
    return names


def of_padded_batches(names: dict[str, Any]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss of the same rollouts in one padded batch, and its gradients."""
    model = names["model"]
    batch = align_responses(names["student_prompts"], names["teacher_prompts"], names["responses"], 0)
    batch = batch.to(names["device"])
    with torch.no_grad(), model.disable_adapter():
        teacher_hidden = response_hidden(read_hidden(model, **batch.teacher), batch.teacher_positions)
    hidden = response_hidden(read_hidden(model, **batch.student), batch.student_positions)
    options = {"mask": batch.mask, "gamma": 0.3, "lookahead": 3}
    loss = fused_egrsd_loss(hidden, head_of(model), teacher_hidden, batch.target_ids, names["advantages"], **options)
    return loss, torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("budget", [1000, 36])
def test_the_loop_has_the_loss_and_gradients_of_padded_batches(device, budget):
    names = teacher_and_student(device)
    trained = [p for p in names["model"].parameters() if p.requires_grad]
    names["losses"] = []
    loop = LOSS.replace("16_384", str(budget)) + "    losses.append(loss.detach())\n"
    row_limit(names["model"])  # the proof is in float32
    with Float64():
        exec(loop, names)
        loss, expected = of_padded_batches(names)
    assert all((len(names[f"{of}_packs"]) > 1) == (budget == 36) for of in ("teacher", "student"))
    torch.testing.assert_close(sum(names["losses"]), loss, rtol=0, atol=1e-12)
    size = torch.stack([gradient.norm() for gradient in expected]).norm()
    assert size > 1e-2
    for parameter, gradient in zip(trained, expected, strict=True):
        assert (parameter.grad - gradient).norm() <= 1e-12 * size


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


def test_it_is_short_and_its_map_is_of_what_is_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    (source_map,) = re.findall(r"^## Source map\n\n```\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    named, folders = set(), []
    for line in source_map.splitlines():
        indent = (len(line) - len(line.lstrip())) // 2
        names = list(itertools.takewhile(re.compile(r"[./]").search, line.split()))
        folder = "".join(folders[:indent])
        named |= {folder + name for name in names}
        folders[indent:] = names[-1:]
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    package = {f"egrsd_kernels/{path.name}" for path in (ROOT / "egrsd_kernels").iterdir()}
    plumbing = {"__init__.py", "__main__.py", "__pycache__", "eager.py", "extras.py", "once.py", "py.typed"}
    assert package - {name.rstrip("/") for name in named} == {f"egrsd_kernels/{name}" for name in plumbing} & package


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """Within the repository; anchors, too, as GitHub and the site make them of headings."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|mailto:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), f"{page}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page}: {link}"
