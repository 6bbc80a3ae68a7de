// The hits as pictures, and one of them in detail.

import { picture } from "/page/api.js";
import { heading, make, number, shown, visible } from "/page/text.js";

const NAMED_ALIKE = 12;
const COLOURS = 8;

/**
 * One hit as an item of the list.
 *
 * @param hit of the answer
 * @param answer it is part of
 * @param places rank by product_id, of all hits that are shown
 * @param actions {open, similar}: called with the hit
 */
export function card(hit, answer, places, actions) {
  const title = hit.caption.title;
  const frame = make("button", { type: "button", className: "frame", "aria-label": `Details of ${title}` }, photo(hit, answer.release));
  frame.addEventListener("click", () => actions.open(hit));
  const badges = make("div", { className: "badges" });
  if (hit.cluster !== null) {
    badges.append(make("span", { className: `badge c${hit.cluster % COLOURS}` }, `group ${hit.cluster + 1}`));
  }
  const alike = likeness(hit, places);
  if (alike) badges.append(make("span", { className: "badge alike" }, alike));
  const similar = make("button", { type: "button", className: "link", "aria-label": `Products similar to ${title}` }, "Similar");
  similar.addEventListener("click", () => actions.similar(hit));
  const price = typeof hit.fields.price === "number" ? make("span", { className: "price" }, number(hit.fields.price)) : null;
  return make(
    "li",
    {},
    make(
      "article",
      { className: "card" },
      make("div", { className: "top" }, frame, badges),
      make(
        "div",
        { className: "caption" },
        make("h3", { title }, title),
        make("p", { className: "soft category" }, hit.caption.category || " "),
        make("p", { className: "line" }, make("span", { className: "soft" }, `${hit.rank} · score ${score(hit.score)}`), price),
        similar,
      ),
    ),
  );
}

/** Fill the dialog with a hit. */
export function detail(dialog, hit, answer) {
  dialog.querySelector(".picture").replaceChildren(photo(hit, answer.release));
  dialog.querySelector("h2").textContent = hit.caption.title;
  dialog.querySelector(".facts > p").textContent = hit.caption.category;
  const rows = [["Product", hit.product_id], ["Score", score(hit.score)], ...Object.entries(hit.fields)];
  if (hit.duplicates.length) {
    const more = hit.duplicates.length - NAMED_ALIKE;
    rows.push(["Look the same", [...hit.duplicates.slice(0, NAMED_ALIKE), ...(more > 0 ? [`${number(more)} more`] : [])]]);
  }
  const hidden = new Set(["title", "broad_category", "fine_category"]);
  dialog.querySelector("dl").replaceChildren(
    ...rows
      .filter(([name]) => !hidden.has(name))
      .flatMap(([name, value]) => [make("dt", {}, heading(name)), make("dd", {}, shown(value))]),
  );
}

function photo(hit, release) {
  const none = () => make("span", { className: "none" }, "no picture");
  if (hit.fields.n_images === 0) return none();
  const image = make("img", { alt: "", loading: "lazy", decoding: "async" });
  picture(image, hit.product_id, release, () => image.replaceWith(none()));
  return image;
}

function likeness(hit, places) {
  if (hit.duplicates.length) return `+${number(hit.duplicates.length)} alike`;
  if (hit.looks_like === null) return "";
  const place = places.get(hit.looks_like);
  return place ? `looks like ${place}` : `looks like ${visible(hit.looks_like)}`;
}

function score(value) {
  return value.toFixed(Math.abs(value) < 0.1 ? 4 : 3);
}
