"use strict";
// Layers are boxes; an open one shows what is in it, in rows: whatever a row reads is above it. Layout is made of
// what is open, and drawing of what is in sight, so that the size of a program hardly matters.
const DATA = JSON.parse(document.getElementById("data").textContent);
const W = 190, H = 40, GAP_X = 16, GAP_Y = 26, PAD = 12, HEAD = 24, LINE = 14, BIN = 600;
const byId = (id) => document.getElementById(id);
const bytesText = (b) => {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let k = 0;
  while (b >= 1024 && k < units.length - 1) { b /= 1024; k++; }
  return (k ? b.toFixed(2) : b) + " " + units[k];
};
const secondsText = (s) => s >= 1 ? s.toFixed(2) + " s" : s >= 1e-3 ? (s * 1e3).toFixed(2) + " ms" : (s * 1e6).toFixed(2) + " us";

// A program with what layouts need: parents of values, first value and sums of layers, edges by the layer that
// both of their ends are in.
class Model {
  constructor(d) {
    this.d = d;
    const n = this.n = d.name.length, L = this.L = d.layers.length;
    this.own = Array.from({length: L}, () => []);
    this.inner = Array.from({length: L}, () => []);
    this.depth = new Int32Array(L);
    this.first = new Int32Array(L).fill(n);
    this.count = new Int32Array(L);
    this.changed = new Int32Array(L);
    this.bytes = new Float64Array(L);
    this.seconds = new Float64Array(L);
    for (let l = 1; l < L; l++) { this.inner[d.parent[l]].push(l); this.depth[l] = this.depth[d.parent[l]] + 1; }
    for (let i = 0; i < n; i++) {
      this.own[d.layer[i]].push(i);
      for (let l = d.layer[i]; l >= 0; l = l ? d.parent[l] : -1) {
        if (d.call[i] && i < this.first[l]) this.first[l] = i;  // inputs are there before anything runs
        this.count[l]++;
        if (d.change && d.change[i]) this.changed[l]++;
        this.bytes[l] += d.bytes[i];
        this.seconds[l] += d.seconds[i];
      }
    }
    this.readers = Array.from({length: n}, () => []);
    this.edges = Array.from({length: L}, () => []);
    for (let i = 0; i < n; i++) for (const s of d.reads[i]) {
      this.readers[s].push(i);
      let a = d.layer[s], b = d.layer[i], ua = s, ub = i;  // units: values as they are, layers as ~l
      while (a !== b) {
        if (this.depth[a] >= this.depth[b]) { ua = ~a; a = d.parent[a]; } else { ub = ~b; b = d.parent[b]; }
      }
      if (ua !== ub) this.edges[a].push(ua, ub);
    }
    this.text = d.name.map((name, i) => (name + " " + d.ops[d.op[i]] + " " + d.types[d.type[i]] + " " + d.layers[d.layer[i]] + " " + d.marks[d.mark[i]]).toLowerCase());
    const top = (values) => values.reduce((a, b) => Math.max(a, b), 0);
    this.most = {seconds: top(d.seconds), bytes: top(d.bytes)};
    for (let l = 1; l < L; l++) {
      this.most.seconds = Math.max(this.most.seconds, this.seconds[l]);
      this.most.bytes = Math.max(this.most.bytes, this.bytes[l]);
    }
  }
  firstOf(u) { return u >= 0 ? u : this.first[~u]; }
}

const KIND_FILL = {parameter: "#fdf3d0", buffer: "#fdf3d0", input: "#e3eefb", constant: "#eee9fb", tangent: "#e3eefb", saved: "#fbe9d7", symbol: "#eeeeee", activation: "#e3eefb"};
const CHANGE_FILL = {"": "#ffffff", added: "#c9ecd0", removed: "#f9cfcf", changed: "#ffe4a3", rewired: "#dbe6f4"};
const heat = (share) => `hsl(${Math.round(56 - 56 * share)} 90% ${Math.round(93 - 38 * share)}%)`;
const cool = (share) => `hsl(${Math.round(190 + 40 * share)} 75% ${Math.round(94 - 40 * share)}%)`;
const shareOf = (value, most) => value > 0 && most > 0 ? Math.max(0, 1 + Math.log10(value / most) / 4) : 0;  // four decades

