"""A page for reading rollouts token by token: what the teacher thought of each token, and what it earned.

:func:`write_token_report` writes one self-contained HTML file: its style and script are inside, it loads nothing.
"""

import html
import json
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .problem import TokenStats
from .regimes import Regime, regime_shares, token_regimes


@dataclass(frozen=True)
class Rollout:
    """One response with its per-token numbers; the sequences have one entry for each token. Entropies in nats.

    ``prompt`` and ``reference`` are shown as text, ``tokens`` are the decoded tokens of the response, one string each.
    ``title`` is free, for example "step 40".
    """

    prompt: str
    tokens: Sequence[str]
    entropy: Sequence[float]
    lookahead_entropy: Sequence[float]
    gate: Sequence[float]
    magnitude: Sequence[float]
    log_ratio: Sequence[float]
    token_advantage: Sequence[float]
    reward: float
    advantage: float
    reference: str | None = None
    title: str = ""

    def __post_init__(self) -> None:
        for name in _NUMBERS:
            if len(getattr(self, name)) != len(self.tokens):
                raise ValueError(
                    f"{name}: expected one value for each of the {len(self.tokens)} tokens, "
                    f"got {len(getattr(self, name))}"
                )

    @classmethod
    def from_stats(
        cls,
        stats: TokenStats,
        row: int,
        *,
        prompt: str,
        tokens: Sequence[str],
        reward: float,
        advantage: float,
        reference: str | None = None,
        title: str = "",
    ) -> "Rollout":
        """Row ``row`` of (B, T) statistics, whose first ``len(tokens)`` positions are the response."""

        def numbers(values: torch.Tensor) -> list[float]:
            return values[row, : len(tokens)].tolist()

        return cls(
            prompt=prompt,
            tokens=tokens,
            entropy=numbers(stats.teacher_entropy),
            lookahead_entropy=numbers(stats.lookahead_entropy),
            gate=numbers(stats.gate),
            magnitude=numbers(stats.magnitude),
            log_ratio=numbers(stats.teacher_logp - stats.student_logp),
            token_advantage=numbers(stats.token_advantage),
            reward=reward,
            advantage=advantage,
            reference=reference,
            title=title,
        )


_NUMBERS = ("entropy", "lookahead_entropy", "gate", "magnitude", "log_ratio", "token_advantage")


def write_token_report(
    path: str | Path,
    rollouts: Sequence[Rollout],
    *,
    vocab_size: int,
    tau_low: float = 0.01,
    tau_high: float = 0.17,
    title: str = "Sampled rollouts",
) -> Path:
    """Write the page to ``path`` and return it.

    Tokens are coloured by the teacher's entropy, by the gate or by the token advantage, as the reader chooses; each
    carries the mark of its regime and shows its numbers under the pointer.

    Args:
        path: the HTML file; its folder is created.
        rollouts: what to show, in this order.
        vocab_size: V. The regimes compare H / log V with the thresholds, as Figure A5 of arXiv 2605.13255 does.
        tau_low, tau_high: thresholds of :func:`~egrsd_kernels.regimes.token_regimes`.
        title: the page's heading.
    """
    if not rollouts:
        raise ValueError("rollouts: expected at least one")
    if vocab_size < 2:
        raise ValueError(f"vocab_size: expected at least 2, got {vocab_size}")

    def regimes(rollout: Rollout) -> torch.Tensor:
        entropies = torch.tensor([list(rollout.entropy), list(rollout.lookahead_entropy)]).view(2, -1)
        return token_regimes(*entropies / math.log(vocab_size), tau_low, tau_high)

    codes = [regimes(rollout) for rollout in rollouts]
    scales = _Scales.of(rollouts)
    cards = "\n".join(_card(rollout, code.tolist(), scales) for rollout, code in zip(rollouts, codes, strict=True))
    tokens = sum(len(rollout.tokens) for rollout in rollouts)
    values = {
        "title": _escape(title),
        "summary": f"{len(rollouts)} rollouts, {tokens:,} response tokens, mean reward "
        f"{sum(rollout.reward for rollout in rollouts) / len(rollouts):.2f}. Point at a token for its numbers.",
        "regimes": _regime_legend(regime_shares(torch.cat(codes)), tau_low, tau_high),
        "max_entropy": f"{scales.entropy:.2f}",
        "min_gate": f"{1 - scales.gate:.2f}",
        "max_advantage": f"{scales.advantage:.2f}",
        "cards": cards,
    }
    # One pass: braces in a prompt or a title are text, not placeholders.
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], _PAGE)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


