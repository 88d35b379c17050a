"""The HTML, style and script of :mod:`egrsd_kernels.report`'s page; ``{{name}}`` is where it puts what differs.

Each <article> is a rollout: its facts and prompt are HTML, its tokens are JSON, from which the script builds the text
and the trace once they come near the screen. The filter is one attribute of <body> that the style reads, so it holds
for what is built later too. ``current`` is the one token that text, trace and tip show together.
"""

import base64
import hashlib
import re

PAGE = r"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{{policy}}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{title}}</title>
<style>
/* Blue against orange, and dashes against lines: readable without telling red from green. */
:root { color-scheme: light dark; --ink: #1c2430; --soft: #566071; --line: #dfe3ea; --edge: #b9c1ce; --page: #f5f6f9;
  --card: #fff; --hot: #f5a623; --cool: #60a5fa; --plus: #60a5fa; --less: #f79256; --blank: #6b7688;
  --entropy: #b45309; --ahead: #1d5fc4; --good: #dbeafe; --bad: #ffe8d6; --flat: #e8ebf0;
  --lock: #8291a7; --fork: #c2410c; --pivot: #6d28d9; --mid: #0f766e; --nav: 0px; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --soft: #a3adbd; --line: #333b49; --edge: #4b5567; --page: #12161d; --card: #1b212b;
    --hot: #a85f00; --cool: #2563c9; --plus: #2563c9; --less: #b4501b; --blank: #9aa5b6;
    --entropy: #f7a94b; --ahead: #74aefb; --good: #1e3a66; --bad: #5c3013; --flat: #2c3442;
    --lock: #8291a7; --fork: #f0793f; --pivot: #b794f6; --mid: #35b8ab; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", sans-serif; }
header, main { max-width: 62rem; margin: 0 auto; padding: 0 1.5rem; }
header { padding-top: 2.2rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
.summary { color: var(--soft); margin: 0 0 1rem; }
.meanings { list-style: none; margin: 0 0 1rem; padding: 0; display: grid; gap: .45rem 2rem; font-size: .88rem;
  grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); color: var(--soft); }
.meanings li { display: grid; grid-template-columns: 4.2rem 1fr; align-items: baseline; }
.meanings .t { justify-self: start; }
nav { position: sticky; top: 0; z-index: 2; background: var(--page); border-bottom: 1px solid var(--line); }
nav > div { max-width: 62rem; margin: 0 auto; padding: .6rem 1.5rem; display: flex; flex-wrap: wrap;
  gap: .5rem 1.5rem; align-items: center; font-size: .88rem; color: var(--soft); }
.choice { display: inline-flex; border: 1px solid var(--edge); border-radius: .5rem; overflow: hidden;
  background: var(--card); }
.choice button { font: inherit; padding: .3rem .8rem; border: 0; background: none; color: var(--ink); cursor: pointer;
  white-space: nowrap; }
.choice button + button { border-left: 1px solid var(--edge); }
.choice button[aria-pressed=true] { background: var(--ink); color: var(--card); }
.choice button[aria-pressed=true] .t { color: var(--card); }
.choice button:focus-visible { outline: 3px solid var(--cool); outline-offset: -3px; }
.scale { display: none; align-items: center; gap: .6rem; }
.scale i { width: 7rem; height: .8rem; border-radius: .2rem; border: 1px solid var(--line); }
[data-view=entropy] .scale.entropy, [data-view=gate] .scale.gate, [data-view=advantage] .scale.advantage {
  display: inline-flex; }
.scale.entropy i { background: linear-gradient(90deg, var(--card), var(--hot)); }
.scale.gate i { background: linear-gradient(90deg, var(--card), var(--cool)); }
.scale.advantage i { background: linear-gradient(90deg, var(--less), var(--card), var(--plus)); }
main { padding-bottom: 5rem; }
article { background: var(--card); border: 1px solid var(--line); border-radius: .75rem; padding: 1.1rem 1.4rem;
  margin-top: 1.2rem; }
.facts { display: flex; flex-wrap: wrap; gap: .6rem; align-items: center; font-size: .88rem; }
.title { font-weight: 650; margin-right: .4rem; overflow-wrap: anywhere; }
.count { color: var(--soft); }
.pill { padding: .1rem .65rem; border-radius: 1rem; font-variant-numeric: tabular-nums; }
.good { background: var(--good); } .bad { background: var(--bad); } .flat { background: var(--flat); }
pre, .tokens, .t { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .92rem; max-height: 14rem;
  overflow-y: auto; }
.prompt { margin: .9rem 0 .5rem; font-weight: 600; }
details { font-size: .88rem; color: var(--soft); margin-bottom: .3rem; }
summary { cursor: pointer; }
details pre { margin: .5rem 0 .6rem; padding-left: .9rem; border-left: 3px solid var(--line); color: var(--ink); }
/* The trace stays on the screen while the text below it is read. */
.trace { position: sticky; top: var(--nav); z-index: 1; height: 9.3rem; margin: 0 -1.4rem; padding: .5rem 1.4rem;
  background: var(--card); border-bottom: 1px solid var(--line); font-size: .75rem; color: var(--soft);
  display: grid; grid-template: 1.2rem 4rem 2.9rem / 2.9rem 1fr; column-gap: .5rem; }
.key { grid-column: 2; display: flex; flex-wrap: wrap; gap: 0 1.1rem; height: 1.2rem; overflow: hidden;
  line-height: 1.2rem; }
.key i { display: inline-block; width: 1.4rem; margin-right: .35rem; vertical-align: .22em;
  border-top: 2px solid var(--entropy); }
.key .ahead i { border-top: 2px dashed var(--ahead); } .key .high i { border-top: 1px dotted var(--soft); }
.axis { grid-area: 2 / 1; display: flex; flex-direction: column; justify-content: space-between; text-align: right;
  line-height: 1; font-variant-numeric: tabular-nums; }
.lanes { grid-area: 3 / 1; text-align: right; font-size: .65rem; line-height: .7rem; padding-top: .1rem; }
.lanes span { display: block; }
.plot { grid-area: 2 / 2 / 4 / 3; position: relative; cursor: crosshair; touch-action: pan-y; }
.plot svg { position: absolute; left: 0; width: 100%; overflow: visible; }
.curves { top: 0; height: 4rem; border-bottom: 1px solid var(--line); } .bars { top: 4.1rem; height: 2.8rem; }
.plot path { fill: none; vector-effect: non-scaling-stroke; stroke-linejoin: round; }
path.entropy { stroke: var(--entropy); stroke-width: 1.6px; }
path.ahead { stroke: var(--ahead); stroke-width: 1.6px; stroke-dasharray: 4 2; }
.dense path.entropy, .dense path.ahead { stroke-width: 1px; }
path.under { fill: var(--ahead); fill-opacity: .16; }
path.high { stroke: var(--soft); stroke-width: 1px; stroke-dasharray: 1 3; }
.bars path { stroke-width: 1px; }
.bars .lock { fill: var(--lock); stroke: var(--lock); } .bars .fork { fill: var(--fork); stroke: var(--fork); }
.bars .pivot { fill: var(--pivot); stroke: var(--pivot); } .bars .mid { fill: var(--mid); stroke: var(--mid); }
.marker { position: absolute; top: -2px; bottom: 0; width: 2px; margin-left: -1px; background: var(--ink);
  pointer-events: none; }
.marker[hidden] { display: none; }
.tokens { margin: 0 -.3rem; padding: .7rem .3rem .3rem; font-size: 1rem; line-height: 2.15; overflow-wrap: anywhere;
  content-visibility: auto; }
.tokens:focus-visible { outline: 2px solid var(--cool); outline-offset: -2px; border-radius: .3rem; }
.t { padding: .16em .1em .1em; margin: 0 1px; border-radius: .2em .2em 0 0; border-bottom: 3px solid transparent;
  white-space: pre-wrap; color: var(--ink); }
.t i { font-style: normal; color: var(--blank); }
.tokens .t { scroll-margin: calc(var(--nav) + 10rem) 0 2rem; }
.tokens .t.at { outline: 2px solid var(--ink); outline-offset: 1px; }
.t.lock { border-bottom: 3px solid var(--lock); } .t.fork { border-bottom: 4px double var(--fork); }
.t.pivot { border-bottom: 3px dashed var(--pivot); } .t.mid { border-bottom: 3px dotted var(--mid); }
[data-view=entropy] .tokens .t { background: color-mix(in srgb, var(--hot) calc(var(--h) * 100%), transparent); }
[data-view=gate] .tokens .t { background: color-mix(in srgb, var(--cool) calc(var(--g) * 100%), transparent); }
[data-view=advantage] .tokens .t { background: color-mix(in srgb, var(--plus) calc(var(--a) * 100%), transparent); }
[data-view=advantage] .tokens .t.minus {
  background: color-mix(in srgb, var(--less) calc(var(--a) * 100%), transparent); }
/* data-only names the regimes that stay; none named: all of them. */
body:not([data-only=""], [data-only~=lock]) :is(.tokens, .bars) .lock:not(.at),
body:not([data-only=""], [data-only~=fork]) :is(.tokens, .bars) .fork:not(.at),
body:not([data-only=""], [data-only~=pivot]) :is(.tokens, .bars) .pivot:not(.at),
body:not([data-only=""], [data-only~=mid]) :is(.tokens, .bars) .mid:not(.at) { opacity: .22; }
#tip { position: fixed; z-index: 3; pointer-events: none; background: #1c2430; color: #fff; border: 1px solid #4b5567;
  border-radius: .5rem; padding: .6rem .8rem; font-size: .85rem; box-shadow: 0 4px 16px rgb(0 0 0 / .3);
  max-width: calc(100vw - 16px); }
