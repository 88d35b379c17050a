"use strict";
// In the order of their codes, as the filter lists them.
const REGIMES = [...document.querySelectorAll(".filter button")].map(button => button.dataset.regime);
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
