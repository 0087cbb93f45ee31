"use strict";
/* Stages 5 to 8 of the sampling contract for a row of which the first tokens of the rank order are known one by one,
 * and of the rest only sums: the same integers as fs.filter_logits, fs.probabilities and fs.sample. Each Math.fround is
 * one rounding to binary32; masses are below 2^53, and their sums are BigInt. */

/** Thrown where an answer needs more of a row than is recorded. */
class Beyond extends Error {}

const Law = (() => {
  const f32 = Math.fround;
  const LOG2E = f32(1.44269502162933349609375), ROUND = 12582912, UNIT = 2 ** 40, GREEDY = f32(1e-5);
  const POLYNOMIAL = [0x15bba14 / 2 ** 34, 0x13cea88 / 2 ** 31, 0x1c6b752 / 2 ** 29, 0x1ebf9bc / 2 ** 27,
    0x162e42a / 2 ** 25, 1];

  // Stage 6: mass ------------------------------------------------------------------------------------------------

  const massAt = y => {
    if (!(y >= -60)) return 0;
    const n = f32(f32(y + ROUND) - ROUND), f = f32(y - n);
    let p = POLYNOMIAL[0];
    for (const c of POLYNOMIAL.slice(1)) p = f32(f32(p * f) + c);
    return Math.trunc(p * 2 ** (n + 40));
  };

  const total = (numbers, kept) => {
    let sum = 0n;
    numbers.forEach((w, i) => { if (kept[i]) sum += BigInt(w); });
    return sum;
  };

  /** A row at a temperature: masses, depths, and sums of the rest where that temperature is recorded. */
  function judged(row, temperature) {
    const scale = f32(LOG2E / temperature), at = x => f32(f32(x - row.logits[0]) * scale);
    const ys = Array.from(row.logits, at), rest = row.rest;
    const known = rest.temperatures.indexOf(temperature);
    return {
      ...row, scale, temperature,
      mass: ys.map(massAt),
      depth: ys.map(y => Math.trunc(Math.min(60, -y) * 16384)),
      restFirst: rest.count ? massAt(at(rest.first)) : 0,
      restLast: rest.count ? massAt(at(rest.last)) : 0,
      sums: rest.count === 0 ? [0n, 0n, 0n, 0n, 0n, 0n] : known < 0 ? null : rest.sums[known].map(BigInt),
      surprise: rest.count === 0 ? 0 : known < 0 ? NaN : rest.surprise[known],
    };
  }

  // Stage 7: what is kept: high < position <= low, mass >= floor ---------------------------------------------------

  const isKept = (row, kept) =>
    row.mass.map((w, i) => kept.high < i && i <= kept.low && w >= kept.floor);

  /** Which of the rest is kept: "all", "none", or "some", which is not known. A margin covers that masses of nearly
   *  equal logits may be in another order than these. */
  function restOf(row, kept) {
    const size = row.logits.length, margin = 1 + 2 ** -20;
    if (row.alive === size || kept.low < size || kept.floor > row.restFirst * margin) return "none";
    const heavy = kept.floor === 0 || kept.floor * margin <= row.restLast;
    return kept.high < size && kept.low >= row.alive - 1 && heavy ? "all" : "some";
  }

  const beyondRecorded = (row, name) =>
    new Beyond(`${name} would have to look at tokens beyond the ${row.logits.length} recorded`);

  function withoutSums(row, name) {
    const temperature = Number(row.temperature.toPrecision(7));
    return new Beyond(`${name} needs the mass of all tokens, which is not recorded for temperature ${temperature}`);
  }

  /** Z and the other sums of what is kept. */
  function sumsOf(row, kept, name) {
    const rest = restOf(row, kept), own = isKept(row, kept);
    if (rest === "some") throw beyondRecorded(row, name);
    if (rest === "all" && !row.sums) throw withoutSums(row, name);
    const sums = rest === "all" ? [...row.sums] : [0n, 0n, 0n, 0n, 0n, 0n];
    row.mass.forEach((w, i) => {
      if (!own[i] || !w) return;
      const h = BigInt(Math.floor(w / 2 ** 20)), l = BigInt(w % 2 ** 20), e = BigInt(row.depth[i]);
      [BigInt(w), h * e, l * e, h * h, h * l, l * l].forEach((part, k) => { sums[k] += part; });
    });
    const [z, eh, el, hh, hl, ll] = sums;
    return {
      rest, own, z,
      heaviest: Math.max(rest === "all" ? row.restFirst : 0, ...row.mass.filter((_, i) => own[i])),
      mean: (Number(eh) * 2 ** 20 + Number(el)) / Number(z),
      squares: (Number(hh) * 2 ** 20 + Number(2n * hl)) * 2 ** 20 + Number(ll),
    };
  }

  const above = (kept, low) => ({ ...kept, low: Math.min(kept.low, low) });
  const toMass = (kept, floor) => ({ ...kept, floor: Math.max(kept.floor, Math.trunc(floor)) });
  const count = (row, test) => row.logits.reduce((n, x) => n + (test(x) ? 1 : 0), 0);

  /** Position of the last token with x >= lowest; where that is one of the rest but not its last, any of them. */
  function lastAtLeast(row, lowest) {
    const size = row.logits.length, within = count(row, x => x >= lowest);
    if (within < size || row.alive === size || lowest > row.rest.first) return within - 1;
    return lowest <= row.rest.last ? row.alive - 1 : size;
  }

  function target(p, z) {
    const t = (BigInt(Math.trunc(p * 2 ** 30)) * z) >> 30n;
    return t > 1n ? t : 1n;
  }

  const threshold = (kept, sums, floor) => toMass(kept, Math.min(floor, sums.heaviest));

  const FILTERS = {
    top_n_sigma(kept, row, p) {
      const s = p.top_n_sigma, peak = row.logits[0];
      if (s === 0) return kept;
      const d = Array.from(row.logits, x => Math.trunc(Math.min(2 ** 20 - 1, f32(f32(peak - x) * 2048))));
      const [r1, r2] = row.rest.spread.map(BigInt);
      const d1 = d.reduce((sum, v) => sum + BigInt(v), r1), d2 = d.reduce((sum, v) => sum + BigInt(v) * BigInt(v), r2);
      const a = Number(d1) / row.alive, v = Number(d2) / row.alive - a * a;
      const sigma = Math.sqrt(Math.max(v, 0)) * 2 ** -11;
      return above(kept, lastAtLeast(row, f32(peak - f32(s * sigma))));
    },
    top_k(kept, row, p) {
      const size = row.logits.length, k = p.top_k === 0 || p.top_k > row.vocab ? row.vocab : p.top_k;
      if (p.ties === "all" && k <= size) return above(kept, lastAtLeast(row, row.logits[k - 1]));
      if (p.ties === "all" && k < row.alive) return above(kept, size);
      return above(kept, k - 1);
    },
    top_p(kept, row, p) {
      if (p.top_p === 1) return kept;
      const { own, z } = sumsOf(row, kept, "top-p"), goal = target(p.top_p, z);
      let before = 0n, last = -1;
      for (let i = 0; i < row.mass.length && before < goal; i++, last++) before += own[i] ? BigInt(row.mass[i]) : 0n;
      return above(kept, before < goal ? row.mass.length : last);
    },
    min_p(kept, row, p) {
      if (p.min_p === 0) return kept;
      const first = row.mass.filter((_, i) => kept.high < i && i <= kept.low && row.mass[i] >= kept.floor);
      if (!first.length) throw beyondRecorded(row, "min-p");
      return toMass(kept, p.min_p * Math.max(...first));
    },
    typical_p(kept, row, p) {
      if (p.typical_p === 1) return kept;
      const { own, z, mean, rest } = sumsOf(row, kept, "typical"), goal = target(p.typical_p, z);
      const mu = f32(row.logits[0] - mean * 2 ** -14 / row.scale), far = x => Math.abs(f32(x - mu));
      const distance = Array.from(row.logits, far), size = row.logits.length;
      const order = distance.map((_, i) => i).sort((i, j) => distance[i] - distance[j] || i - j);
      let running = 0n, at = -1;
      while (running < goal && at < size - 1) {
        at++;
        running += own[order[at]] ? BigInt(row.mass[order[at]]) : 0n;
      }
      const reach = distance[order[at]], unknown = row.alive > size;
      const nearest = !unknown ? Infinity : mu >= row.rest.first ? far(row.rest.first) : 0; // of the rest
      if (rest === "all" && (running < goal || reach >= nearest)) throw beyondRecorded(row, "typical");
      const high = row.logits.reduce((n, x, i) => n + (distance[i] > reach && x > mu ? 1 : 0), 0) - 1;
      const below = row.logits.reduce((n, x, i) => n + (distance[i] > reach && !(x > mu) ? 1 : 0), 0);
      const low = below > 0 || reach < nearest ? size - 1 - below : kept.low;
      return above({ ...kept, high: Math.max(kept.high, high) }, low);
    },
    epsilon_cutoff(kept, row, p) {
      if (p.epsilon_cutoff === 0) return kept;
      const sums = sumsOf(row, kept, "epsilon");
      return threshold(kept, sums, p.epsilon_cutoff * Number(sums.z));
    },
    eta_cutoff(kept, row, p) {
      const e = p.eta_cutoff;
      if (e === 0) return kept;
      const sums = sumsOf(row, kept, "eta"), typical = massAt(-f32(sums.mean * 2 ** -14));
      return threshold(kept, sums, Math.min(e * Number(sums.z), Math.sqrt(e) * typical));
    },
    top_a(kept, row, p) {
      if (p.top_a === 0) return kept;
      const sums = sumsOf(row, kept, "top-a");
      return threshold(kept, sums, (p.top_a * UNIT) * (UNIT / Number(sums.z)));
    },
    p_less(kept, row, p) {
      if (!p.p_less) return kept;
      const sums = sumsOf(row, kept, "p-less");
      return threshold(kept, sums, sums.squares / Number(sums.z));
    },
  };

  const LATER = ["epsilon_cutoff", "eta_cutoff", "top_a", "p_less"];
  const SEQUENCES = {
    top_k_first: ["top_n_sigma", "top_k", "top_p", "min_p", "typical_p", ...LATER],
    min_p_first: ["top_n_sigma", "min_p", "top_k", "top_p", "typical_p", ...LATER],
    joint: ["top_p", "top_n_sigma", "top_k", "min_p", "typical_p", ...LATER],
    temperature_last: ["top_n_sigma", "top_k", "typical_p", "top_p", "min_p", ...LATER],
  };

  /** Position of the last that XTC excludes; -1 where it excludes none. */
  function xtc(kept, row, p) {
    if (!(p.xtc_probability > 0)) return -1;
    const { own, z, rest } = sumsOf(row, kept, "XTC"), floor = Math.trunc(p.xtc_threshold * Number(z));
    if (rest === "all" && floor <= row.restFirst * (1 + 2 ** -20))
      throw beyondRecorded(row, "XTC");
    const top = row.mass.map((w, i) => own[i] && w >= floor);
    return top.filter(Boolean).length >= 2 ? top.lastIndexOf(true) - 1 : -1;
  }

  /** Numbers of kept tokens, or null where they are not known. */
  function sizeOf(row, kept) {
    const rest = restOf(row, kept);
    if (rest === "some") return null;
    return isKept(row, kept).filter(Boolean).length + (rest === "all" ? row.alive - row.logits.length : 0);
  }

  /** What is kept of a row with these parameters, and what it weighs.
   *
   * row: {vocab, alive, ids, logits, rest}: ids and logits of the first tokens of the rank order; parameters: as in
   * SamplingParams, one value each. Throws Beyond. */
  function keep(row, parameters) {
    const rounded = ([key, value]) => [key, typeof value === "number" && key !== "top_k" ? f32(value) : value];
    const p = Object.fromEntries(Object.entries(parameters).map(rounded));
    const greedy = p.temperature < GREEDY, drawnAt = greedy ? 1 : p.temperature;
    const drawn = judged(row, drawnAt), judge = p.order === "temperature_last" ? judged(row, 1) : drawn;
    const cuts = [], cutBy = Array.from(row.logits, () => null);
    const tell = (name, before, kept, left) => {
      cuts.push({ name, kept, removed: before === null || kept === null ? null : before - kept });
      left.forEach((is, i) => { if (!is && cutBy[i] === null) cutBy[i] = name; });
    };
    const none = cutBy.map(() => false), set = { kept: none.map((_, i) => i === 0), excluded: none, rest: "none" };
    if (greedy) tell("temperature", row.alive, 1, set.kept);
    else Object.assign(set, filtered(judge, p, tell));
    return { ...weigh(drawn, p, set, greedy), greedy, cuts, cutBy };
  }

  /** Which of the recorded tokens the filters keep, which of those XTC excludes at times, and which of the rest. */
  function filtered(row, p, tell) {
    let kept = { high: -1, low: row.alive - 1, floor: 0 };
    for (const name of SEQUENCES[p.order]) {
      const before = sizeOf(row, kept);
      kept = FILTERS[name](kept, row, p);
      tell(name, before, sizeOf(row, kept), isKept(row, kept));
    }
    const last = xtc(kept, row, p), rest = restOf(row, kept), all = isKept(row, kept);
    if (rest === "some") throw new Beyond(`the kept set has tokens beyond the ${row.logits.length} recorded`);
    const out = all.map((is, i) => is && i <= last), left = all.map((is, i) => is && !out[i]);
    const always = p.xtc_probability === 1, size = sizeOf(row, kept);
    if (p.xtc_probability > 0) tell("xtc_probability", size, size - out.filter(Boolean).length, always ? left : all);
    return { kept: always ? left : all, excluded: always ? out.map(() => false) : out, rest };
  }

  /** The masses that are drawn from, and the probabilities that they make. */
  function weigh(row, p, { kept, excluded, rest }, greedy) {
    if (rest === "all" && !row.sums) throw withoutSums(row, "what is drawn");
    const restMass = rest === "all" ? row.sums[0] : 0n, first = of => of.map((is, i) => is && of.indexOf(true) === i);
    if (restMass === 0n && !kept.some((is, i) => is && row.mass[i] > 0)) {
      kept = first(kept);
      excluded = kept.map(() => false);
      rest = "none";
    }
    const masses = of => {
      const w = row.mass.map((m, i) => (of[i] ? m : 0));
      return restMass > 0n || w.some(m => m > 0) ? w : first(of).map(is => (is ? UNIT : 0));
    };
    const everything = kept.map(() => true), sum = w => total(w, everything) + restMass;
    const whole = masses(kept), others = masses(kept.map((is, i) => is && !excluded[i]));
    const coin = p.xtc_probability, mixed = whole.some((w, i) => w !== others[i]);
    const z = Number(sum(whole)), zOthers = Number(sum(others));
    const exact = whole.map((w, i) => (mixed ? (1 - coin) * w / z + coin * others[i] / zOthers : w / z));
    const all = row.sums && total(row.mass, everything) + row.sums[0];
    const perMass = mixed ? (1 - coin) / z + coin / zOthers : 1 / z; // probability of the rest, whose masses are summed
    const entropyOfRest = restMass > 0n ? perMass * (row.surprise - Math.log(perMass) * Number(restMass)) : 0;
    return {
      kept, excluded, whole, others, coin, restMass,
      count: kept.filter(Boolean).length + (rest === "all" ? row.alive - kept.length : 0),
      probabilities: exact.map(f32),
      before: all && row.mass.map(w => w / Number(all)),
      filtered: Array.from(row.logits, (x, i) => (kept[i] ? f32(x / (greedy ? 1 : p.temperature)) : -Infinity)),
      keptMass: greedy ? 1 : all && Number(total(row.mass, kept) + restMass) / Number(all),
      entropy: exact.reduce((h, q) => h - (q > 0 ? q * Math.log(q) : 0), 0) + entropyOfRest,
    };
  }

  // Stage 8: the draw ------------------------------------------------------------------------------------------------

  const MASK32 = 0xffffffffn;

  /** Philox4x32-10 (Salmon et al. 2011) on four words and two of key, BigInt each. */
  function philox(counter, key) {
    let [a, b, c, d] = counter, [k, l] = key;
    for (let round = 0; round < 10; round++) {
      const p = a * 0xD2511F53n, q = c * 0xCD9E8D57n;
      [a, b, c, d] = [(q >> 32n) ^ b ^ k, q & MASK32, (p >> 32n) ^ d ^ l, p & MASK32];
      [k, l] = [(k + 0x9E3779B9n) & MASK32, (l + 0xBB67AE85n) & MASK32];
    }
    return [a, b, c, d];
  }

  function uniform60(seed, offset, index, purpose) {
    const counter = [offset & MASK32, offset >> 32n, BigInt(index), BigInt(purpose)];
    const [o0, o1] = philox(counter, [seed & MASK32, seed >> 32n]);
    return ((o0 << 32n) | o1) >> 4n;
  }

  /** The token that is drawn from what `keep` found; seed and offset are BigInt. Throws Beyond. */
  function draw(row, found, seed, offset, index = 0) {
    if (found.greedy) return { position: 0 };
    if (found.restMass > 0n) throw beyondRecorded(row, "the draw");
    const bits = uniform60(seed, offset, index, 0), toss = uniform60(seed, offset, index, 1);
    const excludes = toss < BigInt(Math.trunc(found.coin * 2 ** 60)), w = excludes ? found.others : found.whole;
    const z = w.reduce((sum, m) => sum + BigInt(m), 0n), threshold = (bits * z) >> 60n;
    let end = 0n;
    for (const i of w.map((_, i) => i).filter(i => w[i] > 0).sort((i, j) => row.ids[i] - row.ids[j])) {
      const start = end;
      end += BigInt(w[i]);
      if (end > threshold) return { position: i, bits, start, end, total: z, excludes };
    }
    throw new Error("no token: a bug");
  }

  const knows = new Set([...Object.keys(FILTERS), "temperature", "order", "ties", "xtc_probability", "xtc_threshold"]);

  return { keep, draw, knows };
})();