#tip[hidden] { display: none; }
#tip table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
#tip td { padding: .05rem 0; } #tip td + td { text-align: right; padding-left: 1.2rem; }
#tip strong { display: block; max-width: 20rem; overflow-wrap: anywhere; }
#tip small { display: block; margin-bottom: .25rem; color: #c3cad6; }
@media (max-width: 40rem) {
  header, main { padding-inline: .8rem; }
  nav { position: static; } nav > div { padding-inline: .8rem; }
  .filter { width: 100%; } .filter button { flex: 1; padding-inline: .2rem; }
  .filter .t { display: table; margin: 0 auto .2rem; }
  article { padding: .9rem; } .trace { margin: 0 -.9rem; padding-inline: .9rem; }
  .high, .keys { display: none; }
}
</style>
</head>
<body data-view="entropy" data-only="{{only}}">
<header>
<h1>{{title}}</h1>
<p class="summary">{{summary}} Point at a token or at a trace for the numbers<span class="keys">, or reach a response
with Tab and walk with the arrow keys</span>.</p>
<ul class="meanings">{{meanings}}</ul>
<noscript><p>The responses and their traces need JavaScript.</p></noscript>
</header>
<nav><div>
<span class="choice view" role="group" aria-label="Colour tokens by"><button data-to="entropy"
aria-pressed="true">Entropy</button><button data-to="gate" aria-pressed="false">Gate</button><button
data-to="advantage" aria-pressed="false">Advantage</button></span>
<span class="scale entropy">teacher entropy H: 0 <i></i> {{max_entropy}} nats</span>
<span class="scale gate">gate ω: 1 (full weight) <i></i> {{min_gate}}</span>
<span class="scale advantage">token advantage Â: −{{max_advantage}} <i></i> +{{max_advantage}}</span>
<span class="choice filter" role="group" aria-label="Show only these regimes">{{filters}}</span>
<span id="shown" role="status"></span>
</div></nav>
<main>
{{cards}}
</main>
<div id="tip" role="status" hidden></div>
<script type="application/json" id="scales">{{scales}}</script>
<script>
"use strict";
const REGIMES = ["lock", "fork", "pivot", "mid"];
const LABELS = {entropy: "entropy H, nats", lookahead_entropy: "lookahead Hᶜᴸ, nats", gate: "gate ω",
  magnitude: "magnitude w", token_advantage: "token advantage Â", log_ratio: "log-ratio δ, nats",
  student_logp: "log p student, nats", teacher_logp: "log p teacher, nats"};