class View {
  constructor(pane) {
    this.pane = pane;
    this.canvas = pane.querySelector("canvas");
    this.choice = pane.querySelector("select");
    this.note = pane.querySelector("span");
    this.scale = 1; this.tx = 20; this.ty = 20;
    this.models = new Map();
    DATA.programs.forEach((d, k) => this.choice.add(new Option(d.title, k)));
    this.choice.onchange = () => { this.show(+this.choice.value); follow(this); };
    this.wire();
  }
  show(k) {
    this.choice.value = k;
    this.number = k;
    if (!this.models.has(k)) this.models.set(k, new Model(DATA.programs[k]));
    this.m = this.models.get(k);
    this.open = new Set([0]);
    // What has one layer in it alone is opened, down to where there is a choice.
    for (let l = 0; this.m.inner[l].length === 1 && this.m.own[l].length <= 40;) this.open.add(l = this.m.inner[l][0]);
    if (this.m.d.change) this.openChanged();
    this.selected = -1; this.lit = new Set();
    this.layout(); this.fit();
  }
  isShown(layer) { for (let l = layer; l > 0; l = this.m.d.parent[l]) if (!this.open.has(this.m.d.parent[l])) return false; return true; }
  layout() {
    const t0 = performance.now();
    this.leaves = []; this.frames = [];
    this.at = new Map();
    const root = this.arrange(0);
    this.w = root.w; this.h = root.h;
    this.place(root, 0, 0);
    this.bins = new Map();
    this.leaves.forEach((box, k) => { const b = Math.floor(box.y / BIN); if (!this.bins.has(b)) this.bins.set(b, []); this.bins.get(b).push(k); });
    this.link();
    this.layoutMs = performance.now() - t0;
    const d = this.m.d;
    this.note.textContent = `${d.name.length.toLocaleString()} values, ${bytesText(this.m.bytes[0])} made` + (this.m.seconds[0] ? `, ${secondsText(this.m.seconds[0])} predicted` : "");
    this.draw();
  }
  // Rows of one layer: {w, h, units: [{u, x, y, w, h, inner}]}, relative to its own corner.
  arrange(layer) {
    const m = this.m;
    const units = m.own[layer].concat(m.inner[layer].filter((l) => m.count[l]).map((l) => ~l)).sort((a, b) => m.firstOf(a) - m.firstOf(b));
    const place = new Map(units.map((u, k) => [u, k]));
    const preds = units.map(() => []), succs = units.map(() => []);
    const pairs = m.edges[layer];
    for (let k = 0; k < pairs.length; k += 2) {
      const a = place.get(pairs[k]), b = place.get(pairs[k + 1]);
      if (a < b) { preds[b].push(a); succs[a].push(b); }
    }
    const rank = new Int32Array(units.length);
    for (let k = 0; k < units.length; k++) for (const p of preds[k]) rank[k] = Math.max(rank[k], rank[p] + 1);
    for (let k = units.length - 1; k >= 0; k--) if (!preds[k].length && succs[k].length) {
      rank[k] = Math.max(0, succs[k].reduce((r, s) => Math.min(r, rank[s]), Infinity) - 1);  // beside what reads it first
    }
    const boxes = units.map((u) => {
      if (u < 0 && this.open.has(~u)) { const inner = this.arrange(~u); return {u, w: inner.w, h: inner.h, inner}; }
      return {u, w: W, h: H};
    });
    const rows = [];
    units.forEach((u, k) => (rows[rank[k]] ||= []).push(k));
    const middle = new Float64Array(units.length);
    const lines = [];
    for (const row of rows) {
      if (!row) continue;
      const want = new Map(row.map((k) => [k, preds[k].length ? preds[k].reduce((s, p) => s + middle[p], 0) / preds[k].length : k]));
      if (row.some((k) => preds[k].length)) row.sort((a, b) => want.get(a) - want.get(b));
      for (let start = 0; start < row.length; start += LINE) lines.push(row.slice(start, start + LINE));
      let x = 0;
      for (const k of row.slice(0, LINE * 4)) { middle[k] = x + boxes[k].w / 2; x += boxes[k].w + GAP_X; }
    }
    let w = 0, y = layer ? HEAD + PAD : PAD;
    const wide = lines.map((line) => line.reduce((s, k) => s + boxes[k].w + GAP_X, -GAP_X));
    for (const each of wide) if (each > w) w = each;
    lines.forEach((line, r) => {
      let x = PAD + (w - wide[r]) / 2, tall = 0;
      for (const k of line) { boxes[k].x = x; boxes[k].y = y; x += boxes[k].w + GAP_X; tall = Math.max(tall, boxes[k].h); }
      y += tall + GAP_Y;
    });
    return {w: Math.max(w, W) + 2 * PAD, h: y - GAP_Y + PAD, units: boxes};
  }
  place(group, x, y) {
    for (const box of group.units) {
      const flat = {u: box.u, x: x + box.x, y: y + box.y, w: box.w, h: box.h};
      this.at.set(box.u, flat);
      if (box.inner) { this.frames.push(flat); this.place(box.inner, flat.x, flat.y); } else this.leaves.push(flat);
    }
  }
  unitOf(i) {
    let shown = i;
    for (let l = this.m.d.layer[i]; l > 0; l = this.m.d.parent[l]) if (!this.open.has(l)) shown = ~l;
    return shown;
  }
  link() {
    const m = this.m, size = m.n + m.L + 1, seen = new Set(), unit = new Int32Array(m.n);
    const shownIn = new Int32Array(m.L);  // a closed layer that hides this one, or 0
    for (let l = 1; l < m.L; l++) shownIn[l] = shownIn[m.d.parent[l]] || (this.open.has(l) ? 0 : l);
    for (let i = 0; i < m.n; i++) { const l = shownIn[m.d.layer[i]]; unit[i] = l ? ~l : i; }
    this.short = new Map(); this.long = [];
    for (let i = 0; i < m.n; i++) for (const s of m.d.reads[i]) {
      const a = unit[s], b = unit[i];
      if (a === b) continue;
      const key = (a + m.L) * size + (b + m.L);
      if (seen.has(key)) continue;
      seen.add(key);
      const from = this.at.get(a), to = this.at.get(b);
      const edge = {a, b, x1: from.x + from.w / 2, y1: from.y + from.h, x2: to.x + to.w / 2, y2: to.y};
      const lo = Math.floor(Math.min(edge.y1, edge.y2) / BIN), hi = Math.floor(Math.max(edge.y1, edge.y2) / BIN);
      if (hi - lo > 3) this.long.push(edge);
      else for (let k = lo; k <= hi; k++) { if (!this.short.has(k)) this.short.set(k, []); this.short.get(k).push(edge); }
    }
  }
  fit() {
    const {width, height} = this.size();
    this.scale = Math.min(1.2, Math.max(Math.min(width / (this.w + 40), height / (this.h + 40)), 0.35));
    this.tx = (width - this.w * this.scale) / 2; this.ty = 12;
    this.draw();
  }
  whole() {
    const {width, height} = this.size();
    this.scale = Math.min(1.2, width / (this.w + 40), height / (this.h + 40));
    this.tx = (width - this.w * this.scale) / 2; this.ty = 12;
    this.draw();
  }
  size() { return {width: this.canvas.clientWidth || 800, height: this.canvas.clientHeight || 600}; }
  draw() { if (!this.waiting) { this.waiting = true; requestAnimationFrame(() => { this.waiting = false; this.paint(); }); } }
  fill(u) {
    const m = this.m, mode = byId("colour").value;
    if (mode === "change") return u >= 0 ? CHANGE_FILL[DATA.kinds[m.d.change[u]]] : m.changed[~u] ? "#fff4da" : "#eef1f5";
    if (mode === "seconds") return heat(shareOf(u >= 0 ? m.d.seconds[u] : m.seconds[~u], m.most.seconds));
    if (mode === "bytes") return cool(shareOf(u >= 0 ? m.d.bytes[u] : m.bytes[~u], m.most.bytes));
    if (u < 0) return "#eef1f5";
    return KIND_FILL[m.d.ops[m.d.op[u]]] || (m.d.marks[m.d.mark[u]] ? "#e1f3e2" : "#ffffff");
  }
  paint() {
    const t0 = performance.now(), {width, height} = this.size(), ratio = window.devicePixelRatio || 1, c = this.canvas;
    if (c.width !== Math.round(width * ratio)) c.width = Math.round(width * ratio);
    if (c.height !== Math.round(height * ratio)) c.height = Math.round(height * ratio);
    const g = c.getContext("2d"), s = this.scale, m = this.m;
    g.setTransform(ratio, 0, 0, ratio, 0, 0);
    g.clearRect(0, 0, width, height);
    g.translate(this.tx, this.ty); g.scale(s, s);
    const x0 = -this.tx / s, y0 = -this.ty / s, x1 = x0 + width / s, y1 = y0 + height / s;
    const near = (b) => b.x < x1 && b.x + b.w > x0 && b.y < y1 && b.y + b.h > y0;
    const words = s > 0.3;
    for (const f of this.frames) if (near(f)) {
      g.fillStyle = "#f8fafc"; g.fillRect(f.x, f.y, f.w, f.h);
      g.strokeStyle = this.lit.has(f.u) ? "#d9480f" : "#a9b4bf"; g.lineWidth = 1; g.strokeRect(f.x, f.y, f.w, f.h);
      if (words) this.words(g, "▾ " + this.title(f.u), f.x + 8, f.y + 16, f.w - 16, "#33414d", "600 12px system-ui,sans-serif");
    }
    const lo = Math.floor(y0 / BIN), hi = Math.floor(y1 / BIN);
    if (s > 0.12) {
      g.strokeStyle = "#9aa7b3"; g.lineWidth = Math.max(1, 0.6 / s); g.beginPath();
      const curve = (e) => { const bend = Math.max(12, (e.y2 - e.y1) / 2); g.moveTo(e.x1, e.y1); g.bezierCurveTo(e.x1, e.y1 + bend, e.x2, e.y2 - bend, e.x2, e.y2); };
      for (let k = lo; k <= hi; k++) for (const e of this.short.get(k) || []) curve(e);
      let most = 1500;
      for (const e of this.long) if (Math.min(e.y1, e.y2) < y1 && Math.max(e.y1, e.y2) > y0 && most-- > 0) curve(e);
      g.stroke();
      if (this.selected >= 0) this.paintEdges(g);
    }
    this.drawn = 0;
    for (let k = lo - 1; k <= hi; k++) for (const n of this.bins.get(k) || []) {
      const b = this.leaves[n];
      if (!near(b)) continue;
      this.drawn++;
      g.fillStyle = this.fill(b.u);
      g.fillRect(b.x, b.y, b.w, b.h);
      const here = b.u === this.chosenUnit, lit = this.lit.has(b.u);
      if (s > 0.12 || lit || here) {
        g.lineWidth = here || lit ? 2.5 : 1;
        g.strokeStyle = here ? "#20598f" : lit ? "#d9480f" : b.u < 0 ? "#7d8a97" : "#b4bec8";
        g.strokeRect(b.x, b.y, b.w, b.h);
      }
      if (!words) continue;
      if (b.u < 0) {
        const l = ~b.u, cost = `${m.count[l].toLocaleString()} values, ${bytesText(m.bytes[l])}` + (m.seconds[l] ? `, ${secondsText(m.seconds[l])}` : "") + (m.changed[l] ? `, ${m.changed[l].toLocaleString()} changed` : "");
        this.words(g, "▸ " + this.title(b.u), b.x + 7, b.y + 16, b.w - 12, "#1f2933", "600 12px system-ui,sans-serif");
        this.words(g, cost, b.x + 7, b.y + 32, b.w - 12, "#4a5763", "11px system-ui,sans-serif");
      } else {
        const mark = m.d.marks[m.d.mark[b.u]];
        this.words(g, m.d.ops[m.d.op[b.u]] + (mark ? "  <" + mark + ">" : ""), b.x + 7, b.y + 16, b.w - 12, "#1f2933", "12px ui-monospace,monospace");
        this.words(g, m.d.name[b.u] + " : " + m.d.types[m.d.type[b.u]], b.x + 7, b.y + 32, b.w - 12, "#4a5763", "11px ui-monospace,monospace");
      }
    }
    this.paintMs = performance.now() - t0;
  }
  paintEdges(g) {
    g.strokeStyle = "#20598f"; g.lineWidth = 2; g.beginPath();
    const line = (a, b) => {
      const from = this.at.get(this.unitOf(a)), to = this.at.get(this.unitOf(b));
      if (from && to && from !== to) { g.moveTo(from.x + from.w / 2, from.y + from.h); g.lineTo(to.x + to.w / 2, to.y); }
    };
    for (const s of this.m.d.reads[this.selected]) line(s, this.selected);
    for (const r of this.m.readers[this.selected].slice(0, 300)) line(this.selected, r);
    g.stroke();
  }
  words(g, text, x, y, room, colour, font) {
    g.font = font; g.fillStyle = colour;
    const most = Math.floor(room / (font.includes("mono") ? (font.startsWith("12") ? 7.3 : 6.7) : 6.3));
    g.fillText(text.length > most ? text.slice(0, Math.max(1, most - 1)) + "…" : text, x, y);
  }
  title(u) { const path = this.m.d.layers[~u], up = this.m.d.layers[this.m.d.parent[~u]]; return up ? path.slice(up.length + 1) : path; }
  unitAt(px, py) {
    const x = (px - this.tx) / this.scale, y = (py - this.ty) / this.scale, hit = (b) => x >= b.x && x <= b.x + b.w && y >= b.y && y <= b.y + b.h;
    const k = Math.floor(y / BIN);
    for (const bin of [k, k - 1]) for (const n of this.bins.get(bin) || []) if (hit(this.leaves[n])) return this.leaves[n].u;
    for (let n = this.frames.length - 1; n >= 0; n--) if (hit(this.frames[n])) return y - this.frames[n].y < HEAD ? this.frames[n].u : null;
    return null;
  }
  toggle(layer) {
    // What was clicked stays where it is on the screen.
    const before = this.at.get(~layer);
    if (this.open.has(layer)) this.open.delete(layer); else this.open.add(layer);
    this.layout();
    const after = this.at.get(~layer);
    this.tx += (before.x - after.x) * this.scale; this.ty += (before.y - after.y) * this.scale;
    this.draw();
  }
  // The layers that a change is in, and those around them.
  openChanged() {
    const d = this.m.d;
    this.open = new Set([0]);
    for (let i = 0; i < this.m.n; i++) if (d.change[i]) for (let l = d.layer[i]; l > 0; l = d.parent[l]) this.open.add(l);
  }
  openAll(open) {
    this.open = new Set([0]);
    if (open) for (let l = 1; l < this.m.L; l++) this.open.add(l);
    this.layout(); this.fit();
  }
  select(i, move) {
    this.selected = i; this.chosenUnit = null;
    if (i >= 0) {
      if (move) {
        let changed = false;
        for (let l = this.m.d.layer[i]; l > 0; l = this.m.d.parent[l]) if (!this.open.has(l)) { this.open.add(l); changed = true; }
        if (changed) this.layout();
      }
      this.chosenUnit = this.unitOf(i);
      if (move) {
        const b = this.at.get(this.chosenUnit), {width, height} = this.size();
        this.scale = Math.max(this.scale, 0.6);
        this.tx = width / 2 - (b.x + b.w / 2) * this.scale; this.ty = height / 2 - (b.y + b.h / 2) * this.scale;
      }
    }
    this.draw();
  }
  wire() {
    const c = this.canvas;
    let held = null;
    c.addEventListener("wheel", (e) => {
      e.preventDefault();
      if (e.shiftKey) { this.tx -= e.deltaY; } else {
        const f = Math.exp(-e.deltaY * 0.0015), s = Math.min(4, Math.max(0.004, this.scale * f)), k = s / this.scale;
        this.tx = e.offsetX - (e.offsetX - this.tx) * k; this.ty = e.offsetY - (e.offsetY - this.ty) * k; this.scale = s;
      }
      this.draw();
    }, {passive: false});
    c.addEventListener("pointerdown", (e) => { held = {x: e.offsetX, y: e.offsetY, tx: this.tx, ty: this.ty, moved: false}; c.setPointerCapture(e.pointerId); });
    c.addEventListener("pointermove", (e) => {
      if (!held) return;
      if (Math.abs(e.offsetX - held.x) + Math.abs(e.offsetY - held.y) > 4) held.moved = true;
      this.tx = held.tx + e.offsetX - held.x; this.ty = held.ty + e.offsetY - held.y;
      this.draw();
    });
    c.addEventListener("pointerup", (e) => {
      const was = held; held = null;
      if (!was || was.moved) return;
      const u = this.unitAt(e.offsetX, e.offsetY);
      if (u === null) { choose(this, -1); return; }
      if (u < 0) { this.toggle(~u); alike(this, ~u); } else choose(this, u);
    });
    c.addEventListener("keydown", (e) => {
      const step = {ArrowUp: [0, 60], ArrowDown: [0, -60], ArrowLeft: [60, 0], ArrowRight: [-60, 0]}[e.key];
      if (step) { this.tx += step[0]; this.ty += step[1]; e.preventDefault(); this.draw(); }
      if (e.key === "+" || e.key === "-") { this.scale *= e.key === "+" ? 1.2 : 1 / 1.2; this.draw(); }
    });
  }
}

