"use strict";
(() => {
  const DATA = JSON.parse(document.getElementById("data").textContent);
  const { runs, groups, map } = DATA;
  const LEVELS = __LEVELS__, MISSING = 65535, NOT_FINITE = 65534, RANKED = 10, LEAST = 3, WIDEST = 3;
  const $ = (id) => document.getElementById(id);
  const groupOf = runs.map((_, run) => groups.findIndex((group) => group.runs.includes(run)));

  // ---- small things: elements, numbers, marks. Text is always set as text, never parsed. ----
  function el(tag, properties = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name === "class") node.className = value;
      else if (name === "text") node.textContent = value;
      else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else node.setAttribute(name, value);
    }
    node.append(...children.filter((child) => child !== null && child !== undefined));
    return node;
  }
  function svg(tag, attributes = {}, ...children) {
    const node = document.createElementNS($("drawing").namespaceURI, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  }
  const DASHES = ["", "6 3", "2 3", "9 3 2 3", "", "6 3", "2 3", "9 3 2 3"];
  function shape(group, x, y, r) {
    const kinds = [
      () => svg("circle", { cx: x, cy: y, r }),
      () => svg("rect", { x: x - r * 0.9, y: y - r * 0.9, width: r * 1.8, height: r * 1.8 }),
      () => svg("path", { d: `M${x} ${y - r * 1.15}l${r * 1.1} ${r * 2}h${-r * 2.2}z` }),
      () => svg("path", { d: `M${x} ${y - r * 1.3}l${r * 1.3} ${r * 1.3}l${-r * 1.3} ${r * 1.3}l${-r * 1.3} ${-r * 1.3}z` }),
      () => svg("path", { d: `M${x} ${y + r * 1.15}l${r * 1.1} ${-r * 2}h${-r * 2.2}z` }),
    ];
    const node = kinds[group % kinds.length]();
    node.style.fill = `var(--g${group % 8})`;
    return node;
  }
  function mark(group) {
    return svg("svg", { class: "mark", viewBox: "0 0 12 12", "aria-hidden": "true" }, shape(group, 6, 6, 4.6));
  }
  const places = (x, n) => (Number.isFinite(x) ? x.toFixed(n).replace("-", "−") : x === Infinity ? "not finite" : "–");
  const count = (n) => n.toLocaleString("en-US");
  const percent = (x) => (Number.isFinite(x) ? `${x >= 0.1 ? (100 * x).toFixed(1) : +(100 * x).toPrecision(2)}%` : "–");
  function brief(x) {
    const size = Math.abs(x);
    if (size >= 1e6) return `${+(x / 1e6).toPrecision(3)}M`;
    if (size >= 1e4) return `${+(x / 1e3).toPrecision(3)}k`;
    return `${+x.toPrecision(4)}`.replace("-", "−");
  }
  const visible = (text) => text.replace(/\r/g, "␍").replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/ /g, "·");
  const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;

  // ---- packed numbers ----
  async function unpack(packed) {
    const bytes = Uint8Array.from(atob(packed.data), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    const planes = new Uint8Array(await new Response(stream).arrayBuffer());
    const n = planes.length / 2, codes = new Uint16Array(n);
    for (let i = 0; i < n; i++) codes[i] = planes[i] | (planes[n + i] << 8);
    const unit = 10 ** packed.places;
    return {
      codes,
      at(i) {
        const code = codes[i];
        return code === MISSING ? NaN : code === NOT_FINITE ? Infinity : (packed.low + code) / unit;
      },
    };
  }
  const blobs = new Map();
  function blob(number) {
    if (!blobs.has(number)) blobs.set(number, unpack(map.blobs[number]));
    return blobs.get(number);
  }

  // ---- head of the page ----
  const labels = groups.map((group) => group.label);
  const title = labels.length > 4 ? `${labels.length} groups of runs` : labels.join(", ").replace(/, ([^,]*)$/, " and $1");
  $("title").textContent = title;
  $("about").textContent = [
    plural(runs.length, "run"),
    map ? `${plural(map.starts.length - 1, "piece")} of validation documents, ${count(map.starts[map.starts.length - 1])} tokens` : "no token map",
    DATA.left ? `shown: ${DATA.left}` : "",
    `made ${DATA.made}`,
  ].filter(Boolean).join(" · ");
  $("foot").textContent = `${DATA.command}`;

  function drawRuns() {
    const heads = Math.max(...runs.map((run) => run.heads));
    const header = el("tr", {}, el("th", { text: "run", class: "text", scope: "col" }), el("th", { text: "algorithm", class: "text", scope: "col" }));
    for (const name of ["seed", "steps", "bits per byte", "effective samples"]) header.append(el("th", { text: name, scope: "col" }));
    for (let k = 0; k < heads; k++) header.append(el("th", { text: `head ${k}, nats`, scope: "col" }));
    header.append(el("th", { text: "not there yet", class: "text", scope: "col" }));
    const body = el("tbody");
    runs.forEach((run, number) => {
      const row = el("tr", {}, el("th", { scope: "row" }, mark(groupOf[number]), run.name), el("td", { class: "text", text: groups[groupOf[number]].label }));
      const last = (name, n) => el("td", { text: name in run.last ? places(run.last[name] ?? NaN, n) : "–" });
      row.append(el("td", { text: run.seed }), el("td", { text: run.step === null ? "–" : count(run.step) }));
      row.append(last("eval/bits_per_byte", 3), last("train/effective_sample_fraction", 2));
      for (let k = 0; k < heads; k++) row.append(last(`eval/ce_head_${k}`, 3));
      row.append(el("td", { class: "missing", text: run.missing.join(", ") || "–" }));
      body.append(row);
    });
    $("run-table").append(el("caption", { text: "Held out, at the last evaluation; unweighted." }), el("thead", {}, header), body);
  }

  // ---- the token map ----
  const state = { head: 0, step: 0, shade: "weight", document: 0, token: 1, runs: [] }; // a document's first token is no target
  const SHADES = {
    weight: "weight", loss: "loss, nats", reference_loss: "reference loss, nats", excess: "excess loss, nats",
    reference_entropy: "reference entropy, nats", probability: "probability", value: "value",
  };
  let tokens, kinds, shown = [], drawing = 0; // shown: [{run, step, data, spans, note}]

  const mapped = () => runs.map((_, run) => run).filter((run) => Object.keys(map.entries[run]).length);
  const heads = () => Math.max(...mapped().map((run) => runs[run].heads));
  const total = () => map.starts[map.starts.length - 1];
  function stepOf(run) {
    // A run that wasn't looked at after this very step is shown as it was at the step before.
    const own = Object.keys(map.entries[run]).map(Number);
    const before = own.filter((step) => step <= map.steps[state.step]);
    return before.length ? Math.max(...before) : Math.min(...own);
  }
  async function load(run) {
    const step = stepOf(run), names = Object.entries(map.entries[run][step]);
    const data = Object.fromEntries(await Promise.all(names.map(async ([name, number]) => [name, await blob(number)])));
    return { run, step, data };
  }
  function quantity(one, name, token, head) {
    const { data } = one, n = total(), read = (which) => (data[which] && head < runs[one.run].heads ? data[which].at(head * n + token) : NaN);
    if (name === "value") return data.value ? data.value.at(token) : NaN;
    if (name === "probability") return Math.exp(-read("loss"));
    if (name === "excess") return read("loss") - read("reference_loss");
    return read(name);
  }
  function domain(name) {
    if (name === "probability") return [0, 1];
    if (name === "excess") return map.domains.reference_loss ? [-map.domains.loss[1] / 2, map.domains.loss[1] / 2] : [0, 1];
    return map.domains[name] ?? [0, 1];
  }
  function level(value, [low, high]) {
    if (Number.isNaN(value)) return -1;
    return Math.max(0, Math.min(LEVELS - 1, Math.round(((value - low) / (high - low)) * (LEVELS - 1))));
  }

  function setUpMap() {
    const most = heads();
    $("head").max = most - 1;
    $("step").max = map.steps.length - 1;
    $("step").value = state.step = map.steps.length - 1;
    const known = new Set(Object.keys(map.domains));
    if (known.has("reference_loss")) known.add("excess");
    known.add("probability");
    for (const [name, label] of Object.entries(SHADES)) if (known.has(name)) $("shade").append(el("option", { value: name, text: label }));
    for (let number = 0; number < map.starts.length - 1; number++) {
      const size = map.starts[number + 1] - map.starts[number];
      let first = "";
      for (let i = map.starts[number]; i < map.starts[number + 1] && first.trim().length < 40; i++) first += map.texts[tokens.codes[i]];
      $("document").append(el("option", { value: number, text: `${number + 1} · ${first.trim().replace(/\s+/g, " ").slice(0, 40)} · ${plural(size, "token")}` }));
    }
    const all = mapped(), firsts = groups.map((group) => group.runs.find((run) => all.includes(run))).filter((run) => run !== undefined);
    state.runs = firsts.slice(0, innerWidth < 700 ? 2 : WIDEST);
    for (const run of all) {
      const box = el("input", { type: "checkbox", value: run });
      box.checked = state.runs.includes(run);
      box.addEventListener("change", () => {
        const chosen = [...$("chosen").querySelectorAll("input:checked")].map((input) => +input.value);
        if (!chosen.length) box.checked = true; // one stays
        else { state.runs = chosen; build(); }
      });
      const named = groups[groupOf[run]].runs.length > 1 || groups[groupOf[run]].label !== runs[run].name;
      $("chosen").append(el("label", {}, box, mark(groupOf[run]), named ? `${groups[groupOf[run]].label} · ${runs[run].name}` : runs[run].name));
    }
    for (let i = 0; i < LEVELS; i++) $("scale").append(el("i", { class: `w${i}` }));
    $("head").addEventListener("input", () => { state.head = +$("head").value; paint(); });
    $("step").addEventListener("input", () => { state.step = +$("step").value; repaint(); });
    $("shade").addEventListener("change", () => { state.shade = $("shade").value; paint(); });
    $("document").addEventListener("change", () => go(+$("document").value));
    $("previous").addEventListener("click", () => go(state.document - 1));
    $("next").addEventListener("click", () => go(state.document + 1));
  }
  function go(number, token = 1, focus = false) {
    state.document = Math.max(0, Math.min(map.starts.length - 2, number));
    state.token = token;
    $("document").value = state.document;
    return build(focus);
  }

  async function build(focus = false) {
    const mine = ++drawing;
    const loaded = await Promise.all(state.runs.map(load));
    if (mine !== drawing) return;
    shown = loaded;
    const start = map.starts[state.document], size = map.starts[state.document + 1] - start;
    state.token = Math.min(state.token, size - 1);
    $("previous").disabled = state.document === 0;
    $("next").disabled = state.document === map.starts.length - 2;
    $("panels").replaceChildren();
    for (const one of shown) {
      const code = el("div", { class: "code", role: "listbox", "aria-orientation": "horizontal", "aria-label": `Tokens of document ${state.document + 1}, ${runs[one.run].name}` });
      one.spans = [];
      for (let i = 0; i < size; i++) {
        const text = map.texts[tokens.codes[start + i]];
        const span = el("span", { role: "option", tabindex: i === state.token ? 0 : -1, text, "aria-selected": i === state.token });
        span.dataset.token = i;
        one.spans.push(span);
        code.append(span);
      }
      code.addEventListener("pointerover", (event) => { if (event.target.dataset.token) choose(+event.target.dataset.token); });
      code.addEventListener("focusin", (event) => { if (event.target.dataset.token) choose(+event.target.dataset.token, event.target); });
      code.addEventListener("keydown", (event) => move(event, one));
      one.note = el("p");
      one.code = code;
      $("panels").append(el("article", { class: "panel" }, el("header", {}, el("h3", {}, mark(groupOf[one.run]), groups[groupOf[one.run]].label), el("span", { class: "unit", text: runs[one.run].name }), one.note), code));
    }
    paint();
    choose(state.token);
    if (focus && shown[0].spans[state.token]) {
      shown[0].spans[state.token].focus({ preventScroll: true });
      shown[0].spans[state.token].scrollIntoView({ block: "center" });
    }
  }
  async function repaint() {
    const mine = ++drawing;
    const loaded = await Promise.all(state.runs.map(load));
    if (mine !== drawing) return;
    shown.forEach((one, i) => Object.assign(one, loaded[i]));
    paint();
  }
  function paint() {
    const range = domain(state.shade), start = map.starts[state.document];
    for (const one of shown) {
      let sum = 0, n = 0;
      one.spans.forEach((span, i) => {
        const shade = level(quantity(one, state.shade, start + i, state.head), range);
        const line = map.texts[tokens.codes[start + i]].startsWith("\n") ? " line" : "";
        span.className = (shade < 0 ? "none" : `w${shade}`) + line + (i === state.token ? " twin" : "");
        const weight = quantity(one, "weight", start + i, state.head);
        if (Number.isFinite(weight)) { sum += weight; n += 1; }
      });
      one.note.textContent = `step ${count(one.step)} · mean weight here ${n ? places(sum / n, 2) : "–"}`;
    }
    const ahead = state.head + 1;
    $("head-out").textContent = `head ${state.head}, ${ahead === 1 ? "the next token" : `${ahead} tokens ahead`}`;
    $("step-out").textContent = `${count(map.steps[state.step])}`;
    $("low").textContent = brief(range[0]);
    $("high").textContent = brief(range[1]) + (["probability"].includes(state.shade) ? "" : " and more");
    $("scale").setAttribute("aria-label", `From pale, ${brief(range[0])}, to dark or bright, ${brief(range[1])}`);
    $("legend-text").textContent = `${SHADES[state.shade]} · grey text: no target of this head`;
    tell();
    rank();
  }
  function choose(token, focused = null) {
    for (const one of shown) {
      const before = one.spans[state.token], now = one.spans[token];
      before.classList.remove("twin"); before.tabIndex = -1; before.setAttribute("aria-selected", "false");
      now.classList.add("twin"); now.tabIndex = 0; now.setAttribute("aria-selected", "true");
    }
    state.token = token;
    tell();
    if (focused) {
      const one = shown.find((each) => each.spans[token] === focused);
      focused.setAttribute("aria-label", one ? spoken(one) : "");
    }
  }
  function move(event, one) {
    const at = state.token, last = one.spans.length - 1;
    let to = null;
    if (event.key === "ArrowRight") to = Math.min(last, at + 1);
    else if (event.key === "ArrowLeft") to = Math.max(0, at - 1);
    else if (event.key === "Home") to = 0;
    else if (event.key === "End") to = last;
    else if (event.key === "ArrowDown" || event.key === "ArrowUp") to = beside(one, at, event.key === "ArrowDown" ? 1 : -1);
    if (to === null) return;
    event.preventDefault();
    one.spans[to].focus();
  }
  function beside(one, at, way) {
    const place = (i) => { const boxes = one.spans[i].getClientRects(); return boxes.length ? boxes[0] : one.spans[i].getBoundingClientRect(); };
    const here = place(at);
    let best = null, line = null;
    for (let i = at + way; i >= 0 && i < one.spans.length; i += way) {
      const box = place(i);
      if (Math.abs(box.top - here.top) < 4) continue;
      if (line === null) line = box.top;
      if (Math.abs(box.top - line) >= 4) break;
      const far = Math.abs(box.left - here.left);
      if (best === null || far < best.far) best = { i, far };
    }
    return best === null ? at : best.i;
  }
  const COLUMNS = [["weight", "weight", 3], ["loss", "loss", 3], ["reference_loss", "reference loss", 3], ["excess", "excess", 3], ["reference_entropy", "reference entropy", 3], ["probability", "probability", -1], ["value", "value", 3]]
    .filter(([name]) => name !== "reference_entropy" || map?.domains.reference_entropy);
  function numbers(one) {
    const token = map.starts[state.document] + state.token;
    return COLUMNS.map(([name, label, n]) => {
      const value = quantity(one, name, token, state.head);
      return [name, label, n < 0 ? percent(value) : places(value, n)];
    });
  }
  function spoken(one) {
    const token = map.starts[state.document] + state.token;
    const said = numbers(one).filter(([, , text]) => text !== "–").map(([, label, text]) => `${label} ${text}`);
    return [visible(map.texts[tokens.codes[token]]), map.kindNames[kinds.codes[token]], ...(said.length ? said : ["no target of this head"])].join(", ");
  }
  function tell() {
    if (!shown.length) return;
    const start = map.starts[state.document], token = start + state.token, source = state.token - 1 - state.head;
    const what = el("p", { class: "what" }, el("code", { text: visible(map.texts[tokens.codes[token]]) }), el("span", { text: map.kindNames[kinds.codes[token]] }));
    what.append(el("span", { class: "hint", text: `token ${count(state.token + 1)} of ${count(shown[0].spans.length)}` + (source >= 0 ? ", predicted after" : ", too early for this head") }));
    if (source >= 0) what.append(el("code", { text: visible(map.texts[tokens.codes[start + source]]) }));
    const header = el("tr", {}, el("th", { text: "run", scope: "col" }), ...COLUMNS.map(([, label]) => el("th", { text: label, scope: "col" })), el("th", { text: "weight by head", scope: "col" }));
    const body = el("tbody");
    for (const one of shown) {
      const row = el("tr", {}, el("th", { scope: "row" }, mark(groupOf[one.run]), runs[one.run].name));
      for (const [name, label, text] of numbers(one)) row.append(el("td", { text, class: text === "–" ? "nothing" : "", "data-name": name, "data-label": label }));
      const bars = el("span", { class: "heads", "aria-hidden": "true" }), high = map.domains.weight ? map.domains.weight[1] : 1;
      for (let k = 0; k < runs[one.run].heads; k++) {
        const weight = quantity(one, "weight", token, k);
        const bar = el("i", { class: Number.isNaN(weight) ? "nil" : k === state.head ? "on" : "" });
        bar.style.height = Number.isNaN(weight) ? "1px" : `${Math.min(100, (100 * weight) / high)}%`;
        bars.append(bar);
      }
      row.append(el("td", { "data-label": "by head" }, bars));
      body.append(row);
    }
    $("readout").replaceChildren(what, el("div", { class: "scroll" }, el("table", {}, el("thead", {}, header), body)));
  }

  // ---- ranking ----
  let ranking = 0;
  function rank() {
    // Behind the slider: painting comes first.
    cancelAnimationFrame(ranking);
    ranking = requestAnimationFrame(() => {
      $("ranking-note").textContent = `Mean weight under head ${state.head}, over all ${plural(map.starts.length - 1, "piece")} of documents shown; tokens that are targets ${LEAST} times or more. Choose a token to go to where it stands.`;
      const tables = shown.map(means);
      const first = tables[0].kinds, order = [...first.keys()].sort((a, b) => first.get(b).mean - first.get(a).mean);
      for (const { kinds: more } of tables) for (const kind of more.keys()) if (!order.includes(kind)) order.push(kind);
      const high = Math.max(1e-9, ...tables.flatMap(({ kinds: all }) => [...all.values()].map((one) => one.mean)));
      const cells = shown.map((one, i) => {
        const { texts, kinds: byKind } = tables[i];
        const name = el("h3", {}, mark(groupOf[one.run]), `${groups[groupOf[one.run]].label} · ${runs[one.run].name}`);
        const column = el("div", { class: "pair" }, name);
        if (map.hasKinds) column.append(table("Kinds", order.map((kind) => [null, map.kindNames[kind], byKind.get(kind)]), high));
        const most = [...texts.entries()].sort((a, b) => b[1].mean - a[1].mean || b[1].n - a[1].n);
        const least = [...most].sort((a, b) => a[1].mean - b[1].mean || b[1].n - a[1].n);
        const top = most.length ? Math.max(1e-9, most[0][1].mean) : 1;
        column.append(table("Most weighted", most.slice(0, RANKED).map(([text, one]) => [text, visible(map.texts[text]), one]), top));
        column.append(table("Least weighted", least.slice(0, RANKED).map(([text, one]) => [text, visible(map.texts[text]), one]), top));
        return column;
      });
      $("ranking-body").replaceChildren(el("div", { class: "columns" }, ...cells));
    });
  }
  function means(one) {
    const texts = new Map(), byKind = new Map();
    const add = (table, key, weight) => {
      const entry = table.get(key) ?? { sum: 0, n: 0 };
      entry.sum += weight; entry.n += 1; table.set(key, entry);
    };
    for (let token = 0; token < total(); token++) {
      const weight = quantity(one, "weight", token, state.head);
      if (!Number.isFinite(weight)) continue;
      add(texts, tokens.codes[token], weight);
      add(byKind, kinds.codes[token], weight);
    }
    for (const table of [texts, byKind]) for (const entry of table.values()) entry.mean = entry.sum / entry.n;
    for (const [key, entry] of texts) if (entry.n < LEAST) texts.delete(key);
    return { texts, kinds: byKind };
  }
  function table(caption, rows, high) {
    const body = el("tbody");
    for (const [text, label, entry] of rows) {
      const name = text === null ? el("th", { scope: "row", text: label }) : el("th", { scope: "row" }, el("button", { type: "button", "aria-label": `Go to ${label}`, onclick: () => find(text) }, el("code", { text: label })));
      const bar = el("i");
      bar.style.width = `${entry ? (100 * entry.mean) / high : 0}%`;
      body.append(el("tr", {}, name, el("td", { class: "bar" }, bar), el("td", { text: entry ? places(entry.mean, 2) : "–" }), el("td", { text: entry ? count(entry.n) : "0" })));
    }
    const head = el("tr", {}, el("th", { text: caption, scope: "col" }), el("td"), el("th", { text: "weight", scope: "col" }), el("th", { text: "tokens", scope: "col" }));
    return el("table", {}, el("thead", {}, head), body);
  }
  function find(text) {
    const from = map.starts[state.document] + state.token;
    for (let i = 1; i <= total(); i++) {
      const token = (from + i) % total();
      if (tokens.codes[token] !== text || Number.isNaN(quantity(shown[0], "weight", token, state.head))) continue;
      const number = map.starts.findIndex((start, at) => start <= token && token < map.starts[at + 1]);
      go(number, token - map.starts[number], true);
      return;
    }
  }

  // ---- charts ----
  function ticks(low, high, most) {
    const raw = (high - low) / most || 1, size = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].map((m) => m * size).find((s) => s >= raw * 0.999);
    const out = [];
    for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-6; v += step) out.push(Math.abs(v) < step * 1e-6 ? 0 : v);
    return out;
  }
  let clips = 0;
  function chart(panel) {
    const W = 460, H = 236, left = 46, right = 10, top = 10, bottom = 24, depth = "label" in panel;
    const lines = panel.series.map((one) => ({ ...one, x: one.x ?? one.steps }));
    const xs = lines.flatMap((one) => one.x), all = lines.flatMap((one) => [...one.low, ...one.high]);
    const settled = depth ? all : lines.flatMap((one) => { const from = one.x.length > 2 ? Math.max(1, Math.floor(one.x.length / 10)) : 0; return [...one.low.slice(from), ...one.high.slice(from)]; });
    let low = Math.min(...all), high = Math.max(...all);
    const calm = [Math.min(...settled), Math.max(...settled)], cut = high - low > 2.5 * (calm[1] - calm[0]) && calm[1] > calm[0];
    if (cut) [low, high] = calm;
    const pad = 0.07 * (high - low) || Math.abs(high) * 0.05 || 0.05;
    low = low >= 0 && low - pad < 0 ? 0 : low - pad;
    high += pad;
    const x0 = Math.min(...xs), x1 = Math.max(...xs), inset = depth ? 22 : 0;
    const X = (x) => left + inset + (x1 === x0 ? 0.5 : (x - x0) / (x1 - x0)) * (W - left - right - 2 * inset);
    const Y = (y) => top + (1 - (y - low) / (high - low)) * (H - top - bottom);
    const clip = `clip${clips++}`;
    const root = svg("svg", { class: "chart", viewBox: `0 0 ${W} ${H}`, role: "img", tabindex: "0" });
    root.append(svg("defs", {}, svg("clipPath", { id: clip }, svg("rect", { x: left - 6, y: top - 6, width: W - left - right + 12, height: H - top - bottom + 12 }))));
    for (const y of ticks(low, high, 4)) {
      root.append(svg("line", { class: "grid", x1: left, x2: W - right, y1: Y(y), y2: Y(y) }));
      const label = svg("text", { x: left - 7, y: Y(y) + 4, "text-anchor": "end" });
      label.textContent = brief(+y.toPrecision(6));
      root.append(label);
    }
    const places_ = depth ? [...new Set(xs)] : ticks(x0, x1, 5);
    for (const x of places_) {
      const label = svg("text", { x: X(x), y: H - 6, "text-anchor": "middle" });
      label.textContent = depth ? panel.label.replace("{}", x) : brief(x);
      root.append(label);
    }
    root.append(svg("line", { class: "axis", x1: left, x2: W - right, y1: H - bottom, y2: H - bottom }));
    const drawn = svg("g", { "clip-path": `url(#${clip})` });
    for (const one of lines) {
      const colour = `var(--g${one.group % 8})`;
      if (one.runs > 1) {
        const points = [...one.x.map((x, i) => `${X(x)},${Y(one.high[i])}`), ...one.x.map((x, i) => `${X(x)},${Y(one.low[i])}`).reverse()];
        const band = svg("polygon", { class: "band", points: points.join(" ") });
        band.style.fill = colour;
        drawn.append(band);
      }
      const line = svg("polyline", { class: "line", points: one.x.map((x, i) => `${X(x)},${Y(one.mean[i])}`).join(" "), "stroke-dasharray": DASHES[one.group % 8] });
      line.style.stroke = colour;
      drawn.append(line);
      const marked = depth || one.x.length <= 14 ? one.x.map((_, i) => i) : [one.x.length - 1];
      for (const i of marked) drawn.append(shape(one.group, X(one.x[i]), Y(one.mean[i]), 3.7));
    }
    const cross = svg("line", { class: "cross", y1: top, y2: H - bottom, visibility: "hidden" });
    root.append(drawn, cross);
    const read = el("p", { class: "chart-read", "aria-live": "polite" });
    const stops = [...new Set(xs)].sort((a, b) => a - b);
    let at = stops.length - 1;
    function show(index, crossed) {
      at = Math.max(0, Math.min(stops.length - 1, index));
      const x = stops[at], parts = [];
      for (const one of lines) {
        const i = one.x.indexOf(x);
        if (i < 0) continue;
        const span = one.runs > 1 ? ` (${brief(one.low[i])}–${brief(one.high[i])})` : "";
        parts.push(`${groups[one.group].label} ${brief(one.mean[i])}${span}`);
      }
      const spans = parts.flatMap((part, i) => (i ? [" · ", el("span", { text: part })] : [el("span", { text: part })]));
      read.replaceChildren(`${depth ? panel.label.replace("{}", x) : `step ${count(x)}`}: `, ...spans);
      cross.setAttribute("x1", X(x)); cross.setAttribute("x2", X(x));
      cross.setAttribute("visibility", crossed ? "visible" : "hidden");
    }
    root.addEventListener("pointermove", (event) => {
      const box = root.getBoundingClientRect(), x = ((event.clientX - box.left) / box.width) * W;
      let best = 0;
      stops.forEach((stop, i) => { if (Math.abs(X(stop) - x) < Math.abs(X(stops[best]) - x)) best = i; });
      show(best, true);
    });
    root.addEventListener("pointerleave", () => show(stops.length - 1, false));
    root.addEventListener("blur", () => show(stops.length - 1, false));
    root.addEventListener("keydown", (event) => {
      const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: stops.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      show(to, true);
    });
    show(stops.length - 1, false);
    const ends = lines.map((one) => `${groups[one.group].label} ends at ${brief(one.mean[one.mean.length - 1])}`);
    root.setAttribute("aria-label", `${panel.title}, ${panel.unit}. ${ends.join(", ")}.`);
    const unit = panel.unit + (cut ? `; begins off the scale` : "");
    return el("figure", {}, el("figcaption", {}, el("h3", { text: panel.title }), el("span", { class: "unit", text: unit })), root, read);
  }
  function drawCharts() {
    for (const id of ["key", "key-depth"]) $(id).append(...groups.map((group, number) => el("li", {}, mark(number), `${group.label}${group.runs.length > 1 ? `, ${group.runs.length} seeds` : ""}`)));
    $("curve-charts").append(...DATA.curves.map(chart));
    if (!DATA.curves.length) $("curve-charts").append(el("p", { class: "empty", text: "No run has logged a metric yet." }));
    $("depth-charts").append(...DATA.depth.map(chart));
    if (DATA.kindAccuracy.length) drawKindAccuracy();
    for (const run of runs) {
      const tasks = ["heads", "speed"].filter((task) => run.missing.includes(`no evaluation of ${task}`));
      if (tasks.length) $("depth-missing").append(el("p", { class: "empty" }, `${run.name}: not measured yet: `, el("code", { text: `python -m wmtp_jax.evaluate --checkpoint=${run.path} --tasks=${tasks.join(",")}` })));
    }
  }
  function drawKindAccuracy() {
    const choice = el("select", { "aria-label": "Head of the table" }), place = el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Accuracy by kind" });
    choice.style.width = "auto";
    for (const { head } of DATA.kindAccuracy) choice.append(el("option", { value: head, text: `head ${head}` }));
    function draw() {
      const header = el("tr", {}, el("th", { text: "kind", scope: "col" }), ...groups.map((group, number) => el("th", { scope: "col" }, mark(number), group.label)));
      const body = el("tbody", {}, ...DATA.kindAccuracy[+choice.value].kinds.map(({ kind, top1 }) => el("tr", {}, el("th", { text: kind, scope: "row" }), ...top1.map((x) => el("td", { text: x === null ? "–" : percent(x) })))));
      place.replaceChildren(el("table", {}, el("thead", {}, header), body));
    }
    choice.addEventListener("change", draw);
    draw();
    $("depth-charts").append(el("figure", {}, el("figcaption", { class: "beside" }, el("h3", { text: "Top-1 accuracy by kind of token" }), choice), place));
  }

  async function start() {
    drawRuns();
    drawCharts();
    if (!map) {
      const text = DATA.mapLeftOut ? "The token map was left out (--notokens)." : "No run has kept the weights of tokens yet: they are written at evaluations (config.eval.every, config.eval.token_rows).";
      $("map-body").replaceChildren(el("p", { class: "empty", text }));
      $("ranking").hidden = true;
    } else {
      [tokens, kinds] = await Promise.all([unpack(map.tokens), unpack(map.kinds)]);
      setUpMap();
      await build();
    }
    document.documentElement.dataset.ready = "yes";
  }
  start();
})();