const SCALES = JSON.parse(document.getElementById("scales").textContent);
const main = document.querySelector("main"), tip = document.getElementById("tip");
const cards = new Map();  // article → what was built for it
let current = null;  // {card, index, anchor}: the token that is shown, and what its tip stands beside

function element(tag, className, ...children) {
  const made = document.createElement(tag);
  made.className = className;
  made.append(...children);
  return made;
}

// ---- tokens

const BLANKS = {" ": "·", "\n": "↵", "\t": "⇥"};

// Blanks, and control and format characters (direction overrides too), made visible.
function visible(text) {
  if (!text) return [element("i", "", "∅")];
  return text.split(/([\p{C}\p{Z}])/u).filter(Boolean).map(part => {
    if (!/^[\p{C}\p{Z}]/u.test(part)) return part;
    const code = part.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    return element("i", "", BLANKS[part] ?? "U+" + code);
  });
}

function share(value, full) {
  return full > 0 && Number.isFinite(value) ? Math.min(Math.max(value / full, 0), 1).toFixed(3) : "0";
}

function tokenElement(data, index) {
  const {entropy, gate, token_advantage} = data.numbers;
  const token = element("span", "t " + REGIMES[data.regimes[index]], ...visible(data.tokens[index]));
  if (token_advantage[index] < 0) token.classList.add("minus");
  token.style.cssText = `--h:${share(entropy[index], SCALES.entropy)};--g:${share(1 - gate[index], SCALES.gate)};` +
    `--a:${share(Math.abs(token_advantage[index]), SCALES.advantage)}`;
  token.dataset.i = index;
  return token;
}

