// The mask lens in the browser: draws the payload of payload.py. Text reaches the page as text nodes and nothing
// else, so that no data can become markup; one listener each for pointing, clicking and keys serves all tokens.

const TOKENS_IN_BLOCK = 120; // a block ends with the line after so many tokens, or without one after twice as many
const IGNORED = -100;

function make(tag, parent, className = "", text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== "") element.textContent = text;
  parent.append(element);
  return element;
}

function paint(element, [back, ink]) {
  element.style.setProperty("--back", back);
  element.style.setProperty("--ink", ink);
}

function header(parent, side, reasons) {
  const head = make("div", parent);
  const line = make("div", head);
  if (side.name) make("b", line, "", side.name + " · ");
  make("b", line, "", side.id);
  line.append(" · " + side.facts);
  for (const note of side.notes) make("div", head, "note", "⚠ " + note);
  const bar = make("div", head, "bar");
  const legend = make("div", head);
  for (const [reason, count, share] of side.shares) {
    const [back, ink, meaning] = reasons[reason];
    const part = make("div", bar);
    part.style.width = 100 * share + "%";
    part.style.backgroundColor = back;
    const chip = make("span", legend, "reason");
    part.title = chip.title = meaning ? reason + ": " + meaning : reason;
    const name = make("span", chip, "", reason);
    name.style.backgroundColor = back;
    name.style.color = ink;
    chip.append(" " + count.toLocaleString("en") + " ");
    make("span", chip, "muted", (100 * share).toFixed(1) + "%");
  }
}

function table(parent, lines) {
  const rows = make("table", parent);
  for (const [at, line] of lines.entries()) {
    const row = make("tr", rows);
    for (const cell of line) make(at ? "td" : "th", row, "", cell);
  }
}

// The tokens of one turn of one side. Every token and picture joins `order`, and knows its run and position.
class Cell {
  constructor(parent, payload, order, whitespace) {
    this.cell = make("div", parent);
    Object.assign(this, { payload, order, whitespace });
    this.block = this.group = null;
  }

  // A run's tokens lie in one group a block, so that folding and colours are set once.
  begin(run, side) {
    if (this.block === null) {
      this.block = make("div", this.cell, "block");
      this.count = this.characters = 0;
    }
    this.group = make("span", this.block, run.trains ? "run" : "run idle");
    paint(this.group, this.payload.reasons[run.reason]);
    this.run = run;
    this.side = side;
  }

  end() {
    if (this.block === null) return;
    const lines = 1 + Math.ceil(this.characters / 100) + this.block.getElementsByTagName("br").length;
    this.block.style.containIntrinsicSize = "auto " + 21 * lines + "px";
    this.block = null;
  }

  add(run, side) {
    this.begin(run, side);
    make("span", this.group, "folded muted", (run.media ?? run.reason) + " · " + (run.end - run.start).toLocaleString("en"));
    if (run.media !== undefined) return this.addMedia();
    let at = run.start;
    for (const part of run.parts) {
      this.gap(at, part.at);
      part.pieces.forEach((place, index) => this.addToken(part, index, this.payload.pieces[place]));
      at = part.at + part.ids.length;
    }
    this.gap(at, run.end);
  }

  addToken(part, index, piece) {
    const [visible, plain, breaks] = piece;
    const token = make("bdi", this.group, "token");
    token.append(this.whitespace ? visible : plain); // one text node, also where it is empty
    const label = part.labels === null ? IGNORED : part.labels[index];
    token.dataset.id = part.ids[index];
    this.know(token, { position: part.at + index, id: part.ids[index], label: label === IGNORED ? null : label });
    token.piece = piece;
    for (let n = 0; n < breaks; n++) make("br", this.group);
    this.count += 1;
    this.characters += visible.length + 1;
    if ((breaks && this.count > TOKENS_IN_BLOCK) || this.count > 2 * TOKENS_IN_BLOCK) {
      this.end();
      this.begin(this.run, this.side);
    }
  }

  addMedia() {
    const { run } = this;
    const media = this.payload.media[run.media];
    const box = make("div", this.group, "media");
    for (const { src, width, height } of media.pictures) {
      if (!src.startsWith("data:image/")) continue;
      Object.assign(make("img", box), { src, width, height, alt: "" });
    }
    const text = make("div", box);
    for (const line of [media.title, ...run.lines, media.note]) if (line) make("div", text, "", line);
    this.know(box, { position: run.start, id: null, label: null });
    this.characters += 100;
  }

  know(element, token) {
    element.token = token;
    element.run = this.run;
    element.side = this.side;
    this.order.push(element);
  }

  gap(start, end) {
    if (end <= start) return;
    const words = [end - start, start, end - 1].map((number) => number.toLocaleString("en"));
    make("div", this.group, "gap muted", `… ${words[0]} tokens, ${words[1]} to ${words[2]}, are not drawn …`);
  }
}

// What JupyterLab is to hear from here too: Ctrl+S saves, Ctrl+Enter and Shift+Enter run the cell.
function isShortcut({ ctrlKey, metaKey, altKey, shiftKey, key }) {
  return ctrlKey || metaKey || altKey || (shiftKey && key === "Enter");
}

// While one of these elements has the focus, other keys are not JupyterLab's (where "d" "d" deletes the cell). It
// listens at the document, before them, and passes over what has this attribute; the window hears keys before it.
// Returns what ends that.
function keepKeys(elements) {
  const keep = (element, kept) => element.toggleAttribute("data-lm-suppress-shortcuts", kept);
  const listener = (event) => elements.includes(event.target) && keep(event.target, !isShortcut(event));
  for (const element of elements) keep(element, true);
  window.addEventListener("keydown", listener, true);
  return () => window.removeEventListener("keydown", listener, true);
}

