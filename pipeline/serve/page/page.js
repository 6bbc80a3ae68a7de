// The page: its state, what people do to it, and the searches that follow.

import { keepToken, picture as showPicture, schema, search } from "/page/api.js";
import { buildFilters, described } from "/page/filters.js";
import { card, detail } from "/page/results.js";
import { conditions, fromAddress, isAsking, MODES, modeOf, toAddress } from "/page/state.js";
import { make, number, visible } from "/page/text.js";

const PAGE = 24;
const GROUPED = 5 * PAGE; // so many are put into groups; pages agree with each other as far as that
const ALIKE = 0.02;

const $ = (id) => document.getElementById(id);
const titles = new Map(); // of products that were shown
let state = fromAddress(location.search);
let known = null; // the schema
let showers = new Map(); // of the filters
let shownHits = [];
let places = new Map();
let running = null;
let pictureUrl = "";
let opened = null;

start();

async function start() {
  buildModes();
  listen();
  show();
  await load();
}

/** Ask what the release has, then for what the address says. */
async function load() {
  try {
    known = await schema();
  } catch (error) {
    return failed(error);
  }
  const products = known.products === null ? "" : ` · ${number(known.products)} products`;
  $("about").textContent = `release ${known.release}${products}`;
  for (const input of $("modes").querySelectorAll("input")) input.parentElement.hidden = !known.modes.includes(input.value);
  for (const old of $("filters").querySelectorAll(".facet")) old.remove();
  showers = buildFilters($("filters"), known.columns, filtered);
  const kinds = known.columns.find((column) => column.values.length);
  $("ideas").replaceChildren(
    ...(kinds ? kinds.values.slice(0, 8) : []).map(([value]) => {
      const button = make("button", { type: "button", className: "button" }, visible(value));
      button.addEventListener("click", () => ask({ words: value, like: "", picture: null }));
      return make("li", {}, button);
    }),
  );
  show();
  await run();
}

function buildModes() {
  for (const [mode, [name]] of Object.entries(MODES)) {
    const input = make("input", { type: "radio", name: "mode", value: mode });
    input.addEventListener("change", () => ask({ mode }));
    $("modes").append(make("label", {}, input, make("span", {}, name)));
  }
}

function listen() {
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const words = $("words").value.trim();
    ask({ words, like: words ? "" : state.like });
  });
  $("file").addEventListener("change", () => {
    take($("file").files);
    $("file").value = "";
  });
  $("example").querySelector("button").addEventListener("click", () => {
    ask({ picture: null, like: "" });
    $("words").focus();
  });
  $("variety").addEventListener("input", () => showVariety(Number($("variety").value)));
  $("variety").addEventListener("change", () => ask({ variety: Number($("variety").value) }));
  $("once").addEventListener("change", () => ask({ once: $("once").checked }));
  $("clear").addEventListener("click", () => {
    ask({ where: new Map() });
    $("narrow").parentElement.nextElementSibling?.querySelector("summary").focus();
  });
  $("more").addEventListener("click", () => run({ isMore: true }));
  $("detail-similar").addEventListener("click", () => {
    $("detail").close();
    similar(opened);
  });
  $("door").addEventListener("close", () => {
    keepToken($("token").value.trim());
    $("token").value = "";
    load();
  });
  $("door").addEventListener("cancel", (event) => event.preventDefault()); // without a token there is nothing to see
  for (const dialog of document.querySelectorAll("dialog:not(#door)")) {
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  }
  window.addEventListener("popstate", () => {
    const before = toAddress(state);
    const next = fromAddress(location.search);
    if (toAddress(next) === before) return; // only the skip link's anchor
    state = { ...next, picture: null };
    show();
    run();
  });
  document.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) {
      event.preventDefault();
      take(event.clipboardData.files);
    }
  });
  let depth = 0;
  const dragging = (change) => {
    depth = Math.max(0, depth + change);
    document.body.classList.toggle("dragging", depth > 0);
  };
  document.addEventListener("dragenter", () => dragging(1));
  document.addEventListener("dragleave", () => dragging(-1));
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    dragging(-depth);
    take(event.dataTransfer.files);
  });
  const wide = matchMedia("(min-width: 60rem)");
  const unfold = () => ($("panel").open = wide.matches);
  wide.addEventListener("change", unfold);
  unfold();
}

/** Search with a picture that was dropped, pasted or chosen. */
function take(files) {
  const file = [...files].find(({ type }) => type.startsWith("image/"));
  if (file) ask({ picture: file, like: "", words: $("words").value.trim() });
  else problem("Only a picture can be searched with: JPEG, PNG, WebP, GIF or AVIF.");
}

function similar(hit) {
  titles.set(hit.product_id, hit.caption.title);
  ask({ like: hit.product_id, picture: null, words: "" });
  scrollTo({ top: 0 });
  $("results").focus({ preventScroll: true });
}

function filtered(name, condition) {
  const where = new Map(state.where);
  if (condition === undefined) where.delete(name);
  else where.set(name, condition);
  ask({ where });
}

/** Change what is asked, and search. */
function ask(change) {
  state = { ...state, ...change };
  history.pushState(null, "", toAddress(state));
  show();
  run();
}