// ---- trace

function svg(className, width, height, paths) {
  const box = document.createElement("template");
  box.innerHTML = `<svg class="${className}" viewBox="0 0 ${width} ${height}" preserveAspectRatio="none"
    aria-hidden="true">${paths.map(([name, d]) => `<path class="${name}" d="${d}"/>`).join("")}</svg>`;
  return box.content.firstChild;
}

// Each token is a step as wide as itself; what is not finite is a gap.
function stepLine(values, height) {
  let path = "", open = false;
  values.forEach((value, index) => {
    const finite = Number.isFinite(value);
    if (finite) path += (open ? "V" : `M${index} `) + height(value) + `H${index + 1}`;
    open = finite;
  });
  return path;
}

function buildTrace(trace, data) {
  const count = data.tokens.length, {entropy, lookahead_entropy} = data.numbers;
  const height = value => (100 - 97 * value / (SCALES.entropy || 1)).toFixed(2);
  const under = lookahead_entropy.map(value => Number.isFinite(value) ? value : 0);
  const high = data.thresholds[1] <= SCALES.entropy ? [["high", `M0 ${height(data.thresholds[1])}H${count}`]] : [];
  const bars = REGIMES.map((name, code) => [name, [...data.regimes].map((regime, index) =>
    Number(regime) === code ? `M${index} ${code + .2}h1v.6h-1z` : "").join("")]);
  const marker = element("div", "marker");
  marker.hidden = true;
  const plot = element("div", "plot",
    // The lookahead, never the larger one, is drawn last: between dashes both show where they are equal.
    svg(count > 250 ? "curves dense" : "curves", count, 100, [
      ["under", `M0 100${stepLine(under, height).replace("M0 ", "V")}V100Z`], ...high,
      ["entropy", stepLine(entropy, height)], ["ahead", stepLine(lookahead_entropy, height)]]),
    svg("bars", count, 4, bars), marker);
  const key = element("div", "key");
  for (const [name, text] of [["entropy", "entropy H"], ["ahead", "lookahead Hᶜᴸ"], ["high", "τ high"]])
    if (name !== "high" || high.length) key.append(element("span", name, element("i", ""), text));
  const axis = element("div", "axis", element("span", "", SCALES.entropy.toFixed(2)), element("span", "", "0 nats"));
  trace.append(key, axis, element("div", "lanes", ...REGIMES.map(name => element("span", "", name))), plot);
  return {plot, marker};
}

