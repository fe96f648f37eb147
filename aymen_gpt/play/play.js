// The page of aymen-gpt play. It asks /v1/completions as any program does; text from the model is only ever textContent.
"use strict";
const $ = (id) => document.getElementById(id);
const name = document.querySelector("main").dataset.name;
const percent = (logprob) => (100 * Math.exp(logprob)).toPrecision(2) + " %";
let running = null; // the AbortController of the text that is being written
let steps = [];

const numbers = () => Object.fromEntries(
  ["temperature", "top_k", "top_p", "max_tokens", "seed"].map((id) => [id, Number($(id).value)]));

function tell(place, words, wrong = false) {
  place.textContent = words;
  place.classList.toggle("error", wrong);
}

// The answer to a prompt (a text or token ids), piece by piece; queued(n) hears how many others come first.
async function* complete(model, prompt, signal, queued) {
  const body = { model, prompt, echo: true, stream: true, logprobs: 10, ...numbers() };
  const response = await fetch("/v1/completions", {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });
  if (!response.ok) throw new Error((await response.json()).error.message);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const events = (text + part.value).split("\n\n");
    text = events.pop();
    for (const event of events) {
      if (event.startsWith(": ")) queued(parseInt(event.slice(2)));
      if (!event.startsWith("data: {")) continue;
      const data = JSON.parse(event.slice(6));
      if (data.error) throw new Error(data.error.message);
      yield data.choices[0];
    }
  }
}

function colour(span, logprob) {
  const strength = logprob === null ? 0 : Math.round(70 * (1 - Math.exp(logprob / 6)));
  span.style.background = `color-mix(in srgb, var(--val) ${strength}%, transparent)`;
}

// Tokens become spans in a place. What a span needs to go on from it lies in span.seen.
function writer(place) {
  const ids = [];
  let halves = 0; // tokens whose bytes make no whole character yet
  place.replaceChildren();
  return (choice, given) => {
    const found = choice.logprobs;
    found.tokens.forEach((token, i) => {
      const before = ids.slice();
      ids.push(found.token_ids[i]);
      if (found.token_ids[i] === 50256) return;
      const alone = found.tokens.length === 1 && halves === 0;
      const half = token.startsWith("bytes:");
      halves = half ? halves + 1 : 0;
      const shown = alone || (!given && i === found.tokens.length - 1) ? choice.text : half ? "\u00b7" : token;
      if (!shown) return;
      const span = document.createElement("span");
      span.textContent = shown;
      span.classList.toggle("given", given);
      span.seen = { before, id: found.token_ids[i], logprob: found.token_logprobs[i], top: found.alternatives[i] };
      colour(span, found.token_logprobs[i]);
      place.append(span);
    });
  };
}

async function write(prompt) {
  running?.abort();
  const mine = running = new AbortController();
  const began = performance.now();
  let n = 0;
  $("card").hidden = true;
  $("stop").disabled = false;
  tell($("say"), "");
  const add = writer($("text"));
  try {
    const model = steps.length && $("step").touched ? `${name}:${steps[$("step").value]}` : name;
    for await (const choice of complete(model, prompt, mine.signal, (k) => tell($("say"), `${k} before this`))) {
      add(choice, n === 0);
      const end = n > 0 && choice.finish_reason === "stop" ? "; the model ended its text here" : "";
      const speed = (1000 * n / (performance.now() - began)).toFixed(0);
      if (choice.text || end) tell($("say"), `${n} tokens, ${speed} a second${end}`);
      n += choice.logprobs.tokens.length && 1;
    }
  } catch (error) {
    if (error.name === "AbortError") tell($("say"), "stopped");
    else tell($("say"), error.message, true);
  }
  if (running === mine) { running = null; $("stop").disabled = true; }
}

function alternatives(span) {
  const { before, id, logprob, top } = span.seen;
  const card = $("card"), head = document.createElement("p");
  head.textContent = logprob === null ? "the first token" : `${percent(logprob)} for this token`;
  card.replaceChildren(head, ...top.map((one) => {
    const button = document.createElement("button"), share = document.createElement("small");
    const [other, text, likely] = one;
    button.textContent = JSON.stringify(text).slice(1, -1);
    share.textContent = percent(likely);
    button.style.setProperty("--share", `${100 * Math.exp(likely)}%`);
    button.classList.toggle("chosen", other === id);
    button.append(share);
    button.onclick = () => write([...before, other]);
    return button;
  }));
  const box = span.getBoundingClientRect();
  card.hidden = false;
  card.style.left = `${Math.max(8, Math.min(box.left, document.documentElement.clientWidth - 262)) + scrollX}px`;
  card.style.top = `${box.bottom + scrollY + 4}px`;
}

