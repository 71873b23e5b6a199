
"use strict";
(() => {
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const tools = document.getElementById("tools");
  const plots = [];

  // "3": the colour of run 3; "3/10": the third of ten shades, from violet to orange.
  function colourOf(spec) {
    if (typeof spec === "number") return css(`--run-${spec}`);
    const [k, count] = spec.split("/").map(Number);
    return `hsl(${270 - (240 * k) / (count - 1)} 75% ${css("--shade")})`;
  }

  function make(tag, name, text) {
    const node = document.createElement(tag);
    if (name) node.className = name;
    if (text !== undefined) node.textContent = text;
    return node;
  }

  // Exponential moving average with bias correction, like TensorBoard's.
  function smoothed(ys, share) {
    let sum = 0, weight = 0;
    return ys.map((y) => {
      if (y === null) return null;
      sum = share * sum + (1 - share) * y;
      weight = share * weight + (1 - share);
      return sum / weight;
    });
  }

  function shown(value, percent) {
    if (value === null || value === undefined) return "–";
    if (percent) return `${+(100 * value).toPrecision(3)}%`;
    const rounded = +value.toPrecision(4);
    return rounded && Math.abs(rounded) < 1e-3 ? rounded.toExponential() : String(rounded);
  }

  // The value of a series at an index of the shared axis, or the last value before it.
  function valueAt(ys, at) {
    for (let k = at; k >= 0; k--) if (ys[k] !== undefined) return ys[k];
    return undefined;
  }

  class Plot {
    constructor(chart, place) {
      this.chart = chart;
      this.hidden = new Set();
      const box = make("div", "chart");
      const head = box.appendChild(make("div", "head"));
      head.append(make("h4", "", chart.title));
      this.at = head.appendChild(make("span", "at"));
      if (chart.note) box.append(make("p", "note", chart.note));
      this.holder = box.appendChild(make("div", "plot"));
      this.holder.tabIndex = 0;
      this.holder.setAttribute("role", "img");
      this.holder.setAttribute("aria-label", this.words());
      const legend = box.appendChild(make("ul", "legend"));
      this.keys = chart.series.map((series, number) => {
        const key = make("button");
        key.type = "button";
        key.setAttribute("aria-pressed", "true");
        const stroke = key.appendChild(make("span", `stroke${series.dashed ? " dashed" : ""}`));
        key.append(make("span", "", series.label));
        const live = key.appendChild(make("span", "live"));
        key.addEventListener("click", () => this.toggle(number));
        legend.appendChild(make("li")).append(key);
        return { key, stroke, live };
      });
      this.holder.addEventListener("keydown", (event) => this.walk(event));
      place.append(box);
      this.draw();
      new ResizeObserver(() => this.plot.setSize(this.size())).observe(this.holder);
    }

    // The curves in words, for screen readers.
    words() {
      const parts = this.chart.series.map((series) => {
        const known = series.ys.filter((y) => y !== null);
        const ends = [known[0], known[known.length - 1]].map((y) => shown(y, this.chart.percent));
        return `${series.label} from ${ends[0]} to ${ends[1]}`;
      });
      return `${this.chart.title}: ${parts.join("; ")}`;
    }

    size() {
      return { width: Math.max(200, this.holder.clientWidth), height: this.holder.clientHeight };
    }

    draw() {
      const { chart } = this;
      const share = tools ? Number(tools.elements.smoothing.value) : 0;
      const log = chart.log && tools && tools.elements.log.checked;
      const usable = (ys) => (log ? ys.map((y) => (y > 0 ? y : null)) : ys);
      const lines = [], tables = [];
      this.mine = chart.series.map(() => []); // indices of uPlot's series, by ours
      chart.series.forEach((series, number) => {
        const stroke = colourOf(series.colour);
        this.keys[number].stroke.style.setProperty("--c", stroke);
        const faint = series.smooth && share > 0;
        const add = (ys, options) => {
          tables.push([series.xs, usable(ys)]);
          lines.push({
            label: series.label, stroke, width: 2, dash: series.dashed ? [6, 5] : undefined,
            points: { show: series.xs.length < 30 && !series.smooth, size: 5, fill: stroke }, spanGaps: false,
            show: !this.hidden.has(number), ...options,
          });
          this.mine[number].push(lines.length);
        };
        // Not for many series, whose faint lines would be unreadable.
        if (faint && chart.series.length <= 6) {
          add(series.ys, { width: 1, alpha: 0.3, points: { show: false } });
        }
        add(faint ? smoothed(series.ys, share) : series.ys, {});
      });
      const data = uPlot.join(tables);
      const axis = { stroke: css("--soft"), grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line"), width: 1 } };
      const was = this.plot && this.zoomed ? { ...this.plot.scales.x } : null;
      if (this.plot) this.plot.destroy();
      this.plot = new uPlot({
        ...this.size(),
        legend: { show: false },
        scales: {
          x: { time: false },
          y: log ? { distr: 3, range: (u, least, most) => [0.9 * least, 1.1 * most] } : {},
        },
        cursor: {
          sync: { key: chart.x, scales: ["x", null] },
          points: { size: 7 },
          focus: { prox: -1 },
        },
        axes: [
          { ...axis, size: 30 },
          { ...axis, size: 58, values: (u, ticks) => ticks.map((tick) => (tick === null ? "" : shown(tick, chart.percent))) },
        ],
        series: [{}, ...lines],
        hooks: {
          setCursor: [() => this.tell()],
          setScale: [(u, key) => {
            if (key !== "x") return;
            const xs = u.data[0];
            this.zoomed = u.scales.x.min > xs[0] || u.scales.x.max < xs[xs.length - 1];
            this.holder.toggleAttribute("data-zoomed", this.zoomed);
          }],
        },
      }, data, this.holder);
      if (was) this.plot.setScale("x", { min: was.min, max: was.max });
      this.tell();
    }

    // Show the values under the cursor, or the last values without one.
    tell() {
      const u = this.plot;
      if (!u) return;
      const xs = u.data[0];
      const at = u.cursor.idx ?? xs.length - 1;
      const beyond = ({ xs: own }) => u.cursor.idx !== null && xs[at] > own[own.length - 1];
      this.at.textContent = `${this.chart.x} ${xs[at] ?? "–"}`;
      this.keys.forEach(({ live }, number) => {
        const [last] = this.mine[number].slice(-1);
        const value = beyond(this.chart.series[number]) ? null : valueAt(u.data[last], at);
        live.textContent = shown(value, this.chart.percent);
      });
    }

    toggle(number) {
      const show = this.hidden.delete(number);
      if (!show) this.hidden.add(number);
      this.keys[number].key.setAttribute("aria-pressed", String(show));
      this.mine[number].forEach((line) => this.plot.setSeries(line, { show }));
    }

    walk(event) {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!by) return;
      event.preventDefault();
      const u = this.plot, xs = u.data[0];
      const [first, last] = u.series[0].idxs; // in view
      const at = Math.min(last, Math.max(first, (u.cursor.idx ?? (by > 0 ? first - 1 : last + 1)) + by));
      u.setCursor({ left: u.valToPos(xs[at], "x"), top: u.over.clientHeight / 2 });
    }

    reset() {
      this.plot.setData(this.plot.data);
    }
  }

  // Charts in a folded part are drawn when it is opened.
  function drawIn(place) {
    for (const chart of JSON.parse(place.querySelector("script").textContent)) plots.push(new Plot(chart, place));
  }
  for (const place of document.querySelectorAll("[data-charts]")) {
    const folded = place.closest("details:not([open])");
    if (folded) folded.addEventListener("toggle", () => drawIn(place), { once: true });
    else drawIn(place);
  }
  const redraw = () => plots.forEach((plot) => plot.draw());
  dark.addEventListener("change", redraw);
  if (tools) {
    tools.addEventListener("submit", (event) => event.preventDefault());
    tools.addEventListener("input", () => {
      tools.elements.amount.value = Number(tools.elements.smoothing.value).toFixed(2);
      redraw();
    });
    tools.elements.reset.addEventListener("click", () => plots.forEach((plot) => plot.reset()));
  }

  // Unfold what a link leads to.
  function unfold() {
    const target = document.getElementById(location.hash.slice(1));
    if (target instanceof HTMLDetailsElement) {
      target.open = true;
      target.scrollIntoView();
    }
  }
  addEventListener("hashchange", unfold);
  unfold();

  // Sort a table by the column of a heading: again, and in reverse. Rows without a value come last.
  function sort(button) {
    const head = button.closest("th"), body = head.closest("table").tBodies[0];
    const was = head.getAttribute("aria-sort"), first = button.dataset.sort === "down" ? "descending" : "ascending";
    const order = was ? (was === "ascending" ? "descending" : "ascending") : first;
    const sign = order === "ascending" ? 1 : -1;
    const key = (row) => parseFloat(row.cells[head.cellIndex].dataset.value);
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      return isNaN(x) || isNaN(y) ? isNaN(x) - isNaN(y) : sign * (x - y);
    });
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
    body.append(...rows);
  }
  for (const button of document.querySelectorAll("[data-sort]")) button.addEventListener("click", () => sort(button));

  // Show the rows of a table that have one of the chosen states, and the text that was typed in their names.
  const filter = document.getElementById("filter");
  if (filter) {
    const { name, shown } = filter.elements;
    const rows = [...document.querySelectorAll("tr[data-state]")];
    const choose = () => {
      const states = new Set([...filter.querySelectorAll("[name=state]:checked")].map((box) => box.value));
      const text = name.value.trim().toLowerCase();
      for (const row of rows) row.hidden = !states.has(row.dataset.state) || !row.dataset.name.toLowerCase().includes(text);
      shown.value = `${rows.filter((row) => !row.hidden).length} shown`;
    };
    filter.addEventListener("submit", (event) => event.preventDefault());
    filter.addEventListener("input", choose);
    choose(); // a browser that reloads the page keeps what was chosen
  }

  // Enlarge an image. The arrow keys go through its row, or its part of the page.
  const viewer = document.getElementById("viewer");
  const [large, caption, file] = ["img", "#caption", "a"].map((name) => viewer.querySelector(name));
  let row = [], now = 0;

  function look(to) {
    if (to < 0 || to >= row.length) return;
    now = to;
    const { dataset, firstElementChild: small } = row[now];
    large.src = small.src;
    large.alt = small.alt;
    caption.textContent = small.alt;
    file.hidden = !dataset.href;
    if (dataset.href) file.href = dataset.href;
    for (const button of viewer.querySelectorAll("[data-go]")) {
      const next = now + Number(button.dataset.go);
      button.disabled = next < 0 || next >= row.length;
    }
  }

  document.addEventListener("click", (event) => {
    const shot = event.target.closest(".shot");
    if (!shot) return;
    row = [...shot.closest("tr, .grid, .sheets").querySelectorAll(".shot")];
    look(row.indexOf(shot));
    viewer.showModal();
  });
  viewer.addEventListener("click", (event) => {
    const { go, close } = event.target.dataset;
    if (go) look(now + Number(go));
    if (close !== undefined || event.target === viewer) viewer.close();
  });
  viewer.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by) look(now + by);
  });
})();