function row(list, name, ...parts) {
  const dt = document.createElement("dt"), dd = document.createElement("dd");
  dt.textContent = name;
  for (const part of parts) dd.append(part);
  list.append(dt, dd);
}
function code(text) { const e = document.createElement("code"); e.textContent = text; return e; }
function links(view, numbers) {
  const box = document.createElement("span");
  numbers.slice(0, 40).forEach((i, k) => {
    const a = document.createElement("a");
    a.textContent = view.m.d.name[i]; a.onclick = () => choose(view, i, true);
    box.append(k ? ", " : "", a);
  });
  if (numbers.length > 40) box.append(` and ${numbers.length - 40} more`);
  return numbers.length ? box : "nobody";
}
// Two sides that are compared: which program the other one shows, and the layer of the same path there.
const partner = (k) => k ^ 1;
const compared = (view, other) => view.m.d.twin && !other.pane.hidden && other.number === partner(view.number);
function follow(view) {
  for (const other of VIEWS) if (other !== view && view.m.d.twin && !other.pane.hidden && other.number !== partner(view.number)) other.show(partner(view.number));
  choose(view, -1);
}
function alike(view, layer) {
  for (const other of VIEWS) {
    if (other === view || !compared(view, other)) continue;
    const there = other.m.d.layers.indexOf(view.m.d.layers[layer]);
    if (there > 0 && other.at.has(~there) && other.open.has(there) !== view.open.has(layer)) other.toggle(there);
  }
}
// Twins by the comparison where there is one; else by name, and by the values that a pass made it of.
function twinsOf(view, i, other) {
  const d = view.m.d, e = other.m.d;
  if (d.twin) return compared(view, other) ? d.twin[i] : [];
  const wanted = new Set([d.id[i], ...(d.origin[i] || [])]);
  return e.id.map((id, k) => k).filter((k) => wanted.has(e.id[k]) || (e.origin[k] || []).some((o) => wanted.has(o)));
}
const SIGN = {added: "+ ", removed: "- ", changed: "~ ", rewired: "~ "};
// The changes of the two programs that are shown, by layer, to click on.
function changesOf(left, right) {
  const box = document.createElement("div"), byLayer = new Map();
  for (const view of [left, right]) view.m.d.change.forEach((kind, i) => {
    if (!kind || (view === left && DATA.kinds[kind] !== "removed")) return;
    const path = view.m.d.layers[view.m.d.layer[i]];
    if (!byLayer.has(path)) byLayer.set(path, []);
    byLayer.get(path).push([view, i]);
  });
  for (const [path, cost] of DATA.layers[left.number >> 1]) {
    const part = document.createElement("details"), head = document.createElement("summary"), found = byLayer.get(path) || [];
    part.open = DATA.layers[left.number >> 1].length <= 12;
    head.append(path || "(no layer)", document.createElement("br"), cost);
    part.append(head);
    for (const [view, i] of found.slice(0, 200)) {
      const line = document.createElement("a"), d = view.m.d;
      line.className = DATA.kinds[d.change[i]];
      line.textContent = SIGN[DATA.kinds[d.change[i]]] + d.name[i] + " = " + (d.call[i] || d.ops[d.op[i]]) + (d.note[i] ? "  # " + d.note[i] : "");
      line.onclick = () => choose(view, i, true);
      part.append(line);
    }
    if (found.length > 200) part.append(`and ${found.length - 200} more`);
    box.append(part);
  }
  return box;
}
// What is chosen on one side is looked for on the other.
function choose(view, i, move) {
  view.select(i, move);
  const about = byId("about");
  about.replaceChildren();
  if (i < 0) {
    about.append("Click a layer to open or close it, a value to see what it is.");
    if (compared(VIEWS[0], VIEWS[1])) { const left = VIEWS[0].number & 1 ? 1 : 0; about.append(changesOf(VIEWS[left], VIEWS[1 - left])); }
    return;
  }
  const d = view.m.d, h = document.createElement("h3"), list = document.createElement("dl");
  h.textContent = d.name[i];
  row(list, "call", code(d.call[i] || d.ops[d.op[i]])); row(list, "type", code(d.types[d.type[i]]));
  if (d.change && d.change[i]) row(list, "change", DATA.kinds[d.change[i]] + (d.note[i] ? ": " + d.note[i] : ""));
  row(list, "layer", d.layers[d.layer[i]] || "none"); row(list, "bytes", bytesText(d.bytes[i]));
  if (d.seconds[i]) row(list, "predicted", secondsText(d.seconds[i]));
  if (d.marks[d.mark[i]]) row(list, "made by, or in the schedule", d.marks[d.mark[i]]);
  row(list, "reads", links(view, d.reads[i])); row(list, "is read by", links(view, view.m.readers[i]));
  about.append(h, list);
  for (const other of VIEWS) {
    if (other === view || other.pane.hidden) continue;
    const twins = twinsOf(view, i, other);
    other.lit = new Set(twins.map((k) => other.unitOf(k)));
    other.select(twins.length ? twins[0] : -1, twins.length > 0);
    row(list, "beside", twins.length ? links(other, twins) : d.twin ? "nothing" : "nothing of that name");
  }
}