function described({ token, run }) {
  if (run.media !== undefined) return `positions ${run.start} to ${run.end - 1} · no label\n${run.where}`;
  return `position ${token.position} · id ${token.id} · label ${token.label ?? "none"}\n${run.where}`;
}

function render({ model, el }) {
  const payload = model.get("payload");
  const root = make("div", el, "ovisnb-lens");
  root.dir = "ltr";

  const switches = make("div", root, "switches");
  const boxes = {};
  for (const [name, words] of [
    ["only_supervised", "only supervised"],
    ["token_ids", "token ids"],
    ["whitespace", "mark white space"],
  ]) {
    const label = make("label", switches);
    boxes[name] = Object.assign(make("input", label), { type: "checkbox", name });
    label.append(words);
    boxes[name].addEventListener("change", () => {
      model.set(name, boxes[name].checked);
      model.save_changes();
    });
  }
  if (payload.table.length) table(root, payload.table);
  const heads = make("div", root, payload.sides.length > 1 ? "columns" : "");
  for (const side of payload.sides) header(heads, side, payload.reasons);

  const body = make("div", root, "body");
  body.tabIndex = 0;
  const giveKeysBack = keepKeys([body, ...Object.values(boxes)]);
  body.setAttribute("role", "group");
  body.setAttribute("aria-label", "tokens: the arrow keys, Home and End walk along them");
  const order = [];
  const rows = document.createDocumentFragment();
  for (const row of payload.rows) {
    const line = make("div", rows, payload.sides.length > 1 ? "columns" : "");
    row.forEach((indices, at) => {
      const side = payload.sides[at];
      const cell = new Cell(line, payload, order, model.get("whitespace"));
      for (const index of indices) cell.add(side.runs[index], side.name);
      cell.end();
    });
  }
  body.append(rows);
  const detail = make("div", root, "detail muted");
  detail.setAttribute("role", "status");
  const tip = make("div", root, "tip");
  tip.hidden = true;

  const tokenOf = (event) => event.target.closest?.(".token, .media");

  body.addEventListener("pointerover", (event) => {
    const token = tokenOf(event);
    tip.hidden = !token;
    if (!token) return;
    tip.textContent = described(token);
    const [frame, place] = [root.getBoundingClientRect(), token.getBoundingClientRect()];
    const left = Math.min(place.left - frame.left, Math.max(0, frame.width - tip.offsetWidth - 4));
    tip.style.left = Math.max(0, left) + "px";
    const below = place.bottom + tip.offsetHeight + 4 <= frame.bottom;
    tip.style.top = (below ? place.bottom + 4 : place.top - tip.offsetHeight - 4) - frame.top + "px";
  });
  body.addEventListener("pointerleave", () => (tip.hidden = true));
  body.addEventListener("scroll", () => (tip.hidden = true));

  function select(element) {
    const { start, end, role, turn, reason, kind } = element.run;
    model.set("selected", { side: element.side, ...element.token, start, end, role, turn, reason, kind });
    model.save_changes();
  }
  body.addEventListener("click", (event) => {
    const token = tokenOf(event);
    if (token) select(token);
  });
  body.addEventListener("keydown", (event) => {
    if (isShortcut(event)) return;
    if (event.key === "Escape") {
      model.set("selected", null);
      model.save_changes();
    }
    const folded = (element) => model.get("only_supervised") && !element.run.trains;
    const open = order.filter((element) => element === current || !folded(element));
    const at = open.indexOf(current);
    const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: open.length - 1 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    const wanted = open[Math.max(0, next)];
    if (!wanted || folded(wanted)) return;
    select(wanted);
    wanted.scrollIntoView({ block: "nearest" });
  });

  let current = null;
  // Scrolls the tokens and not the page: it may be another view, far away, in which somebody clicked.
  function reveal() {
    if (!current?.getClientRects().length) return;
    const [frame, place] = [body.getBoundingClientRect(), current.getBoundingClientRect()];
    if (place.top < frame.top || place.bottom > frame.bottom) body.scrollTop += place.top - frame.top - 10;
  }
  function showSelected() {
    const wanted = model.get("selected");
    current?.classList.remove("selected");
    const holds = ({ token, run, side }) =>
      side === wanted.side &&
      (run.media === undefined
        ? token.position === wanted.position
        : run.start <= wanted.position && wanted.position < run.end);
    current = wanted ? (order.find(holds) ?? null) : null;
    current?.classList.add("selected");
    reveal();
    requestAnimationFrame(reveal); // by now blocks that came into view have their true height
    detail.textContent = current ? "selected: " + described(current).replace("\n", " · ") : "";
  }
  function showSwitches() {
    for (const [name, box] of Object.entries(boxes)) box.checked = model.get(name);
    body.classList.toggle("only-supervised", model.get("only_supervised"));
    body.classList.toggle("token-ids", model.get("token_ids"));
  }
  function showWhitespace() {
    const form = model.get("whitespace") ? 0 : 1;
    for (const { piece, firstChild } of order) {
      if (piece && piece[0] !== piece[1]) firstChild.data = piece[form];
    }
  }
  const follow = {
    "change:only_supervised": showSwitches,
    "change:token_ids": showSwitches,
    "change:whitespace": () => (showSwitches(), showWhitespace()),
    "change:selected": showSelected,
  };
  for (const [name, listener] of Object.entries(follow)) model.on(name, listener);
  showSwitches();
  showSelected();
  return () => {
    giveKeysBack();
    Object.entries(follow).forEach(([name, listener]) => model.off(name, listener));
  };
}

export default { render };
