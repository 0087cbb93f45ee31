"use strict";
/* The page: the text's tokens choose a step, the controls choose other parameters for it, and Law says what follows. */

(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = id => document.getElementById(id);
  const SHOWN = 24, SEEDS = 8n, WORD = 2n ** 64n;

  const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer;
  for (const step of data.steps) {
    if (!step.record) continue;
    const { ids, logits, texts, rest } = step.record;
    step.known = { vocab: step.vocab, alive: step.alive, ids: new Int32Array(bytes(ids)), logits: new Float32Array(bytes(logits)), texts, rest };
  }

  /* What can be tried, and the stops of each slider. */
  const range = (from, to, by) => Array.from({ length: Math.round((to - from) / by) + 1 }, (_, i) => Number((from + i * by).toFixed(4)));
  const SMALL = [0, 0.00001, 0.00003, 0.0001, 0.0003, 0.001, 0.002, 0.003, 0.005, 0.007, 0.01, 0.015, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.9];
  const STOPS = {
    temperature: range(0, 2, 0.05),
    top_k: [0, ...range(1, 20, 1), 25, 30, 35, 40, 45, 50, 60, 70, 80, 90, 100, 120, 150, 200, 250, 300, 400, 512],
    top_p: [0.01, ...range(0.05, 0.9, 0.05), ...range(0.91, 0.99, 0.01), 0.995, 0.999, 1],
    min_p: [...SMALL, 1],
    typical_p: [0.01, ...range(0.05, 0.95, 0.05), 0.99, 1],
    top_n_sigma: [0, ...range(0.1, 3, 0.1), 3.5, 4, 5, 6, 8],
    epsilon_cutoff: SMALL, eta_cutoff: SMALL,
    top_a: [...SMALL, 1],
    xtc_probability: range(0, 1, 0.05),
    xtc_threshold: [...SMALL.slice(5), 1],
  };
  const CONTROLS = [...Object.keys(STOPS).slice(0, 9), "p_less", "xtc_probability", "xtc_threshold", "order", "ties"];
  const LABELS = { top_k: "top-k", top_p: "top-p", min_p: "min-p", typical_p: "typical", top_n_sigma: "top-n-sigma", epsilon_cutoff: "epsilon",
    eta_cutoff: "eta", top_a: "top-a", p_less: "p-less", xtc_probability: "XTC probability", xtc_threshold: "XTC threshold", xtc: "XTC",
    repetition_penalty: "repetition penalty", frequency_penalty: "frequency penalty", presence_penalty: "presence penalty",
    dry_multiplier: "DRY", no_repeat_ngram_size: "no-repeat n-gram" };
  const label = name => LABELS[name] || name;

  const state = { step: 0, changed: {}, seed: null, firstSeed: null, all: false };
  const current = () => data.steps[state.step];
  const parameters = () => ({ ...current().params, ...state.changed });
  const tried = () => Object.keys(state.changed).length > 0 || state.seed !== null;

  /* Words ---------------------------------------------------------------------------------------------------------- */

  const plain = { "\n": "↵", "\t": "⇥", "\r": "␍" };
  const visible = text => text.replace(/[\n\t\r]/g, c => plain[c]).replace(/[\u0000-\u001f\u007f]/g, "�");
  const name = (text, token) => (text === null || text === undefined || text === "" ? `#${token}` : `“${visible(text)}”`);
  const wordAt = (row, at) => name(row.texts[at], row.ids[at]);
  const number = value => (value === 0 ? "0" : value >= 0.0001 ? value.toFixed(4) : value.toExponential(1));
  const share = value => (value === null || Number.isNaN(value) ? "not recorded" : value > 0.9999 && value < 1 ? `1 − ${(1 - value).toExponential(1)}` : number(value));
  const tokens = n => `${n.toLocaleString("en")} ${n === 1 ? "token" : "tokens"}`;

  function element(kind, text, attributes = {}) {
    const made = document.createElement(kind);
    if (text !== null) made.textContent = text;
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  }

  /* The text --------------------------------------------------------------------------------------------------------- */

  function buildText() {
    const text = $("text");
    if (data.prompt) text.append(element("span", data.prompt));
    data.steps.forEach((step, i) => {
      const lone = step.token < 0 ? "∅" : step.text === null || step.text === "" ? ` #${step.token} ` : step.text.replace(/\n/g, "↵\n");
      const sure = step.candidates.find(c => c.token === step.token);
      const said = step.token < 0 ? "invalid row" : name(step.text, step.token);
      const button = element("button", lone, { type: "button", "aria-label": `Step ${i + 1}: ${said}`, tabindex: "-1" });
      button.style.setProperty("--sure", sure ? 0.05 + 0.35 * sure.probability : 0);
      button.addEventListener("click", () => choose(i));
      text.append(button);
    });
    text.addEventListener("keydown", event => {
      const last = data.steps.length - 1;
      const to = { ArrowRight: state.step + 1, ArrowDown: state.step + 1, ArrowLeft: state.step - 1, ArrowUp: state.step - 1, Home: 0, End: last }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      choose(Math.min(last, Math.max(0, to)), true);
    });
  }

  function choose(i, focus = false) {
    state.step = i;
    state.seed = state.firstSeed = null;
    state.all = false;
    $("text").querySelectorAll("button").forEach((button, at) => {
      button.setAttribute("aria-pressed", String(at === i));
      button.tabIndex = at === i ? 0 : -1;
      if (at === i && focus) button.focus();
    });
    buildControls();
    render();
  }

  /* The controls ------------------------------------------------------------------------------------------------------ */

  function buildControls() {
    $("controls").replaceChildren(...CONTROLS.map(control));
    $("seed").value = current().seed;
  }

  function control(key) {
    const box = element("div", null, { class: "control" }), id = `control-${key}`, drawn = current().params[key];
    const value = parameters()[key], { meaning, choices } = data.parameters[key];
    const set = (to, output) => {
      if (to === current().params[key]) delete state.changed[key]; else state.changed[key] = to;
      box.classList.toggle("changed", key in state.changed);
      if (output) output.textContent = String(to);
      render();
    };
    box.classList.toggle("changed", key in state.changed);
    box.title = meaning;
    box.append(element("label", label(key), { for: id }));
    if (choices.length) {
      const select = element("select", null, { id });
      select.append(...choices.map(choice => element("option", choice, { value: choice })));
      select.value = value;
      select.addEventListener("change", () => set(select.value));
      box.append(select);
    } else if (typeof drawn === "boolean") {
      const check = element("input", null, { id, type: "checkbox" });
      check.checked = value;
      check.addEventListener("change", () => set(check.checked));
      box.append(check);
    } else {
      const stops = [...new Set([...STOPS[key], drawn, value])].sort((a, b) => a - b);
      const slider = element("input", null, { id, type: "range", min: 0, max: stops.length - 1, step: 1 });
      const output = element("span", String(value), { class: "value", "aria-hidden": "true" });  // the slider itself says it
      slider.value = stops.indexOf(value);
      slider.setAttribute("aria-valuetext", String(value));
      slider.addEventListener("input", () => {
        const to = stops[Number(slider.value)];
        slider.setAttribute("aria-valuetext", String(to));
        set(to, output);
      });
      box.append(output, slider);
    }
    return box;
  }

  /* What follows -------------------------------------------------------------------------------------------------------- */

  function render() {
    const step = current();
    $("title").textContent = `Step ${state.step + 1} of ${data.steps.length}: ${step.token < 0 ? "an invalid row" : name(step.text, step.token)}`;
    const valid = step.known !== undefined;
    document.querySelector("aside").hidden = !valid;
    if (!valid) return renderInvalid(step);
    let found = null, beyond = null;
    try { found = Law.keep(step.known, parameters()); } catch (error) { if (!(error instanceof Beyond)) throw error; beyond = error.message; }
    const draw = found ? redraw(step, found) : { beyond };
    renderNews(step, found, draw, beyond);
    renderFacts(step, found, beyond);
    renderDraw(step, found, draw);
    renderCuts(step, found);
    renderTokens(step, found, draw);
    renderSeeds(step, found);
  }

  /** The draw of the chosen seed; the recorded one where nothing was changed. */
  function redraw(step, found, seed = state.seed ?? BigInt(step.seed)) {
    try { return Law.draw(step.known, found, seed, BigInt(step.offset), step.index); } catch (error) {
      if (!(error instanceof Beyond)) throw error;
      if (tried() || seed !== BigInt(step.seed) || !step.draw) return { beyond: error.message };
      const { bits, start, end, total, excludes } = step.draw;
      const at = step.known.ids.indexOf(step.token);
      return { position: at, token: step.token, bits: BigInt(bits), start: BigInt(start), end: BigInt(end), total: BigInt(total), excludes: excludes === "True" };
    }
  }

  const drawnName = (step, draw) => (draw.position >= 0 ? wordAt(step.known, draw.position) : name(step.text, step.token));

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

  function renderNews(step, found, draw, beyond) {
    if (beyond) return say(`Not to be told from what is recorded: ${beyond}.`, true);
    const drawn = draw.beyond ? "" : `; ${drawnName(step, draw)} is drawn`;
    say(`${tokens(found.count)} of ${step.vocab.toLocaleString("en")} can be drawn${drawn}.`);
  }

  function renderFacts(step, found, beyond) {
    const facts = beyond ? [] : [
      ["can be drawn", tokens(found.count)],
      ["their probability before", share(found.keptMass)],
      ["entropy", `${found.entropy.toFixed(3)} nats`],
      ["temperature", String(parameters().temperature)],
    ];
    $("facts").replaceChildren(...facts.map(([term, value]) => {
      const box = element("div", null);
      box.append(element("dt", term), element("dd", value));
      return box;
    }));
  }

  function renderDraw(step, found, draw) {
    const strip = $("strip");
    strip.replaceChildren();
    strip.hidden = !found || found.greedy || draw.beyond !== undefined;
    if (!found) return void ($("fell").textContent = "");
    if (found.greedy) return void ($("fell").textContent = "Nothing is random: the most probable token is taken.");
    if (draw.beyond) return void ($("fell").textContent = `Not to be told from what is recorded: ${draw.beyond}.`);
    const part = value => Number((value << 60n) / draw.total) / 2 ** 60, u = Number(draw.bits) / 2 ** 60;
    const w = draw.excludes ? found.others : found.whole;
    if (found.restMass === 0n) {
      const order = w.map((_, i) => i).filter(i => w[i] > 0).sort((i, j) => step.known.ids[i] - step.known.ids[j]);
      strip.append(...order.map(i => {
        const piece = element("i", null, { title: wordAt(step.known, i), ...(i === draw.position ? { class: "chosen" } : {}) });
        piece.style.width = `${100 * w[i] / Number(draw.total)}%`;
        return piece;
      }));
    } else {
      const piece = element("i", null, { class: "chosen" });
      piece.style.cssText = `position: absolute; left: ${100 * part(draw.start)}%; width: max(3px, ${100 * part(draw.end - draw.start)}%)`;
      strip.append(piece);
    }
    const mark = element("b", null);
    mark.style.left = `${100 * u}%`;
    strip.append(mark);
    const coin = found.coin > 0 && found.coin < 1 ? ` XTC's coin ${draw.excludes ? "left the top choices out" : "left the top choices in"}.` : "";
    $("fell").textContent = `u = ${u.toFixed(6)} of the mass, in the order of ids, fell on ${drawnName(step, draw)}, which has ${part(draw.start).toFixed(6)} to ${part(draw.end).toFixed(6)}.${coin}`;
  }

  function editItem(edit) {
    const removed = edit.removed ? `, ${tokens(edit.removed)} banned` : "";
    return element("li", `${label(edit.name)} changed ${tokens(edit.changed)}${removed}`);
  }

  function renderCuts(step, found) {
    const edits = step.edits.map(editItem), asDrawn = Object.keys(state.changed).length === 0;
    const cuts = asDrawn ? step.cuts.map(cut => [cut.name, cut.value, cut.removed, cut.kept, cut.why])
      : (found ? found.cuts : []).filter(cut => isOn(cut.name)).map(cut => [cut.name, parameters()[cut.name], cut.before === null || cut.kept === null ? null : cut.before - cut.kept, cut.kept, ""]);
    const lines = cuts.map(([key, value, removed, kept, why]) => {
      const what = removed === null ? "cuts tokens that are not recorded" : removed === 0 ? "cut nothing" : key === "xtc_probability" && value !== 1 ? `may leave out ${tokens(removed)}` : `cut ${tokens(removed)}, left ${kept.toLocaleString("en")}`;
      return element("li", `${label(key)}${value === true ? "" : ` ${value}`} ${what}${why && removed ? ` (${why})` : ""}`, removed === 0 ? { class: "idle" } : {});
    });
    const all = [...edits, ...lines];
    $("cuts").replaceChildren(...(all.length ? all : [element("li", "Nothing: every token can be drawn.", { class: "idle" })]));
  }

  const NEUTRAL = { top_k: 0, top_p: 1, min_p: 0, typical_p: 1, top_n_sigma: 0, epsilon_cutoff: 0, eta_cutoff: 0, top_a: 0, p_less: false, xtc_probability: 0 };
  const isOn = key => parameters()[key] !== NEUTRAL[key];

  function renderTokens(step, found, draw) {
    const row = step.known, size = row.ids.length, shown = state.all ? size : Math.min(SHOWN, size);
    const lines = Array.from({ length: shown }, (_, i) => i);
    if (draw.position >= shown) lines.push(draw.position);
    const before = found ? found.before : null;
    const longest = found ? Math.max(...lines.map(i => Math.max(found.probabilities[i], before ? before[i] : 0)), 1e-30) : 1;
    const edited = Object.fromEntries(step.candidates.filter(c => c.edits.length).map(c => [c.token, c]));
    $("tokens").tBodies[0].replaceChildren(...step.banned.map(bannedLine), ...lines.map(i => tokenLine(i)));
    $("more").hidden = size <= SHOWN;
    $("more").textContent = state.all ? `Show the first ${SHOWN}` : `Show all ${size} that are recorded`;

    function tokenLine(i) {
      const p = found ? found.probabilities[i] : null, kept = found && found.kept[i];
      const classes = [found && !kept ? "cut" : "", i === draw.position ? "chosen" : ""].join(" ").trim();
      const line = element("tr", null, classes ? { class: classes } : {});
      const bar = element("div", null, { class: "bar", "aria-hidden": "true" });
      for (const value of [before ? before[i] : 0, p || 0]) {
        const part = element("i", null);
        part.style.width = `${100 * value / longest}%`;
        bar.append(part);
      }
      const cell = element("td", null, { class: "wide" });
      cell.append(bar);
      const edit = edited[row.ids[i]];
      const title = `id ${row.ids[i]}, logit ${row.logits[i]}${edit ? `, as given ${edit.given}: ${edit.edits.map(label).join(", ")}` : ""}`;
      line.append(element("td", String(i + 1), { class: "late" }), element("th", wordAt(row, i), { scope: "row", class: "name token", title }), cell,
        element("td", before ? number(before[i]) : "?", { class: "late" }), element("td", p === null ? "?" : number(p)),
        element("td", found ? fate(found, i) : ""));
      return line;
    }
  }

  function bannedLine(banned) {
    const line = element("tr", null, { class: "cut" });
    line.append(element("td", "–", { class: "late" }), element("th", name(banned.text, banned.token), { scope: "row", class: "name token", title: `id ${banned.token}, logit as given ${banned.given}` }),
      element("td", null, { class: "wide" }), element("td", "–", { class: "late" }), element("td", "0"), element("td", label(banned.cut_by)));
    return line;
  }

  /** The filter that took a token, if one did. */
  function fate(found, i) {
    if (found.kept[i]) return found.excluded[i] ? "XTC, at times" : "";
    const by = found.cutBy[i];
    return by === null ? "no mass left" : label(by === "xtc_probability" ? "xtc" : by);
  }

  function renderSeeds(step, found) {
    const first = state.firstSeed ?? (state.seed ?? BigInt(step.seed));
    const lines = Array.from({ length: Number(SEEDS) }, (_, i) => (first + BigInt(i)) % WORD).map(seed => {
      const line = element("li", null);
      const draw = found ? redraw(step, found, seed) : { beyond: true };
      line.append(element("span", String(seed)), element("span", draw.beyond ? "not recorded" : drawnName(step, draw), { class: "token" }));
      return line;
    });
    $("seeds").replaceChildren(...lines);
    $("next").disabled = !found;
  }

  function setSeed(text) {
    const good = /^-?\d{1,20}$/.test(text.trim());
    const value = good ? BigInt(text.trim()) : 0n;
    const bad = !good || value >= WORD || value < -(WORD / 2n);
    $("seedError").textContent = bad ? `seed = ${text}: expected a 64-bit integer, -2^63 <= value < 2^64` : "";
    if (bad) return;
    state.seed = ((value % WORD) + WORD) % WORD;
    if (state.seed === BigInt(current().seed)) state.seed = null;
    state.firstSeed = null;
    render();
  }

  $("seed").addEventListener("change", event => setSeed(event.target.value));
  $("controls").addEventListener("submit", event => event.preventDefault());
  $("next").addEventListener("click", () => {
    state.firstSeed = ((state.firstSeed ?? state.seed ?? BigInt(current().seed)) + SEEDS) % WORD;
    render();
  });
  $("reset").addEventListener("click", () => {
    state.changed = {};
    $("seedError").textContent = "";
    choose(state.step);
  });
  $("more").addEventListener("click", () => { state.all = !state.all; render(); });

  window.steps = data.steps;  // for whoever opens the console
  buildText();
  if (data.steps.length) choose(0); else say("There are no rows.", true);
})();
