"use strict";
/* The page: the text's tokens choose a step, the controls choose other parameters for it, and Law says what follows. */

(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = id => document.getElementById(id);
  const SHOWN = 24, SEEDS = 8n, WORD = 2n ** 64n;

  const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer;
  for (const step of data.steps.filter(step => step.record)) {
    const { vocab, alive, record } = step;
    const ids = new Int32Array(bytes(record.ids)), logits = new Float32Array(bytes(record.logits));
    step.known = { vocab, alive, ids, logits, texts: record.texts, rest: record.rest };
  }

  const state = { step: 0, changed: {}, seed: null, firstSeed: null, all: false };
  const current = () => data.steps[state.step];
  const parameters = () => ({ ...current().params, ...state.changed });
  const isOn = key => parameters()[key] !== data.parameters[key].neutral;

  /** Law's answer for the parameters, unless one of them is a filter that it does not have. */
  function keep(row) {
    const filters = Object.keys(data.parameters).filter(key => !data.parameters[key].edits);
    const foreign = filters.find(key => !Law.knows.has(key) && isOn(key));
    if (foreign) throw new Beyond(`this page has no filter ${label(foreign)}`);
    return Law.keep(row, parameters());
  }

  /** What `compute` returns, or {beyond: why it cannot be told}. */
  function attempt(compute) {
    try {
      return compute();
    } catch (error) {
      if (error instanceof Beyond) return { beyond: error.message };
      throw error;
    }
  }

  // Words --------------------------------------------------------------------------------------------------------

  const LABELS = {
    top_k: "top-k", top_p: "top-p", min_p: "min-p", typical_p: "typical", top_n_sigma: "top-n-sigma",
    epsilon_cutoff: "epsilon", eta_cutoff: "eta", top_a: "top-a", p_less: "p-less",
    xtc_probability: "XTC probability", xtc_threshold: "XTC threshold",
    dry_multiplier: "DRY", no_repeat_ngram_size: "no-repeat n-gram",
  };
  const label = key => LABELS[key] || key.replaceAll("_", " ");

  const SIGNS = { "\n": "↵", "\t": "⇥", "\r": "␍" };
  const visible = text => text.replace(/[\u0000-\u001f\u007f]/g, c => SIGNS[c] || "�");
  const name = (text, token) => (text ? `“${visible(text)}”` : `#${token}`);
  const wordAt = (row, at) => name(row.texts[at], row.ids[at]);
  const tokens = n => `${n.toLocaleString("en")} ${n === 1 ? "token" : "tokens"}`;
  const number = value => (value === 0 ? "0" : value >= 0.0001 ? value.toFixed(4) : value.toExponential(1));
  const missing = beyond => `Not to be told from what is recorded: ${beyond}.`;

  function share(value) {
    if (value === null) return "not recorded";
    return value > 0.9999 && value < 1 ? `1 − ${(1 - value).toExponential(1)}` : number(value);
  }

  function element(kind, text, attributes = {}, ...children) {
    const made = document.createElement(kind);
    if (text !== null) made.textContent = text;
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  // The text -----------------------------------------------------------------------------------------------------

  function buildText() {
    if (data.prompt) $("text").append(element("span", data.prompt));
    $("text").append(...data.steps.map(tokenButton));
    $("text").addEventListener("keydown", event => {
      const at = state.step, last = data.steps.length - 1;
      const keys = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: last };
      if (!(event.key in keys)) return;
      event.preventDefault();
      choose(Math.min(last, Math.max(0, keys[event.key])), true);
    });
  }

  function tokenButton(step, i) {
    const said = step.token < 0 ? "an invalid row" : name(step.text, step.token);
    const text = step.text ? step.text.replace(/\n/g, "↵\n") : step.token < 0 ? " ∅ " : ` #${step.token} `;
    const button = element("button", text, { type: "button", "aria-label": `Step ${i + 1}: ${said}`, tabindex: "-1" });
    const drawn = step.candidates.find(c => c.token === step.token);
    button.style.setProperty("--sure", drawn ? 0.05 + 0.35 * drawn.probability : 0);
    button.addEventListener("click", () => choose(i));
    return button;
  }

  function choose(i, focus = false) {
    Object.assign(state, { step: i, seed: null, firstSeed: null, all: false });
    $("text").querySelectorAll("button").forEach((button, at) => {
      button.setAttribute("aria-pressed", String(at === i));
      button.tabIndex = at === i ? 0 : -1;
      if (at === i && focus) button.focus();
    });
    $("controls").replaceChildren(...CONTROLS.map(control));
    $("seed").value = current().seed;
    $("seedError").textContent = "";
    render();
  }

  // The controls -------------------------------------------------------------------------------------------------

  const range = (from, to, by) =>
    Array.from({ length: Math.round((to - from) / by) + 1 }, (_, i) => Number((from + i * by).toFixed(4)));
  const SMALL = [
    0, 0.00001, 0.00003, 0.0001, 0.0003, 0.001, 0.002, 0.003, 0.005, 0.007, 0.01,
    0.015, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.9,
  ];
  const STOPS = {
    temperature: range(0, 2, 0.05),
    top_k: [0, ...range(1, 20, 1), ...range(25, 50, 5), ...range(60, 100, 10), 120, 150, 200, 250, 300, 400, 512],
    top_p: [0.01, ...range(0.05, 0.9, 0.05), ...range(0.91, 0.99, 0.01), 0.995, 0.999, 1],
    min_p: [...SMALL, 1],
    typical_p: [0.01, ...range(0.05, 0.95, 0.05), 0.99, 1],
    top_n_sigma: [0, ...range(0.1, 3, 0.1), 3.5, 4, 5, 6, 8],
    epsilon_cutoff: SMALL,
    eta_cutoff: SMALL,
    top_a: [...SMALL, 1],
    xtc_probability: range(0, 1, 0.05),
    xtc_threshold: [...SMALL.slice(5), 1],
  };
  const CONTROLS = [
    "temperature", "top_k", "top_p", "min_p", "typical_p", "top_n_sigma", "epsilon_cutoff", "eta_cutoff", "top_a",
    "p_less", "xtc_probability", "xtc_threshold", "order", "ties",
  ];

  function control(key) {
    const { meaning, choices } = data.parameters[key], value = parameters()[key], id = `control-${key}`;
    const box = element("div", null, { class: "control", title: meaning }, element("label", label(key), { for: id }));
    const mark = () => box.classList.toggle("changed", key in state.changed);
    const set = to => {
      state.changed[key] = to;
      if (to === current().params[key]) delete state.changed[key];
      mark();
      render();
    };
    mark();
    if (choices.length) box.append(list(id, choices, value, set));
    else if (typeof value === "boolean") box.append(check(id, value, set));
    else box.append(...slider(id, [...STOPS[key], current().params[key]], value, set));
    return box;
  }

  function list(id, choices, value, set) {
    const select = element("select", null, { id }, ...choices.map(choice => element("option", choice)));
    select.value = value;
    select.addEventListener("change", () => set(select.value));
    return select;
  }

  function check(id, value, set) {
    const box = element("input", null, { id, type: "checkbox" });
    box.checked = value;
    box.addEventListener("change", () => set(box.checked));
    return box;
  }

  function slider(id, some, value, set) {
    const stops = [...new Set([...some, value])].sort((a, b) => a - b);
    const input = element("input", null, { id, type: "range", min: 0, max: stops.length - 1, step: 1 });
    const told = element("span", null, { class: "value", "aria-hidden": "true" }); // the slider says it itself
    const tell = to => {
      told.textContent = String(to);
      input.setAttribute("aria-valuetext", String(to));
    };
    input.value = stops.indexOf(value);
    tell(value);
    input.addEventListener("input", () => {
      const to = stops[Number(input.value)];
      tell(to);
      set(to);
    });
    return [input, told];
  }

  // What follows -------------------------------------------------------------------------------------------------

  function render() {
    const step = current(), valid = step.known !== undefined;
    const drawn = valid ? name(step.text, step.token) : "an invalid row";
    $("title").textContent = `Step ${state.step + 1} of ${data.steps.length}: ${drawn}`;
    document.querySelector("aside").hidden = !valid;
    if (!valid) {
      renderInvalid(step);
      return;
    }
    const found = attempt(() => keep(step.known));
    const draw = found.beyond ? found : redraw(step, found);
    renderNews(step, found, draw);
    renderFacts(found);
    renderDraw(step, found, draw);
    renderCuts(step, found);
    renderTokens(step, found, draw);
    renderSeeds(step, found);
  }

  function renderInvalid(step) {
    say(`No token: the row has ${step.problem}.`, true);
    for (const id of ["facts", "strip", "fell"]) $(id).replaceChildren();
    $("cuts").replaceChildren(...step.edits.map(editItem));
    $("tokens").tBodies[0].replaceChildren(...step.banned.map(bannedLine));
    $("more").hidden = true;
  }

  function say(text, bad = false) {
    $("news").textContent = text;
    $("news").classList.toggle("error", bad);
  }

  /** A seed's draw. The recorded one is told as it was, also where it cannot be drawn again. */
  function redraw(step, found, seed = state.seed ?? BigInt(step.seed)) {
    const draw = attempt(() => Law.draw(step.known, found, seed, BigInt(step.offset), step.index));
    const recorded = seed === BigInt(step.seed) && Object.keys(state.changed).length === 0 && step.draw;
    if (!draw.beyond || !recorded) return draw;
    const [bits, start, end, total] = ["bits", "start", "end", "total"].map(key => BigInt(step.draw[key]));
    return { position: step.known.ids.indexOf(step.token), bits, start, end, total, excludes: step.draw.excludes };
  }

  /** The word of a draw; only the recorded draw may be of a token that is not known by its place. */
  const drawnName = (step, draw) =>
    draw.position >= 0 ? wordAt(step.known, draw.position) : name(step.text, step.token);

  function renderNews(step, found, draw) {
    if (found.beyond) {
      say(missing(found.beyond), true);
      return;
    }
    const drawn = draw.beyond ? "" : `; ${drawnName(step, draw)} is drawn`;
    say(`${tokens(found.count)} of ${step.vocab.toLocaleString("en")} can be drawn${drawn}.`);
  }

  function renderFacts(found) {
    const facts = found.beyond ? [] : [
      ["can be drawn", tokens(found.count)],
      ["their probability before", share(found.keptMass)],
      ["entropy", `${found.entropy.toFixed(3)} nats`],
      ["temperature", String(parameters().temperature)],
    ];
    $("facts").replaceChildren(...facts.map(([term, value]) =>
      element("div", null, {}, element("dt", term), element("dd", value))));
  }

  // The draw -----------------------------------------------------------------------------------------------------

  function renderDraw(step, found, draw) {
    const random = !found.beyond && !found.greedy && !draw.beyond;
    $("strip").replaceChildren(...(random ? strip(step, found, draw) : []));
    $("strip").hidden = !random;
    $("fell").textContent = found.beyond ? ""
      : found.greedy ? "Nothing is random: the most probable token is taken."
      : draw.beyond ? missing(draw.beyond) : whereItFell(step, found, draw);
  }

  const fraction = (value, total) => Number((value << 60n) / total) / 2 ** 60;

  function whereItFell(step, found, draw) {
    const u = fraction(draw.bits, 2n ** 60n).toFixed(6), word = drawnName(step, draw);
    const [start, end] = [draw.start, draw.end].map(mass => fraction(mass, draw.total).toFixed(6));
    const fell = `u = ${u} of the mass, in the order of ids, fell on ${word}, which has ${start} to ${end}.`;
    const tossed = found.coin > 0 && found.coin < 1;
    return tossed ? `${fell} XTC's coin left the top choices ${draw.excludes ? "out" : "in"}.` : fell;
  }

  /** The mass in the order of ids, and u in it; where not all of it is known, the drawn token's alone. */
  function strip(step, found, draw) {
    const row = step.known, w = draw.excludes ? found.others : found.whole;
    const mark = element("b", null);
    mark.style.left = `${100 * fraction(draw.bits, 2n ** 60n)}%`;
    if (found.restMass > 0n) {
      const piece = element("i", null, { class: "chosen lone" });
      piece.style.left = `${100 * fraction(draw.start, draw.total)}%`;
      piece.style.width = `${100 * fraction(draw.end - draw.start, draw.total)}%`;
      return [piece, mark];
    }
    const order = Array.from(row.ids.keys()).filter(i => w[i] > 0).sort((i, j) => row.ids[i] - row.ids[j]);
    const pieces = order.map(i => {
      const piece = element("i", null, { title: wordAt(row, i), class: i === draw.position ? "chosen" : "" });
      piece.style.width = `${100 * w[i] / Number(draw.total)}%`;
      return piece;
    });
    return [...pieces, mark];
  }

  // What was cut -------------------------------------------------------------------------------------------------

  function renderCuts(step, found) {
    const asDrawn = Object.keys(state.changed).length === 0;
    const cuts = asDrawn ? step.cuts : found.beyond ? [] : found.cuts.filter(cut => isOn(cut.name));
    const items = [...step.edits.map(editItem), ...cuts.map(cutItem)];
    const nothing = element("li", "Nothing: every token can be drawn.", { class: "idle" });
    $("cuts").replaceChildren(...(items.length || found.beyond ? items : [nothing]));
  }

  function editItem(edit) {
    const banned = edit.removed ? `, ${tokens(edit.removed)} banned` : "";
    return element("li", `${label(edit.name)} changed ${tokens(edit.changed)}${banned}`);
  }

  /** A cut as recorded, or as Law tells it: without a reason, and without numbers where they are not known. */
  function cutItem({ name: key, removed, kept, why = "" }) {
    const value = parameters()[key], mayLeave = key === "xtc_probability" && value < 1;
    const what = removed === null ? "cuts tokens that are not recorded"
      : removed === 0 ? "cut nothing"
      : mayLeave ? `may leave out ${tokens(removed)}` : `cut ${tokens(removed)}, left ${kept.toLocaleString("en")}`;
    const filter = value === true ? label(key) : `${label(key)} ${value}`, reason = why && removed ? ` (${why})` : "";
    return element("li", `${filter} ${what}${reason}`, { class: removed === 0 ? "idle" : "" });
  }

  // The tokens ---------------------------------------------------------------------------------------------------

  function renderTokens(step, found, draw) {
    const size = step.known.ids.length;
    const lines = Array.from({ length: state.all ? size : Math.min(SHOWN, size) }, (_, i) => i);
    if (draw.position >= lines.length) lines.push(draw.position);
    const longest = Math.max(1e-30, ...lines.flatMap(i => [chance(found.probabilities, i), chance(found.before, i)]));
    $("tokens").tBodies[0].replaceChildren(
      ...step.banned.map(bannedLine), ...lines.map(i => tokenLine(step, found, i, i === draw.position, longest)));
    $("more").hidden = size <= SHOWN;
    $("more").textContent = state.all ? `Show the first ${SHOWN}` : `Show all ${size} that are recorded`;
  }

  const chance = (of, i) => (of ? of[i] : 0);

  function tokenLine(step, found, i, chosen, longest) {
    const row = step.known, cut = !found.beyond && !found.kept[i];
    const bar = element("div", null, { class: "bar", "aria-hidden": "true" });
    for (const value of [chance(found.before, i), chance(found.probabilities, i)]) {
      const part = element("i", null);
      part.style.width = `${100 * value / longest}%`;
      bar.append(part);
    }
    const before = found.before ? number(found.before[i]) : "?";
    const drawn = found.beyond ? "?" : number(found.probabilities[i]);
    const classes = `${cut ? "cut" : ""} ${chosen ? "chosen" : ""}`;
    return tableLine(classes, String(i + 1), wordAt(row, i), titleOf(step, i), bar, before, drawn, fate(found, i));
  }

  function titleOf(step, i) {
    const { ids, logits } = step.known, told = `id ${ids[i]}, logit ${logits[i]}`;
    const edited = step.candidates.find(c => c.token === ids[i] && c.edits.length);
    return edited ? `${told}, as given ${edited.given} (${edited.edits.map(label).join(", ")})` : told;
  }

  function bannedLine({ text, token, given, cut_by: by }) {
    return tableLine("cut", "–", name(text, token), `id ${token}, logit as given ${given}`, "", "–", "0", label(by));
  }

  function tableLine(classes, rank, word, title, bar, before, drawn, by) {
    return element("tr", null, { class: classes.trim() },
      element("td", rank, { class: "late" }), element("th", word, { scope: "row", class: "name token", title }),
      element("td", null, { class: "wide" }, bar), element("td", before, { class: "late" }),
      element("td", drawn), element("td", by));
  }

  /** The filter that took a token, if one did. */
  function fate(found, i) {
    if (found.beyond) return "";
    if (found.kept[i]) return found.excluded[i] ? "XTC, at times" : "";
    const by = found.cutBy[i];
    return by === null ? "no mass left" : by === "xtc_probability" ? "XTC" : label(by);
  }

  // Seeds --------------------------------------------------------------------------------------------------------

  const firstSeed = () => state.firstSeed ?? state.seed ?? BigInt(current().seed);

  function renderSeeds(step, found) {
    const seeds = Array.from({ length: Number(SEEDS) }, (_, i) => (firstSeed() + BigInt(i)) % WORD);
    $("seeds").replaceChildren(...seeds.map(seed => {
      const draw = found.beyond ? found : redraw(step, found, seed);
      const word = draw.beyond ? "not recorded" : drawnName(step, draw);
      return element("li", null, {}, element("span", String(seed)), element("span", word, { class: "token" }));
    }));
  }

  function setSeed(text) {
    const value = /^-?\d{1,20}$/.test(text) ? BigInt(text) : WORD;
    const good = -WORD / 2n <= value && value < WORD;
    $("seedError").textContent = good ? "" : `seed = ${text}: expected a 64-bit integer, -2^63 <= value < 2^64`;
    if (!good) return;
    state.seed = (value + WORD) % WORD;
    state.firstSeed = null;
    render();
  }

  $("seed").addEventListener("change", event => setSeed(event.target.value.trim()));
  $("controls").addEventListener("submit", event => event.preventDefault());
  $("next").addEventListener("click", () => {
    state.firstSeed = (firstSeed() + SEEDS) % WORD;
    render();
  });
  $("reset").addEventListener("click", () => {
    state.changed = {};
    choose(state.step);
  });
  $("more").addEventListener("click", () => {
    state.all = !state.all;
    render();
  });

  window.steps = data.steps; // for whoever opens the console
  buildText();
  if (data.steps.length) choose(0);
  else say("There are no rows.", true);
})();