let matches = [], at = -1;
function find(step) {
  const text = byId("find").value.trim().toLowerCase(), [view, beside] = VIEWS;
  const light = (one) => { one.lit = new Set(matches.filter(([v]) => v === one).map(([, i]) => one.unitOf(i))); one.draw(); };
  if (!step) {
    matches = []; at = -1;
    if (text) view.m.text.forEach((t, i) => { if (t.includes(text)) matches.push([view, i]); });
    // Of two that are compared also what is found on the other side alone.
    const twice = (i) => beside.m.d.twin[i].some((k) => view.m.text[k].includes(text));
    if (text && compared(view, beside)) beside.m.text.forEach((t, i) => { if (t.includes(text) && !twice(i)) matches.push([beside, i]); });
    light(view);
    if (compared(view, beside)) light(beside);
  } else if (matches.length) {
    at = (at + step + matches.length) % matches.length;
    const [found, i] = matches[at];
    choose(found, i, true);
    light(found);
  }
  byId("found").textContent = text ? (at >= 0 ? `${at + 1} of ` : "") + `${matches.length.toLocaleString()} found` : "";
}
function legend() {
  const mode = byId("colour").value, box = byId("legend"), most = VIEWS[0].m.most[mode];
  const plain = mode === "kind" || mode === "change";
  box.hidden = plain;
  if (byId("key")) byId("key").hidden = mode !== "change";
  if (plain) return;
  const g = box.querySelector("canvas").getContext("2d");
  for (let x = 0; x < 90; x++) { g.fillStyle = (mode === "seconds" ? heat : cool)(x / 89); g.fillRect(x, 0, 1, 12); }
  const say = mode === "seconds" ? secondsText : bytesText;
  box.querySelector("i").textContent = say(mode === "bytes" ? Math.round(most / 1e4) : most / 1e4);
  box.querySelector("b").textContent = say(most);
}