@dataclass(frozen=True)
class _Scales:
    """What full colour means: the page's extremes, so that small differences stay visible. The legend names them."""

    entropy: float
    gate: float  # the largest 1 − ω
    advantage: float

    @classmethod
    def of(cls, rollouts: Sequence[Rollout]) -> "_Scales":
        def largest(values) -> float:
            return max((value for value in values if math.isfinite(value)), default=0.0)

        return cls(
            entropy=largest(value for rollout in rollouts for value in rollout.entropy),
            gate=largest(1 - value for rollout in rollouts for value in rollout.gate),
            advantage=largest(abs(value) for rollout in rollouts for value in rollout.token_advantage),
        )


def _card(rollout: Rollout, codes: Sequence[int], scales: _Scales) -> str:
    tone = "good" if rollout.advantage > 0 else "bad" if rollout.advantage < 0 else "flat"
    tokens = "".join(
        _token(token, Regime(code), dict(zip(_NUMBERS, numbers, strict=True)), scales)
        for token, code, *numbers in zip(
            rollout.tokens, codes, *(getattr(rollout, name) for name in _NUMBERS), strict=True
        )
    )
    title = f'<span class="title">{_escape(rollout.title)}</span>' if rollout.title else ""
    reference = (
        f"<details><summary>Reference solution, seen by the teacher only</summary>"
        f"<pre>{_escape(rollout.reference)}</pre></details>"
        if rollout.reference is not None
        else ""
    )
    return (
        f'<article><div class="facts">{title}'
        f'<span class="pill {tone}">reward {rollout.reward:.2f}</span>'
        f'<span class="pill {tone}">advantage {_signed(rollout.advantage)}</span>'
        f'<span class="count">{len(rollout.tokens)} tokens</span></div>'
        f'<pre class="prompt">{_escape(rollout.prompt)}</pre>{reference}'
        f'<div class="tokens">{tokens}</div></article>'
    )


def _token(text: str, regime: Regime, numbers: dict[str, float], scales: _Scales) -> str:
    advantage = numbers["token_advantage"]
    style = (
        f"--h:{_share(numbers['entropy'], scales.entropy)};--g:{_share(1 - numbers['gate'], scales.gate)};"
        f"--a:{_share(abs(advantage), scales.advantage)}"
    )
    sign = " minus" if advantage < 0 else ""
    values = json.dumps([f"{value:.4f}" for value in numbers.values()])
    shown, breaks = _visible(text)
    return (
        f'<span class="t {regime.name.lower()}{sign}" style="{style}" data-v="{_escape(values)}">{shown}</span>{breaks}'
    )


def _share(value: float, full: float) -> str:
    return f"{min(max(value / full, 0.0), 1.0):.3f}" if full > 0 and math.isfinite(value) else "0"


def _visible(text: str) -> tuple[str, str]:
    """(HTML of a token with its blanks and control characters made visible, line breaks to follow it)."""
    shown = []
    for character in text:
        if character == " ":
            shown.append("<i>·</i>")
        elif character == "\n":
            shown.append("<i>↵</i>")
        elif character == "\t":
            shown.append("<i>⇥</i>")
        # Control, format (direction overrides too), surrogate, unassigned; and blanks other than the space.
        elif unicodedata.category(character)[0] in "CZ":
            shown.append(f"<i>U+{ord(character):04X}</i>")
        else:
            shown.append(_escape(character))
    return "".join(shown) or "<i>∅</i>", "<br>" * text.count("\n")


