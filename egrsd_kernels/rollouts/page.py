"""A page for reading rollouts token by token: what the teacher thought of each token, and what it earned.

:func:`write_token_report` writes one self-contained HTML file: page.css and page.js are inside, it loads nothing.
``{{name}}`` in page.html is where it puts what differs.

Each <article> is a rollout. Its facts and prompt are HTML. Its tokens are JSON, from which the script builds the text
and the trace once they come near the screen. The regimes are those of :mod:`egrsd_kernels.credit`: the script reads
their names off the filter's buttons, and page.css says how each looks. The filter is one attribute of <body> that the
style reads, so it holds for what is built later too. ``current`` is the one token that text, trace and tip show.
"""

import base64
import functools
import hashlib
import html
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch

from egrsd_kernels.credit import REGIMES, TAU_HIGH, TAU_LOW, Regime, token_regimes

from .record import Rollout

# HTML drops NUL or puts U+FFFD in its place, and shows no other control character: ␀, ␁ and so on say what was there.
CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"} | {127: 0x2421}


def write_token_report(
    path: str | Path,
    rollouts: Sequence[Rollout],
    *,
    vocab_size: int | None = None,
    tau_low: float = TAU_LOW,
    tau_high: float = TAU_HIGH,
    title: str = "Sampled rollouts",
    regimes: Sequence[str] = (),
    track: Callable[[Sequence[Rollout]], Iterable[Rollout]] = iter,
) -> Path:
    """Write the page to ``path`` and return it.

    Tokens are coloured by the teacher's entropy, by the gate or by the token advantage, as the reader chooses; each
    carries the mark of its regime and shows its numbers under the pointer or the keyboard's focus. Tokens of other
    regimes than those chosen fade. A trace shows each rollout's entropy with its lookahead. Bad arguments raise a
    ValueError that names them, before the file is written.

    Args:
        path: the HTML file; its folder is created.
        rollouts: what to show, in this order.
        vocab_size: V, for rollouts that do not say theirs. The regimes compare H / log V with the thresholds, as
            Figure A5 of arXiv 2605.13255 does.
        tau_low, tau_high: thresholds of :func:`~egrsd_kernels.credit.token_regimes`.
        title: the page's heading.
        regimes: names of the regimes that the page opens with; the tokens of the others are faded. Default: all.
        track: wraps ``rollouts`` while they are written, to show progress; for example ``rich.progress.track``.
    """
    if not rollouts:
        raise ValueError("rollouts: expected at least one")
    unknown = sorted(set(regimes) - set(REGIMES))
    if unknown:
        raise ValueError(f"regimes: expected names among {', '.join(REGIMES)}, got {unknown[0]!r}")

    scales = _Scales.of(rollouts)
    counts: Counter[str] = Counter()
    cards = []
    for rollout in track(rollouts):
        log_v = _log_vocabulary(rollout, vocab_size)
        codes = _regime_codes(rollout, log_v, tau_low, tau_high)
        counts.update(REGIMES[code] for code in codes)
        cards.append(_card(rollout, codes, (tau_low * log_v, tau_high * log_v)))
    judged = [rollout.reward for rollout in rollouts if rollout.reward is not None and math.isfinite(rollout.reward)]
    template, style, script = (_part(kind) for kind in ("html", "css", "js"))
    values = {
        "policy": _policy(style, script),
        "style": style,
        "script": script,
        "title": _escape(title),
        "summary": f"{_count(len(rollouts), 'rollout')}, {_count(counts.total(), 'response token')}, "
        + (f"mean reward {_decimal(sum(judged) / len(judged))}." if judged else "unjudged."),
        "meanings": _meanings(tau_low, tau_high),
        "filters": _filters(counts),
        "only": " ".join(name for name in REGIMES if name in regimes),
        "max_entropy": f"{scales.entropy:.2f}",
        "min_gate": f"{1 - scales.gate:.2f}",
        "max_advantage": f"{scales.advantage:.2f}",
        "scales": _script_json({"entropy": scales.entropy, "gate": scales.gate, "advantage": scales.advantage}),
        "cards": "\n".join(cards),
    }
    # One pass: braces in a prompt or a title are text, not placeholders.
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


@functools.cache
def _part(kind: str) -> str:
    return (files(__package__) / f"page.{kind}").read_text(encoding="utf-8")


def _policy(*parts: str) -> str:
    """Should a text ever become markup: this style and this script alone count, and nothing is loaded or sent."""
    style, script = (base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in parts)
    return (
        f"default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}'; base-uri 'none'; "
        "form-action 'none'"
    )


def _log_vocabulary(rollout: Rollout, default: int | None) -> float:
    size = default if rollout.vocab_size is None else rollout.vocab_size
    if size is None or size < 2:
        raise ValueError(f"vocab_size: expected at least 2, got {size}")
    return math.log(size)