const VIEWS = [...document.querySelectorAll(".pane")].map((pane) => new View(pane));
function compare(on) {
  VIEWS[1].pane.hidden = !on;
  byId("compare").textContent = on ? "one side" : "side by side";
  if (on) VIEWS[1].show(DATA.beside); else VIEWS[0].lit = new Set();
  VIEWS[0].fit();
}
VIEWS[0].show(DATA.first);
byId("compare").onclick = () => compare(VIEWS[1].pane.hidden);
byId("compare").hidden = DATA.programs.length < 2;
byId("open").onclick = () => shown().forEach((v) => v.openAll(true));
byId("close").onclick = () => shown().forEach((v) => v.openAll(false));
if (byId("changed")) byId("changed").onclick = () => shown().forEach((v) => { v.openChanged(); v.layout(); v.fit(); });
byId("fit").onclick = () => shown().forEach((v) => v.whole());
byId("colour").onchange = () => { legend(); shown().forEach((v) => v.draw()); };
byId("find").oninput = () => find(0);
byId("find").onkeydown = (e) => { if (e.key === "Enter") find(e.shiftKey ? -1 : 1); };
const shown = () => VIEWS.filter((v) => !v.pane.hidden);
window.onresize = () => shown().forEach((v) => v.draw());
legend();
if (DATA.compare) compare(true);
choose(VIEWS[0], -1);
window.graphopt = {views: VIEWS, find, choose, compare, ready: 0};
requestAnimationFrame(() => requestAnimationFrame(() => { window.graphopt.ready = performance.now(); }));
