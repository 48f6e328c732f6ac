"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const REFERENCE = 0;
  const state = { shots: null, picked: new Set() };

  // ------------------------------------------------------------------ small parts

  function svg(name, attributes = {}, ...children) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  }

  const SHAPES = {
    circle: "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0z",
    square: "M-4.2 -4.2h8.4v8.4h-8.4z",
    triangle: "M0 -5.4L5 4H-5z",
    diamond: "M0 -5.6L5.6 0L0 5.6L-5.6 0z",
    down: "M0 5.4L5 -4H-5z",
    cross: "M-5.2 -2.6L-2.6 -5.2L0 -2.6L2.6 -5.2L5.2 -2.6L2.6 0L5.2 2.6L2.6 5.2L0 2.6L-2.6 5.2L-5.2 2.6L-2.6 0z",
  };

  const number = (value) => Number(value.toPrecision(3)).toLocaleString("en", { maximumSignificantDigits: 3 });
  const power = (value) => (value >= 0.01 && value < 10000 ? number(value) : value.toExponential(0));

  /** Steps of 1, 2 or 5 times a power of ten, about `count` of them. */
  function steps(low, high, count) {
    const rough = (high - low || 1) / count;
    const base = 10 ** Math.floor(Math.log10(rough));
    const step = base * [1, 2, 5, 10].find((factor) => factor * base >= rough);
    const ticks = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) ticks.push([k * step, number(k * step)]);
    return ticks;
  }

  /** Powers of ten; where fewer than two fit, 1, 2 and 5 times them. */
  function powers(low, high) {
    const between = (factors) => {
      const ticks = [];
      for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high) + 1; e++) {
        for (const factor of factors) ticks.push(factor * 10 ** e);
      }
      return ticks.filter((tick) => tick >= low && tick <= high);
    };
    const tens = between([1]);
    return (tens.length >= 2 ? tens : between([1, 2, 5])).map((tick) => [tick, power(tick)]);
  }

  /** Move ascending heights as little as leaves `gap` between neighbors, and all of them between `low` and `high`. */
  function apart(heights, gap, low, high) {
    const groups = [];
    for (const height of heights) {
      let group = { center: height, count: 1 };
      for (;;) {
        const half = ((group.count - 1) * gap) / 2;
        group.center = Math.max(low + half, Math.min(high - half, group.center));
        const last = groups[groups.length - 1];
        if (!last || group.center - last.center >= (gap * (group.count + last.count)) / 2) break;
        groups.pop();
        const count = group.count + last.count;
        group = { center: (group.center * group.count + last.center * last.count) / count, count };
      }
      groups.push(group);
    }
    return groups.flatMap(({ center, count }) => Array.from({ length: count }, (_, i) => center + (i - (count - 1) / 2) * gap));
  }

  // ------------------------------------------------------------------ what each chart shows

  const shown = (entry) => state.shots === null || entry.shots === state.shots;
  const shotsText = (index) => data.titles[index];

  /** One series a method, the reference last: drawn above the others. */
  function byMethod(entries, point) {
    return data.methods
      .map((method, index) => ({
        method: index,
        label: method.name,
        color: method.color,
        mark: method.mark,
        strong: index === REFERENCE,
        points: entries.filter((entry) => entry.method === index).flatMap(point),
      }))
      .filter((series) => series.points.length)
      .reverse();
  }

  function facts(entry, ...more) {
    const lines = [`${data.quality} ${entry.texts.quality}`];
    if (entry.texts.difference) lines.push(`Difference ${entry.texts.difference}`);
    return [`${data.methods[entry.method].name}, ${shotsText(entry.shots)}`, [...lines, ...more]];
  }

  function againstCost(cost, label, ticks) {
    return () => ({
      crowded: data.crowded,
      x: { log: true, label, ticks },
      y: { label: data.qualityLabel, log: data.unit === "token" },
      series: byMethod(data.entries.filter((e) => shown(e) && e[cost] > 0), (e) => {
        const [title, lines] = facts(e, `Adaptation ${e.texts.seconds}`, `To update ${e.texts.bytes}`);
        return [{ x: e[cost], y: e.quality[0], title, lines }];
      }),
    });
  }

  const CHARTS = {
    accuracy_time: againstCost("seconds", "Adaptation time, log", data.timeTicks),
    accuracy_memory: againstCost("bytes", "Bytes to go on learning, log", data.sizeTicks),

    accuracy_shots: () => ({
      x: { label: data.shotsLabel, ticks: data.shots.map((name, i) => [data.places[i], name]) },
      y: { label: data.qualityLabel, log: data.unit === "token" },
      series: byMethod(data.entries, (e) => {
        const [title, lines] = facts(e);
        return [{ x: data.places[e.shots], y: e.quality[0], low: e.quality[1], high: e.quality[2], title, lines }];
      }),
    }),

    reliability: () => {
      const shots = state.shots === null ? data.reliabilityShots : state.shots;
      return {
        which: `, ${shotsText(shots)}`,
        diagonal: true,
        counts: true,
        x: { label: "Confidence, %", range: [0, 100] },
        y: { label: "Accuracy, %", range: [0, 100] },
        series: byMethod(data.entries.filter((e) => e.shots === shots), (e) =>
          e.bins.filter(([, , count]) => count >= data.sparse).map(([confidence, accuracy, count]) => ({
            x: confidence,
            y: accuracy,
            count,
            title: data.methods[e.method].name,
            lines: [`Confidence ${confidence.toFixed(1)} %`, `Accuracy ${accuracy.toFixed(1)} %`, `${count.toLocaleString("en")} test rows`],
          }))),
      };
    },

    regularization_path: () => {
      const entries = data.entries.filter((e) => e.method === REFERENCE && e.path && shown(e));
      const positive = entries.every((e) => e.path.scores.every((score) => score > 0));
      return {
        x: { log: true, label: entries.length ? `${entries[0].path.kind}, log` : "" },
        y: { log: positive, label: positive ? "Score, log" : "Score" },
        series: entries.map((e, i) => ({
          method: null,
          label: shotsText(e.shots),
          color: null,
          mark: "circle",
          opacity: 0.35 + (0.65 * (i + 1)) / entries.length,
          line: e.path.grid.map((value, k) => [value, e.path.scores[k]]),
          points: [{
            x: e.path.chosen,
            y: e.path.chosenScore,
            title: shotsText(e.shots),
            lines: [`Chosen ${e.path.kind} ${power(e.path.chosen)}`, `Score ${power(e.path.chosenScore)}`],
          }],
        })),
      };
    },
  };

  // ------------------------------------------------------------------ drawing

  function scale(axis, values, from, to) {
    const f = axis.log ? Math.log : (value) => value;
    let [low, high] = axis.range || [Math.min(...values), Math.max(...values)];
    if (!axis.range) {
      const room = (f(high) - f(low) || 1) * 0.06;
      const back = axis.log ? Math.exp : (value) => value;
      [low, high] = [back(f(low) - room), back(f(high) + room)];
    }
    const map = (value) => from + ((f(value) - f(low)) / (f(high) - f(low))) * (to - from);
    return { map, low, high };
  }

  function ticksOf(axis, { low, high }, count) {
    let ticks = axis.ticks ? axis.ticks.filter(([value]) => value >= low && value <= high) : [];
    if (ticks.length < 2 && !(axis.ticks && !axis.log)) ticks = axis.log ? powers(low, high) : steps(low, high, count);
    const every = Math.ceil(ticks.length / (count * 2));
    return ticks.filter((_, i) => i % every === 0);
  }

  class Chart {
    constructor(figure) {
      this.figure = figure;
      this.spec = CHARTS[figure.dataset.chart];
      this.canvas = figure.querySelector(".canvas");
      this.width = 0;
      this.current = 0;
      this.tip = document.createElement("div");
      this.tip.className = "tip";
      this.tip.hidden = true;
      this.tip.setAttribute("aria-hidden", "true"); // the point's label says the same
      // Reports once at the start, and then whenever the width changes.
      new ResizeObserver(([entry]) => {
        if (Math.abs(entry.contentRect.width - this.width) >= 1) this.draw();
      }).observe(this.canvas);
    }

    draw() {
      this.width = this.canvas.clientWidth;
      if (this.width === 0) return; // not laid out yet
      const chart = this.spec();
      this.series = chart.series;
      this.figure.querySelector(".which").textContent = chart.which || "";
      const named = this.width >= 420 && !chart.counts;
      const longest = Math.max(0, ...chart.series.map((series) => series.label.length));
      const right = this.width - (named ? Math.min(150, 16 + 6.8 * longest) : 14);
      const [left, top] = [44, 20];
      const bottom = Math.round(Math.min(380, Math.max(240, this.width * 0.58)));
      const height = bottom + 44 + (chart.counts ? 70 : 0);
      const lines = chart.series.map((series) => series.line || series.points.map((p) => [p.x, p.y]));
      const x = scale(chart.x, lines.flat().map(([value]) => value), left + 6, right);
      const ys = [...lines.flat().map(([, value]) => value), ...chart.series.flatMap((s) => s.points.flatMap((p) => (p.low === undefined ? [] : [p.low, p.high])))];
      const y = scale(chart.y, ys, bottom - 4, top + 4);

      const root = svg("svg", { viewBox: `0 0 ${this.width} ${height}`, height, class: chart.crowded ? "crowded" : "", role: "group", "aria-labelledby": `chart-${this.figure.dataset.chart}` });
      const frame = svg("g", { "aria-hidden": "true" });
      for (const [value, text] of ticksOf(chart.y, y, 5)) {
        frame.append(svg("path", { class: "grid", d: `M${left} ${Math.round(y.map(value))}H${right}` }));
        frame.append(svg("text", { x: left - 8, y: y.map(value) + 4, "text-anchor": "end" }, text));
      }
      const base = height - 44;
      for (const [value, text] of ticksOf(chart.x, x, this.width < 420 ? 3 : 5)) {
        frame.append(svg("path", { class: "axis", d: `M${Math.round(x.map(value))} ${base}v4` }));
        frame.append(svg("text", { x: x.map(value), y: base + 18, "text-anchor": "middle" }, text));
      }
      frame.append(svg("path", { class: "axis", d: `M${left} ${base}H${right}` }));
      frame.append(svg("text", { x: (left + right) / 2, y: height - 4, "text-anchor": "middle" }, chart.x.label));
      frame.append(svg("text", { x: 0, y: 10 }, chart.y.label));
      if (chart.diagonal) frame.append(svg("path", { class: "diagonal", d: `M${x.map(0)} ${y.map(0)}L${x.map(100)} ${y.map(100)}` }));
      if (chart.counts) frame.append(svg("text", { x: 0, y: bottom + 20 }, "Test rows"));
      root.append(frame);

      this.points = [];
      const groups = chart.series.map((series, index) => this.drawSeries(series, index, lines[index], x, y, chart.counts && [base, 44]));
      if (named) this.name(chart.series, groups, lines, x, y, top, bottom);
      root.append(...groups);
      this.root = root;
      this.current = Math.min(this.current, Math.max(0, this.points.length - 1));
      if (this.points.length) this.points[this.current].node.setAttribute("tabindex", "0");
      this.tip.hidden = true;
      this.canvas.replaceChildren(root, this.tip);
      this.listen();
      this.emphasize();
    }

    drawSeries(series, index, line, x, y, counts) {
      const group = svg("g", { class: `series${series.strong ? " strong" : ""}${series.color === null ? "" : ` s${series.color}`}` });
      const path = (pairs) => `M${pairs.map(([a, b]) => `${a.toFixed(1)} ${b.toFixed(1)}`).join("L")}`;
      const spread = series.points.filter((p) => p.low !== undefined);
      if (spread.length) {
        const outline = [...spread.map((p) => [x.map(p.x), y.map(p.high)]), ...spread.reverse().map((p) => [x.map(p.x), y.map(p.low)])];
        group.append(svg("path", { class: "band", d: `${path(outline)}Z` }));
        group.append(svg("path", { class: "bars", d: spread.map((p) => `M${x.map(p.x).toFixed(1)} ${y.map(p.low).toFixed(1)}V${y.map(p.high).toFixed(1)}`).join("") }));
      }
      if (counts) {
        const [base, tall] = counts;
        const most = Math.max(...this.series.flatMap((s) => s.points.map((p) => p.count)));
        const wide = (x.map(100) - x.map(0)) / 15;
        for (const p of series.points) {
          const size = (tall * p.count) / most;
          const bin = Math.min(14, Math.floor((p.x * 15) / 100)); // 15 bins, as the calibration error has
          group.append(svg("rect", { class: "columns", x: x.map(0) + bin * wide + 1, y: base - size, width: wide - 2, height: size }));
        }
      }
      group.append(svg("path", { class: "line", opacity: series.opacity || 1, d: path(line.map(([a, b]) => [x.map(a), y.map(b)])) }));
      for (const point of series.points) {
        const node = svg("g", {
          class: "point",
          transform: `translate(${x.map(point.x).toFixed(1)} ${y.map(point.y).toFixed(1)})`,
          tabindex: "-1",
          role: series.method === null ? "img" : "button",
          "aria-label": `${point.title}: ${point.lines.join(", ")}`,
        }, svg("circle", { class: "hit", r: 12 }), svg("circle", { class: "ring", r: 9 }), svg("path", { class: "mark", d: SHAPES[series.mark], transform: `scale(${series.strong ? 1.1 : 0.85})` }));
        group.append(node);
        this.points.push({ node, series: index, method: series.method, x: x.map(point.x), y: y.map(point.y), point });
      }
      return group;
    }

    name(allSeries, groups, lines, x, y, top, bottom) {
      const ends = allSeries.map((series, i) => ({ i, series, at: lines[i][lines[i].length - 1] })).map((end) => ({ ...end, px: x.map(end.at[0]), py: y.map(end.at[1]) }));
      ends.sort((a, b) => a.px - b.px);
      // Names that reach below each other share a column, in which they are kept apart.
      const columns = [];
      let reach = -Infinity;
      for (const end of ends) {
        if (end.px > reach) columns.push([]);
        columns[columns.length - 1].push(end);
        reach = Math.max(reach, end.px + 10 + 7 * end.series.label.length);
      }
      for (const column of columns) {
        column.sort((a, b) => a.py - b.py);
        const heights = apart(column.map((end) => end.py), 15, top, bottom - 8);
        column.forEach((end, k) => {
          const far = Math.abs(heights[k] - end.py) > 6;
          const leader = svg("path", { class: "leader", d: far ? `M${end.px + 2} ${end.py}L${end.px + 12} ${heights[k]}` : "" });
          const text = svg("text", { class: "name", x: end.px + (far ? 14 : 10), y: heights[k] + 4, "aria-hidden": "true" }, end.series.label);
          if (end.series.method === null) text.classList.add("label");
          groups[end.i].prepend(leader); // beneath the marks
          groups[end.i].append(text);
        });
      }
    }

    // ---------------------------------------------------------------- pointing, keys

    listen() {
      this.root.addEventListener("pointermove", (event) => this.point(this.nearest(event)));
      this.root.addEventListener("pointerleave", () => this.point(null));
      this.root.addEventListener("click", (event) => {
        const found = this.nearest(event);
        if (found && found.method !== null) pick(found.method);
      });
      this.points.forEach((entry, index) => {
        entry.node.addEventListener("focus", () => { this.rove(index); this.point(entry); });
        entry.node.addEventListener("blur", () => this.point(null));
      });
      this.root.addEventListener("keydown", (event) => this.key(event));
    }

    nearest(event) {
      const box = this.root.getBoundingClientRect();
      const [px, py] = [event.clientX - box.left, event.clientY - box.top];
      let [best, least] = [null, 28];
      for (const entry of this.points) {
        const distance = Math.hypot(entry.x - px, entry.y - py);
        if (distance < least) [best, least] = [entry, distance];
      }
      return best;
    }

    point(entry) {
      for (const other of this.points) other.node.classList.toggle("near", other === entry);
      this.tip.hidden = !entry;
      if (!entry) return;
      const strong = document.createElement("strong");
      strong.textContent = entry.point.title;
      this.tip.replaceChildren(strong, ...entry.point.lines.map((line) => {
        const div = document.createElement("div");
        div.textContent = line;
        return div;
      }));
      this.tip.style.left = "0"; // where it is not squeezed, to be measured
      const [wide, tall] = [this.tip.offsetWidth, this.tip.offsetHeight];
      this.tip.style.left = `${Math.max(0, Math.min(entry.x - wide / 2, this.width - wide))}px`;
      this.tip.style.top = `${entry.y - tall - 14 < 0 ? entry.y + 14 : entry.y - tall - 14}px`;
    }

    rove(index) {
      this.points[this.current].node.setAttribute("tabindex", "-1");
      this.current = index;
      this.points[index].node.setAttribute("tabindex", "0");
    }

    key(event) {
      const here = this.points[this.current];
      const last = this.points.length - 1;
      const series = this.points.filter((entry) => entry.series === here.series);
      const other = (step) => {
        const count = this.series.length;
        const target = this.points.filter((entry) => entry.series === (here.series + step + count) % count);
        return this.points.indexOf(target[Math.min(series.indexOf(here), target.length - 1)]);
      };
      const moves = {
        ArrowRight: () => Math.min(last, this.current + 1),
        ArrowLeft: () => Math.max(0, this.current - 1),
        ArrowUp: () => other(1),
        ArrowDown: () => other(-1),
        Home: () => 0,
        End: () => last,
      };
      if (event.key in moves) {
        this.points[moves[event.key]()].node.focus();
      } else if ((event.key === "Enter" || event.key === " ") && here.method !== null) {
        pick(here.method);
      } else if (event.key === "Escape") {
        this.point(null);
      } else {
        return;
      }
      event.preventDefault();
    }

    emphasize() {
      if (!this.root) return;
      const methods = this.series.map((series) => series.method);
      this.root.classList.toggle("picking", state.picked.size > 0 && !methods.includes(null));
      this.root.querySelectorAll(".series").forEach((group, i) => group.classList.toggle("on", state.picked.has(methods[i])));
      for (const { node, method } of this.points) {
        if (method !== null) node.setAttribute("aria-pressed", String(state.picked.has(method)));
      }
    }
  }

  // ------------------------------------------------------------------ picking, shots

  const charts = [];
  const chips = [...document.querySelectorAll(".chip")];
  const clear = document.getElementById("clear");
  const status = document.getElementById("status");

  function pick(method) {
    if (!state.picked.delete(method)) state.picked.add(method);
    emphasize();
  }

  function emphasize() {
    chips.forEach((chip, i) => chip.setAttribute("aria-pressed", String(state.picked.has(i))));
    clear.hidden = state.picked.size === 0;
    charts.forEach((chart) => chart.emphasize());
  }

  for (const mark of document.querySelectorAll("svg[data-mark]")) mark.append(svg("path", { d: SHAPES[mark.dataset.mark] }));
  chips.forEach((chip, i) => chip.addEventListener("click", () => pick(i)));
  if (clear) {
    clear.addEventListener("click", () => {
      state.picked.clear();
      emphasize();
      chips[0].focus();
    });
  }
  for (const input of document.querySelectorAll("input[name=shots]")) {
    input.addEventListener("change", () => {
      state.shots = input.value === "" ? null : Number(input.value);
      for (const body of document.querySelectorAll("tbody[data-shots]")) {
        body.hidden = state.shots !== null && Number(body.dataset.shots) !== state.shots;
      }
      charts.forEach((chart) => chart.draw());
      status.textContent = state.shots === null ? `Every number of ${data.unit}s` : shotsText(state.shots);
    });
  }

  // ------------------------------------------------------------------ the table

  const heads = [...document.querySelectorAll(".figures thead th")];

  function sort(column) {
    const head = heads[column];
    const before = head.getAttribute("aria-sort");
    const order = before === null ? head.dataset.first : before === "ascending" ? "descending" : "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const value = (row) => {
      const cell = row.cells[column];
      return cell && cell.dataset.sort ? Number(cell.dataset.sort) : null;
    };
    for (const body of document.querySelectorAll(".figures tbody")) {
      const rows = [...body.querySelectorAll("tr.row")];
      rows.sort((a, b) => {
        const [p, q] = [value(a), value(b)];
        if (p === null || q === null) return (p === null) - (q === null); // what is not known comes last, either way
        return p === q ? 0 : sign * (p < q ? -1 : 1);
      });
      body.append(...rows);
    }
    status.textContent = `Sorted by ${head.querySelector(".head-button").textContent}, ${order}`;
  }

  heads.forEach((head, column) => {
    const text = head.querySelector(".head");
    const button = document.createElement("button");
    button.type = "button";
    button.className = "head-button";
    button.textContent = text.textContent;
    button.addEventListener("click", () => sort(column));
    text.replaceWith(button);
  });

  // ------------------------------------------------------------------ light and dark

  const toggle = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (document.documentElement.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
  const caption = () => { toggle.textContent = dark() ? "Light theme" : "Dark theme"; };
  toggle.addEventListener("click", () => {
    document.documentElement.dataset.theme = dark() ? "light" : "dark";
    caption();
  });
  system.addEventListener("change", caption);
  caption();

  // ------------------------------------------------------------------ what only works with a script appears

  for (const node of document.querySelectorAll(".controls, .scripted, #theme")) node.hidden = false;
  for (const figure of document.querySelectorAll("figure.chart")) charts.push(new Chart(figure));
})();