def _regime_codes(rollout: Rollout, log_v: float, tau_low: float, tau_high: float) -> list[int]:
    entropies = torch.tensor([list(rollout.entropy), list(rollout.lookahead_entropy)]).view(2, -1)
    now, ahead = entropies / log_v
    return token_regimes(now, ahead, tau_low, tau_high).tolist()


@dataclass(frozen=True)
class _Scales:
    """What full colour means: the page's extremes, so that small differences stay visible. The legend names them."""

    entropy: float
    gate: float  # the largest 1 − ω
    advantage: float

    @classmethod
    def of(cls, rollouts: Sequence[Rollout]) -> "_Scales":
        def largest(values: Iterable[float]) -> float:
            return max((value for value in values if math.isfinite(value)), default=0.0)

        return cls(
            entropy=largest(value for rollout in rollouts for value in rollout.entropy),
            gate=largest(1 - value for rollout in rollouts for value in rollout.gate),
            advantage=largest(abs(value) for rollout in rollouts for value in rollout.token_advantage),
        )


def _card(rollout: Rollout, codes: Sequence[int], thresholds: tuple[float, float]) -> str:
    """What is read at once as HTML, and the tokens as data: the page's script builds them where they are looked at."""
    tone = "good" if rollout.advantage > 0 else "bad" if rollout.advantage < 0 else "flat"
    step = "" if rollout.step is None else f"step {rollout.step}"
    heading = " · ".join(filter(None, (step, rollout.title)))
    reward = math.nan if rollout.reward is None else rollout.reward
    title = f'<span class="title">{_escape(heading)}</span>' if heading else ""
    reference = (
        f"<details><summary>Reference solution, seen by the teacher only</summary>"
        f"<pre>{_escape(rollout.reference)}</pre></details>"
        if rollout.reference is not None
        else ""
    )
    data = {
        "tokens": list(rollout.tokens),
        "regimes": "".join(map(str, codes)),
        "thresholds": thresholds,
        "numbers": {name: [_json_number(value) for value in values] for name, values in rollout.numbers().items()},
    }
    counts = " ".join(str(codes.count(code)) for code in range(len(REGIMES)))
    return (
        f'<article><div class="facts">{title}'
        f'<span class="pill {tone}">{"unjudged" if math.isnan(reward) else f"reward {_decimal(reward)}"}</span>'
        f'<span class="pill {tone}">advantage {_decimal(rollout.advantage, "+")}</span>'
        f'<span class="count" data-counts="{counts}">{_count(len(rollout.tokens), "token")}</span></div>'
        f'<pre class="prompt">{_escape(rollout.prompt)}</pre>{reference}'
        f'<div class="trace"></div><div class="tokens" tabindex="0" role="group" aria-describedby="tip" '
        f'aria-label="Response; the arrow keys go from token to token" '
        f'data-size="{_printed_size(rollout.tokens)}"></div>'
        f'<script type="application/json">{_script_json(data)}</script></article>'
    )


def _printed_size(tokens: Sequence[str]) -> int:
    """About how many characters of space the response takes, so that the page has its length before it is built."""
    return sum(len(token) + 40 * token.count("\n") for token in tokens)


def _json_number(value: float) -> float | str:
    # JSON has no NaN and no infinity.
    return round(value, 4) if math.isfinite(value) else f"{value}".replace("-", "−")


def _script_json(value: object) -> str:
    """ASCII that is at home in a <script>: no text can close it, and a lone surrogate survives as an escape."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _escape(text: str) -> str:
    # A lone surrogate, half of a split character, has no UTF-8 form.
    return html.escape(text.encode("utf-8", "replace").decode("utf-8"), quote=True).translate(CONTROL_PICTURES)


def _decimal(value: float, sign: str = "") -> str:
    if math.isnan(value):
        return "–"
    return f"{value:{sign}.2f}".replace("-", "−").replace("inf", "∞")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _meanings(tau_low: float, tau_high: float) -> str:
    meaning = {
        Regime.LOCK: f"the teacher is certain: Ĥ ≤ {tau_low:g}",
        Regime.FORK: f"uncertain, and stays so: Ĥ and Ĥᶜᴸ ≥ {tau_high:g}",
        Regime.PIVOT: f"uncertain, then certain: Ĥ ≥ {tau_high:g}, Ĥᶜᴸ ≤ {tau_low:g}",
        Regime.MID: "the rest",
    }
    return "".join(
        f'<li><span class="t {name} sample">{name}</span><span>{meaning[Regime[name.upper()]]}</span></li>'
        for name in REGIMES
    )


def _filters(counts: Counter[str]) -> str:
    total = max(counts.total(), 1)
    return "".join(
        f'<button data-regime="{name}" data-count="{counts[name]}" aria-pressed="false" '
        f'title="{_count(counts[name], "token")}"><span class="t {name}">{name}</span> '
        f"{counts[name] / total:.1%}</button>"
        for name in REGIMES
    )