def _escape(text: str) -> str:
    # A lone surrogate, half of a split character, has no UTF-8 form.
    return html.escape(text.encode("utf-8", "replace").decode("utf-8"), quote=True)


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _regime_legend(shares: dict[str, float], tau_low: float, tau_high: float) -> str:
    meaning = {
        "lock": f"the teacher is certain: Ĥ ≤ {tau_low:g}",
        "fork": f"uncertain, and stays so: Ĥ and Ĥᶜᴸ ≥ {tau_high:g}",
        "pivot": f"uncertain, then certain: Ĥ ≥ {tau_high:g}, Ĥᶜᴸ ≤ {tau_low:g}",
        "mid": "the rest",
    }
    return "".join(
        f'<li><span class="t {name} sample">{name}</span><b>{shares[name]:.0%}</b><span>{text}</span></li>'
        for name, text in meaning.items()
    )


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{title}}</title>
<style>
:root { color-scheme: light; --ink: #1c2430; --soft: #566071; --line: #dfe3ea; --paper: #f5f6f9;
  --hot: #f59e0b; --cool: #60a5fa; --plus: #4ade80; --less: #fb7185; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", sans-serif; }
header, main { max-width: 62rem; margin: 0 auto; padding: 0 1.5rem; }
header { padding-top: 2.5rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
.summary { color: var(--soft); margin: 0 0 1.2rem; }
.regimes { list-style: none; margin: 0 0 1.2rem; padding: 0; display: grid; gap: .45rem 2rem;
  grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); font-size: .88rem; color: var(--soft); }
.regimes li { display: grid; grid-template-columns: 4.2rem 2.8rem 1fr; align-items: baseline; }
.regimes b { color: var(--ink); font-variant-numeric: tabular-nums; }
.regimes .t { justify-self: start; }
nav { position: sticky; top: 0; z-index: 2; background: rgb(245 246 249 / .96); border-bottom: 1px solid var(--line); }
nav > div { max-width: 62rem; margin: 0 auto; padding: .7rem 1.5rem; display: flex; flex-wrap: wrap; gap: .6rem 1.5rem;
  align-items: center; }
.views { display: inline-flex; border: 1px solid #b9c1ce; border-radius: .5rem; overflow: hidden; background: #fff; }
.views button { font: inherit; font-size: .9rem; padding: .3rem .9rem; border: 0; background: none; color: var(--ink);
  cursor: pointer; }
.views button + button { border-left: 1px solid #b9c1ce; }
.views button[aria-pressed=true] { background: var(--ink); color: #fff; }
.views button:focus-visible { outline: 3px solid var(--cool); outline-offset: -3px; }
.scale { display: none; align-items: center; gap: .6rem; font-size: .88rem; color: var(--soft); }
.scale i { width: 9rem; height: .8rem; border-radius: .2rem; border: 1px solid var(--line); }
[data-view=entropy] .scale.entropy, [data-view=gate] .scale.gate, [data-view=advantage] .scale.advantage {
  display: inline-flex; }
.scale.entropy i { background: linear-gradient(90deg, #fff, var(--hot)); }
.scale.gate i { background: linear-gradient(90deg, #fff, var(--cool)); }
.scale.advantage i { background: linear-gradient(90deg, var(--less), #fff, var(--plus)); }
main { padding-bottom: 5rem; }
article { background: #fff; border: 1px solid var(--line); border-radius: .75rem; padding: 1.2rem 1.4rem;
  margin-top: 1.2rem; }
.facts { display: flex; flex-wrap: wrap; gap: .6rem; align-items: center; font-size: .88rem; }
.title { font-weight: 650; margin-right: .4rem; }
.count { color: var(--soft); }
.pill { padding: .1rem .65rem; border-radius: 1rem; font-variant-numeric: tabular-nums; }
.good { background: #dcfce7; color: #14532d; } .bad { background: #ffe4e6; color: #881337; }
.flat { background: #e8ebf0; color: var(--ink); }
pre, .tokens { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .92rem; }
.prompt { margin: .9rem 0 .5rem; font-weight: 600; }
details { font-size: .88rem; color: var(--soft); margin-bottom: .3rem; }
summary { cursor: pointer; }
details pre { margin: .5rem 0 .6rem; padding-left: .9rem; border-left: 3px solid var(--line); color: var(--ink); }
.tokens { margin-top: .7rem; font-size: 1rem; line-height: 2.15; overflow-wrap: anywhere; }
.t { padding: .16em .1em .1em; margin: 0 1px; border-radius: .2em .2em 0 0; border-bottom: 3px solid transparent;
  white-space: pre-wrap; }
.t i { font-style: normal; color: #6b7688; }
.t:hover { outline: 2px solid var(--ink); outline-offset: 1px; }
.lock { border-bottom: 3px solid #94a3b8; } .fork { border-bottom: 4px double #b91c1c; }
.pivot { border-bottom: 3px dashed #6d28d9; } .mid { border-bottom: 3px dotted #0f766e; }
.sample { font-family: ui-monospace, Menlo, Consolas, monospace; color: var(--ink); }
[data-view=entropy] .tokens .t { background: color-mix(in srgb, var(--hot) calc(var(--h) * 100%), transparent); }
[data-view=gate] .tokens .t { background: color-mix(in srgb, var(--cool) calc(var(--g) * 100%), transparent); }
[data-view=advantage] .tokens .t { background: color-mix(in srgb, var(--plus) calc(var(--a) * 100%), transparent); }
[data-view=advantage] .tokens .t.minus {
  background: color-mix(in srgb, var(--less) calc(var(--a) * 100%), transparent); }
#tip { position: fixed; z-index: 3; pointer-events: none; background: var(--ink); color: #fff; border-radius: .5rem;
  padding: .6rem .8rem; font-size: .85rem; box-shadow: 0 4px 16px rgb(0 0 0 / .25); }
#tip[hidden] { display: none; }
#tip table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
#tip td { padding: .05rem 0; } #tip td + td { text-align: right; padding-left: 1.2rem; }
#tip strong { display: block; margin-bottom: .25rem; }
</style>
</head>
<body data-view="entropy">
<header>
<h1>{{title}}</h1>
<p class="summary">{{summary}}</p>
<ul class="regimes">{{regimes}}</ul>
</header>
<nav><div>
<span class="views" role="group" aria-label="Colour tokens by"><button data-to="entropy"
aria-pressed="true">Entropy</button><button data-to="gate" aria-pressed="false">Gate</button><button
data-to="advantage" aria-pressed="false">Advantage</button></span>
<span class="scale entropy">teacher entropy H: 0 <i></i> {{max_entropy}} nats</span>
<span class="scale gate">gate ω: 1 (full weight) <i></i> {{min_gate}}</span>
<span class="scale advantage">token advantage Â: −{{max_advantage}} <i></i> +{{max_advantage}}</span>
</div></nav>
<main>
{{cards}}
</main>
<div id="tip" role="tooltip" hidden></div>
<script>
"use strict";
const NAMES = ["entropy H, nats", "lookahead Hᶜᴸ, nats", "gate ω", "magnitude w", "log-ratio δ, nats",
  "token advantage Â"];
const tip = document.getElementById("tip");
for (const button of document.querySelectorAll(".views button")) {
  button.addEventListener("click", () => {
    document.body.dataset.view = button.dataset.to;
    for (const other of document.querySelectorAll(".views button"))
      other.setAttribute("aria-pressed", String(other === button));
  });
}
document.querySelector("main").addEventListener("pointerover", event => {
  const token = event.target.closest(".t");
  tip.hidden = !token;
  if (!token) return;
  const heading = document.createElement("strong");
  heading.textContent = "“" + token.textContent + "”  " +
    ["lock", "fork", "pivot", "mid"].find(name => token.classList.contains(name));
  const table = document.createElement("table");
  JSON.parse(token.dataset.v).forEach((value, index) => {
    const row = table.insertRow();
    row.insertCell().textContent = NAMES[index];
    row.insertCell().textContent = value.replace("-", "−");
  });
  tip.replaceChildren(heading, table);
  const box = token.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const below = box.bottom + 8 + own.height < innerHeight;
  tip.style.left = Math.max(8, Math.min(box.left, innerWidth - own.width - 8)) + "px";
  tip.style.top = (below ? box.bottom + 8 : box.top - own.height - 8) + "px";
});
document.querySelector("main").addEventListener("pointerleave", () => { tip.hidden = true; });
addEventListener("scroll", () => { tip.hidden = true; });
</script>
</body>
</html>
"""
