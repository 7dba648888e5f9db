// The graph of the page: zoom, drag, choose, search. Without it boxes are links to the cards below; nothing else needs it.
"use strict";
(() => {
  const at = (id) => document.getElementById(id);
  const [explorer, svg, scene, panel, find, found] = ["explorer", "picture", "scene", "panel", "find", "found"].map(at);
  const by = (name, within) => new Map([...within.querySelectorAll(`[data-${name}]`)].map((e) => [e.dataset[name], e]));
  const nodes = by("node", scene), cards = by("card", document), edges = [...scene.querySelectorAll("[data-from]")];
  const view = { x: 0, y: 0, k: 1 };  // k = 1 shows all
  const READABLE = 1;  // pixels a unit

  // ---------------------------------------------------------------------------------------------- where one looks
  const scale = () => svg.getScreenCTM().a;
  const units = (x, y) => new DOMPoint(x, y).matrixTransform(svg.getScreenCTM().inverse());
  const draw = () => scene.setAttribute("transform", `translate(${view.x} ${view.y}) scale(${view.k})`);

  function zoom(factor, point) {
    const k = Math.min(Math.max(view.k * factor, 0.7), Math.max(4, 3 / scale()));
    view.x = point.x - (point.x - view.x) * (k / view.k);
    view.y = point.y - (point.y - view.y) * (k / view.k);
    view.k = k;
    draw();
  }
  function middle(share = 0.5) {
    const box = svg.getBoundingClientRect();
    return units(box.left + box.width / 2, box.top + box.height * share);
  }
  function centre(node, share) {
    const box = node.getBBox(), to = middle(share);
    view.x = to.x - (box.x + box.width / 2) * view.k;
    view.y = to.y - (box.y + box.height / 2) * view.k;
    draw();
  }
  function uncover(node) {
    const box = node.getBoundingClientRect(), all = svg.getBoundingClientRect();
    if (box.left < all.left || box.right > all.right || box.top < all.top || box.bottom > all.bottom) centre(node);
  }
  function fit() { Object.assign(view, { x: 0, y: 0, k: 1 }); draw(); }
  function start() {
    fit();
    if (scale() >= 0.6) return;
    view.k = READABLE / scale();
    centre(nodes.get("0"), 0.1);
  }
  const pan = (dx, dy) => { view.x += dx / scale(); view.y += dy / scale(); draw(); };
  const acts = {
    in: () => zoom(1.3, middle()), out: () => zoom(1 / 1.3, middle()), fit,
    root: () => { start(); show("0"); },
  };

  // ---------------------------------------------------------------------------------------------- what is chosen
  function reach(number, from, to) {  // everything that edges lead to, and the edges
    const seen = new Set([number]), used = new Set();
    for (const here of seen)
      for (const edge of edges)
        if (edge.dataset[from] === here) { seen.add(edge.dataset[to]); used.add(edge); }
    seen.delete(number);
    return [...[...seen].map((n) => nodes.get(n)), ...used];
  }
  function show(number) {
    const card = cards.get(number), node = nodes.get(number);
    if (!card) return;
    for (const e of scene.children) e.classList.remove("picked", "before", "after");
    svg.classList.toggle("chosen", Boolean(node) && number !== "0");
    if (node) {
      node.classList.add("picked");
      reach(number, "from", "to").forEach((e) => e.classList.add("before"));
      reach(number, "to", "from").forEach((e) => e.classList.add("after"));
      uncover(node);
    }
    panel.replaceChildren(...card.cloneNode(true).childNodes);
    panel.dataset.shows = number;
    panel.scrollTop = 0;
  }

  // ------------------------------------------------------------------------------------------------------- search
  const words = new Map([...cards].map(([number, card]) => {
    const parts = [...card.querySelectorAll("h3, .digest, .files li")].map((e) => e.textContent);
    return [number, parts.join("\n").toLowerCase()];
  }));
  let hits = [], hit = -1;
  function search() {
    const query = find.value.trim().toLowerCase();
    hits = query ? [...words].filter(([, text]) => text.includes(query)).map(([number]) => number) : [];
    hit = -1;
    svg.classList.toggle("searching", hits.length > 0);
    for (const [number, node] of nodes) node.classList.toggle("hit", hits.includes(number));
    found.textContent = query ? `${hits.length} found` : "";
  }
  function next() {
    if (!hits.length) return;
    hit = (hit + 1) % hits.length;
    found.textContent = `${hit + 1} of ${hits.length}`;
    show(hits[hit]);
  }

  // ------------------------------------------------------------------------------------------------------- events
  explorer.addEventListener("click", (event) => {
    const button = event.target.closest("[data-do]"), link = event.target.closest("a[href^='#n']");
    if (button) acts[button.dataset.do]();
    if (!link) return;
    event.preventDefault();
    if (!moved) show(link.getAttribute("href").slice(2));
  });
  // Not on the scene: an SVG element that listens for focus takes it.
  explorer.addEventListener("focusin", (event) => {
    const node = event.target.closest("[data-node]");
    if (node && node.matches(":focus-visible")) show(node.dataset.node);
  });
  explorer.addEventListener("keydown", (event) => {
    if (event.target === find || event.ctrlKey || event.metaKey || event.altKey) return;
    const step = 60, moves = { ArrowLeft: [step, 0], ArrowRight: [-step, 0], ArrowUp: [0, step], ArrowDown: [0, -step] };
    const act = { "+": "in", "=": "in", "-": "out", 0: "fit", Home: "root" }[event.key];
    if (act) acts[act]();
    else if (moves[event.key] && svg.contains(event.target)) pan(...moves[event.key]);
    else return;
    event.preventDefault();
  });
  // The wheel scrolls the page until somebody has touched the picture; a pinch zooms at once.
  svg.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !svg.contains(document.activeElement)) return;
    event.preventDefault();
    zoom(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.002)), units(event.clientX, event.clientY));
  }, { passive: false });
  let held = null, moved = false;
  svg.addEventListener("pointerdown", (event) => {
    if (event.button === 0) [held, moved] = [[event.clientX, event.clientY], false];
    svg.focus({ preventScroll: true });
  });
  svg.addEventListener("pointermove", (event) => {
    if (!held) return;
    const [dx, dy] = [event.clientX - held[0], event.clientY - held[1]];
    if (!moved && Math.hypot(dx, dy) < 5) return;
    if (!moved) svg.setPointerCapture(event.pointerId);
    [held, moved] = [[event.clientX, event.clientY], true];
    pan(dx, dy);
  });
  for (const end of ["pointerup", "pointercancel"]) svg.addEventListener(end, () => { held = null; });
  svg.addEventListener("dragstart", (event) => event.preventDefault());
  find.addEventListener("input", search);
  find.addEventListener("keydown", (event) => {
    if (event.key === "Enter") next();
    if (event.key === "Escape") { find.value = ""; search(); }
  });
  const folded = [...document.querySelectorAll("details.open-in-print")];
  let closed = [];
  addEventListener("beforeprint", () => { closed = folded.filter((d) => !d.open); closed.forEach((d) => { d.open = true; }); });
  addEventListener("afterprint", () => closed.forEach((d) => { d.open = false; }));

  explorer.classList.add("live");
  svg.setAttribute("tabindex", "0");
  at("tools").hidden = panel.hidden = false;
  start();
  show("0");
})();