// ---- rollouts, built when they come near the screen

function build(article) {
  if (cards.has(article)) return cards.get(article);
  const data = JSON.parse(article.querySelector("script").textContent);
  const text = article.querySelector(".tokens"), trace = article.querySelector(".trace");
  const spans = data.tokens.map((_, index) => tokenElement(data, index));
  const all = document.createDocumentFragment();
  spans.forEach((span, index) => {
    all.append(span);
    for (const _ of data.tokens[index].matchAll("\n")) all.append(document.createElement("br"));
  });
  text.append(spans.length ? all : "No token.");
  text.style.minHeight = "";
  const card = {article, data, spans, text, ...(spans.length ? buildTrace(trace, data) : {})};
  if (!spans.length) trace.remove();
  cards.set(article, card);
  return card;
}

const near = new IntersectionObserver(entries => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    near.unobserve(entry.target);
    build(entry.target);
  }
}, {rootMargin: "600px"});
const width = main.querySelector(".tokens").clientWidth;
for (const article of main.children) {
  const text = article.querySelector(".tokens");
  const height = 2.15 * Math.ceil(text.dataset.size * 10 / width) + 1 + "rem";
  text.style.minHeight = height;  // until it is built, and then until it is first on the screen
  text.style.containIntrinsicHeight = "auto " + height;
  near.observe(article);
}

// ---- the current token, in text, trace and tip

function show(card, index, anchor = card.spans[index]) {
  if (current?.card === card && current.index === index && current.anchor === anchor) return;
  hide();
  const token = card.spans[index], {data} = card;
  current = {card, index, anchor};
  token.classList.add("at");
  card.marker.hidden = false;
  card.marker.style.left = 100 * (index + .5) / card.spans.length + "%";
  const table = document.createElement("table");
  for (const [name, label] of Object.entries(LABELS)) {
    if (!data.numbers[name]) continue;
    const value = data.numbers[name][index], row = table.insertRow();
    row.insertCell().textContent = label;
    row.insertCell().textContent = typeof value === "number" ? value.toFixed(4).replace("-", "−") : value;
  }
  const position = `${REGIMES[data.regimes[index]]}, token ${index + 1} of ${card.spans.length}`;
  tip.replaceChildren(element("strong", "", `“${token.textContent}”`), element("small", "", position), table);
  tip.hidden = false;
  place();
}

function place() {
  const {anchor, card} = current, {innerWidth: right, innerHeight: bottom} = window;
  const box = anchor.getBoundingClientRect(), {width, height} = tip.getBoundingClientRect();
  let left = box.left, top = box.bottom + 8;
  if (anchor === card.marker) {  // beside it: below are the words that it points to
    left = box.right + 12 + width < right ? box.right + 12 : box.left - 12 - width;
    top = box.top - height / 2;
  } else if (top + height > bottom) {
    top = box.top - 8 - height;
  }
  tip.style.left = Math.max(8, Math.min(left, right - width - 8)) + "px";
  tip.style.top = Math.max(8, Math.min(top, bottom - height - 8)) + "px";
}

function hide() {
  if (!current) return;
  current.card.spans[current.index].classList.remove("at");
  current.card.marker.hidden = true;
  tip.hidden = true;
  current = null;
}

function traceIndex(card, x) {
  const box = card.plot.getBoundingClientRect(), count = card.spans.length;
  return Math.max(0, Math.min(count - 1, Math.floor((x - box.left) / box.width * count)));
}

let pointer = "", pinned = false;  // where the pointer is; whether a key or a click has chosen the token

function point(event) {
  const where = event.clientX + " " + event.clientY;
  if (pinned && where === pointer) return;  // the page scrolled to what was chosen; the pointer rests
  pointer = where;
  pinned = false;
  const article = event.target.closest("article"), token = event.target.closest(".tokens .t");
  if (token) return show(build(article), Number(token.dataset.i));
  if (!event.target.closest(".plot")) return hide();
  const card = build(article);
  show(card, traceIndex(card, event.clientX), card.marker);
}

