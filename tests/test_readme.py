"""The README's examples run: the loss as it stands, the trainer with settings for a tiny model on a CPU.

Links, of this and of every page, lead somewhere.
"""

from __future__ import annotations

import itertools
import re

import pytest

from tests.support.doc_examples import ROOT, blocks, language_model

PAGES = sorted(
    str(page.relative_to(ROOT)) for folder in ("", "docs", "benchmarks") for page in (ROOT / folder).glob("*.md")
)
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