// One answer for a checkpoint, in a card of its own that keeps its place in the order of steps.
async function ask(step) {
  const old = document.querySelector(`article[data-step="${step}"]`);
  const card = document.createElement("article"), title = document.createElement("h3"), text = document.createElement("p");
  card.dataset.step = step;
  title.textContent = `step ${step.toLocaleString("en")}`;
  text.className = "tokens";
  card.append(title, text);
  old?.stopped.abort();
  const next = [...$("answers").children].find((other) => Number(other.dataset.step) > step);
  old ? old.replaceWith(card) : $("answers").insertBefore(card, next ?? null);
  card.stopped = new AbortController();
  const add = writer(text);
  let n = 0;
  try {
    const queued = (k) => tell(text, `${k} before this`);
    for await (const choice of complete(`${name}:${step}`, $("prompt").value, card.stopped.signal, queued)) {
      if (n === 0) text.replaceChildren();
      add(choice, n++ === 0);
    }
  } catch (error) {
    if (error.name !== "AbortError") tell(text, error.message, true);
  }
  card.dataset.done = true;
}

let attention = [];
async function look() {
  tell($("told"), "");
  const body = { model: name, text: $("passage").value, layer: Number($("layer").value), head: Number($("head").value) };
  const response = await fetch("/api/inspect", {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
  const found = await response.json();
  if (found.error) return tell($("told"), found.error.message, true);
  $("layer").max = found.layers - 1;
  $("head").max = found.heads - 1;
  attention = found.attention;
  writer($("seen"))({ logprobs: found.logprobs, text: "" }, true);
  for (const span of $("seen").children) span.classList.remove("given");
  const known = found.logprobs.token_logprobs.slice(1), sum = known.reduce((a, b) => a - b, 0);
  const cut = found.cut ? `, of the first ${known.length.toLocaleString("en")}` : "";
  tell($("told"), `${(sum / known.length).toFixed(3)} nats per token${cut}`);
  draw();
}

function draw() {
  const map = $("map"), n = attention.length, context = map.getContext("2d");
  map.hidden = n === 0;
  map.width = map.height = n;
  context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--train");
  attention.forEach((row, y) => row.forEach((weight, x) => {
    context.globalAlpha = Math.sqrt(weight);
    context.fillRect(x, y, 1, 1);
  }));
}

// The colours say where the head looks from this token, and pressed again, what surprised the model. The text begins
// with <|endoftext|>, which has no span.
function attend(span) {
  const spans = [...$("seen").children], row = attention[spans.indexOf(span) + 1];
  if (span.classList.contains("on") || !row) return spans.forEach((other) => {
    other.classList.remove("on");
    colour(other, other.seen.logprob);
  });
  spans.forEach((other, i) => {
    other.classList.toggle("on", other === span);
    const share = Math.round(85 * Math.sqrt(row[i + 1] ?? 0));
    other.style.background = `color-mix(in srgb, var(--train) ${share}%, transparent)`;
  });
}

function shown(input) {
  const output = document.querySelector(`output[for=${input.id}]`);
  if (output) output.textContent = input.id === "step" ? steps[input.value]?.toLocaleString("en") : input.value;
}

async function refresh() {
  const state = await (await fetch("/api/state")).json();
  steps = state.steps;
  $("travel").hidden = steps.length < 2;
  $("step").max = Math.max(steps.length - 1, 0);
  if (!$("step").touched) $("step").value = steps.length - 1;
  shown($("step"));
}

document.querySelectorAll("input[type=range]").forEach((input) => {
  input.addEventListener("input", () => shown(input));
  shown(input);
});
$("write").onsubmit = (event) => { event.preventDefault(); write($("prompt").value); };
$("stop").onclick = () => running?.abort();
$("look").onsubmit = (event) => { event.preventDefault(); look(); };
$("layer").onchange = $("head").onchange = look;
$("step").onchange = () => { $("step").touched = true; ask(steps[$("step").value]); };
$("all").onclick = () => steps.forEach(ask);
for (const kind of ["mouseover", "click"]) {
  $("text").addEventListener(kind, (event) => { if (event.target.seen) alternatives(event.target); });
}
$("answers").addEventListener("click", (event) => { if (event.target.seen) alternatives(event.target); });
$("seen").addEventListener("click", (event) => { if (event.target.seen) attend(event.target); });
document.addEventListener("click", (event) => {
  if (!event.target.closest("#card, .tokens")) $("card").hidden = true;
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") $("card").hidden = true; });
refresh();
setInterval(refresh, 15000);