document.addEventListener("pointerover", point);
document.addEventListener("pointermove", point);
// A finger that lifts has left too, but wants to read what it tapped.
document.documentElement.addEventListener("pointerleave", event => { if (event.pointerType !== "touch") hide(); });
main.addEventListener("click", event => {
  if (!current || !event.target.closest(".plot")) return;
  const {card, index} = current;
  pinned = true;
  card.spans[index].scrollIntoView({block: "center"});
  show(card, index);
});
main.addEventListener("focusin", event => {
  if (!event.target.matches(".tokens:focus-visible")) return;
  const card = build(event.target.closest("article"));
  pinned = true;
  if (card.spans.length) show(card, card.left ?? 0);
});
main.addEventListener("focusout", hide);

const isShown = (card, index) => !only().length || only().includes(REGIMES[card.data.regimes[index]]);
main.addEventListener("keydown", event => {
  if (!event.target.matches(".tokens")) return;
  const card = build(event.target.closest("article")), last = card.spans.length - 1;
  const here = current?.card === card ? current.index : card.left ?? 0;
  // The filter holds for the keys too: they stop at the tokens that are not faded.
  const [start, by] = {ArrowRight: [here + 1, 1], ArrowLeft: [here - 1, -1], Home: [0, 1], End: [last, -1]}[event.key]
    ?? [-1, 0];
  if (!by) return;
  event.preventDefault();
  let index = start;
  while (index >= 0 && index <= last && !isShown(card, index)) index += by;
  if (index < 0 || index > last) return;
  card.left = index;
  pinned = true;
  card.spans[index].scrollIntoView({block: "nearest"});
  show(card, index);
});
addEventListener("keydown", event => { if (event.key === "Escape") hide(); });
addEventListener("scroll", () => {
  if (!current) return;
  const {top, bottom} = current.anchor.getBoundingClientRect();
  if (bottom < 0 || top > innerHeight) hide(); else place();
}, {passive: true});

// ---- colour and filter

function press(buttons, isPressed) {
  for (const button of buttons) button.setAttribute("aria-pressed", String(isPressed(button)));
}

const views = document.querySelectorAll(".view button"), filters = document.querySelectorAll(".filter button");
for (const button of views) {
  button.addEventListener("click", () => {
    document.body.dataset.view = button.dataset.to;
    press(views, other => other === button);
  });
}

const only = () => document.body.dataset.only.split(" ").filter(Boolean);
const add = numbers => numbers.reduce((sum, number) => sum + number, 0);
const some = (part, all) => (only().length ? `${part.toLocaleString("en")} of ` : "") +
  `${all.toLocaleString("en")} token${all === 1 ? "" : "s"}`;

function filter(names) {
  document.body.dataset.only = REGIMES.filter(name => names.includes(name)).join(" ");
  press(filters, button => only().includes(button.dataset.regime));
  const kept = counts => add(counts.filter((_, code) => only().includes(REGIMES[code])));
  const all = [...filters].map(button => Number(button.dataset.count));
  document.getElementById("shown").textContent = some(kept(all), add(all));
  for (const count of main.querySelectorAll(".count")) {
    const counts = count.dataset.counts.split(" ").map(Number);
    count.textContent = some(kept(counts), add(counts));
  }
}

for (const button of filters) {
  button.addEventListener("click", () => {
    const name = button.dataset.regime;
    filter(only().includes(name) ? only().filter(other => other !== name) : [...only(), name]);
  });
}
filter(only());

// The traces stick below the bar, however many lines it takes.
new ResizeObserver(() => {
  const bar = document.querySelector("nav"), sticks = getComputedStyle(bar).position === "sticky";
  document.documentElement.style.setProperty("--nav", (sticks ? bar.offsetHeight : 0) + "px");
}).observe(document.body.querySelector("nav"));
</script>
</body>
</html>
"""


def _digest(tag: str) -> str:
    (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# Should a text ever become markup: this style and this script alone count, and nothing is loaded or sent.
POLICY = (
    f"default-src 'none'; style-src {_digest('style')}; script-src {_digest('script')}; base-uri 'none'; "
    "form-action 'none'"
)