/** Make the controls say what the state is. */
function show() {
  $("words").value = state.words;
  $("words").placeholder = state.picture ? "but in blue" : "Red midi dress";
  const hasWords = !state.like && (state.words || !state.picture);
  for (const input of $("modes").querySelectorAll("input")) {
    input.checked = input.value === modeOf(hasWords ? { ...state, words: "x", like: "" } : state);
    input.disabled = input.value === "hybrid" && !hasWords;
  }
  $("hint").textContent = MODES[modeOf(state)][1];
  $("variety").value = state.variety;
  $("once").checked = state.once;
  showVariety(state.variety);
  showExample();
  for (const [name, shower] of showers) shower(state.where.get(name));
  const active = state.where.size + (state.variety > 1) + state.once;
  $("active").textContent = active ? String(active) : "";
  $("clear").hidden = !state.where.size;
  $("applied").replaceChildren(
    ...[...state.where].map(([name, condition]) => {
      const said = described(name, condition);
      const button = make("button", { type: "button", "aria-label": `Remove the filter ${said}` }, "×");
      button.addEventListener("click", () => {
        filtered(name, undefined);
        $("results").focus({ preventScroll: true });
      });
      return make("li", { className: "chip" }, make("span", {}, said), button);
    }),
  );
  document.title = isAsking(state) ? `${asked()} · Twotower` : "Twotower";
}

function showVariety(groups) {
  const said =
    groups < 2
      ? "Off: the best matches first, however alike they look."
      : `The best ${GROUPED} are sorted into ${groups} groups of similar pictures; one of each is shown in turn.`;
  $("varied").textContent = said;
  $("variety").setAttribute("aria-valuetext", groups < 2 ? "off" : `${groups} groups`);
}

function showExample() {
  const chip = $("example");
  const image = chip.querySelector("img");
  chip.hidden = !state.picture && !state.like;
  if (pictureUrl) URL.revokeObjectURL(pictureUrl);
  pictureUrl = state.picture ? URL.createObjectURL(state.picture) : "";
  image.hidden = chip.hidden;
  if (state.picture) image.src = pictureUrl;
  else if (state.like && known) showPicture(image, state.like, known.release, () => (image.hidden = true));
  else image.removeAttribute("src");
  chip.querySelector("span").textContent = state.picture ? "Your picture" : `Like ${titles.get(state.like) ?? visible(state.like)}`;
}

/** Search, or go on with the next page. */
async function run({ isMore = false } = {}) {
  running?.abort();
  problem("");
  if (!isAsking(state)) {
    finish([], null);
    return;
  }
  running = new AbortController();
  const { signal } = running;
  $("results").setAttribute("aria-busy", "true");
  $("start").hidden = true;
  const offset = isMore ? shownHits.length : 0;
  const since = performance.now();
  try {
    const answer = await search(state, options(offset), signal);
    finish(isMore ? shownHits : [], answer, performance.now() - since);
  } catch (error) {
    if (error.name === "AbortError") return;
    finish(isMore ? shownHits : [], null);
    failed(error);
  }
}

function options(offset) {
  const groups = state.variety > 1 ? { clusters: state.variety, candidates: GROUPED } : {};
  return {
    mode: modeOf(state),
    k: state.variety > 1 ? PAGE : PAGE + 1, // one more, to know whether there is a next page
    offset,
    where: conditions(state),
    ...(state.once ? { collapse_duplicates: ALIKE } : { mark_duplicates: ALIKE }),
    ...groups,
  };
}

/** Show the hits of an answer below those that stay. */
function finish(before, answer, took) {
  $("results").setAttribute("aria-busy", "false");
  $("start").hidden = isAsking(state);
  if (answer === null && before.length) return;
  const fresh = answer?.hits.slice(0, PAGE) ?? [];
  shownHits = [...before, ...fresh];
  places = new Map(shownHits.map((hit) => [hit.product_id, hit.rank]));
  const cards = fresh.map((hit) => card(hit, answer, places, { open: (one) => open(one, answer), similar }));
  if (before.length) $("hits").append(...cards);
  else $("hits").replaceChildren(...cards);
  for (const hit of fresh) titles.set(hit.product_id, hit.caption.title);
  if (before.length) cards[0]?.querySelector("button").focus();
  const isGrouped = state.variety > 1 && shownHits.length >= GROUPED;
  const hasMore = state.variety > 1 ? fresh.length === PAGE && !isGrouped : answer?.hits.length > PAGE;
  $("more").hidden = !hasMore;
  $("last").hidden = !isGrouped;
  $("last").textContent = isGrouped ? `These are the best ${GROUPED}, in groups. Turn variety off to see more.` : "";
  $("status").textContent = answer === null ? "" : told(answer, took);
}

function told(answer, took) {
  const what = state.like ? asked().replace("products ", "") : `for ${asked()}`;
  if (!shownHits.length) return `Nothing was found ${what}${state.where.size ? " with these filters" : ""}.`;
  const count = `${number(shownHits.length)} ${shownHits.length === 1 ? "product" : "products"} ${what}`;
  const spread = answer.diversity === null ? "" : ` · pictures differ by ${number(answer.diversity)}`;
  return `${count} · release ${answer.release} · ${number(took, 0)} ms${spread}`;
}

function asked() {
  if (state.like) return `products like ${titles.get(state.like) ?? visible(state.like)}`;
  const words = state.words ? `“${visible(state.words)}”` : "";
  return state.picture ? `your picture${words && ` and ${words}`}` : words;
}

function open(hit, answer) {
  opened = hit;
  detail($("detail"), hit, answer);
  $("detail").showModal();
}

function failed(error) {
  if (error.status === 401) {
    $("door-problem").textContent = error.message.includes("not right") ? error.message : "";
    if (!$("door").open) $("door").showModal();
  } else {
    problem(error.message);
  }
}

function problem(sentence) {
  $("problem").hidden = !sentence;
  $("problem").textContent = sentence;
}
