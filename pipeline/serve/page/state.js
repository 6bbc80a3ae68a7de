// What is asked, and how it stands in the page's address: all but a picture, which no address can hold, and the token.

export const MODES = {
  avg: ["Overall", "Compared with the text and the picture of a product together."],
  text: ["Description", "Compared with titles and descriptions."],
  image: ["Picture", "Compared with what is seen in the pictures."],
  hybrid: ["Exact words too", "Overall, and products that contain the very words: names and numbers."],
};
export const MOST_GROUPS = 12;

/** The state of an empty page. */
export function nothing() {
  return { words: "", like: "", picture: null, mode: "avg", variety: 1, once: false, where: new Map() };
}

/** Whether anything is looked for. */
export function isAsking(state) {
  return Boolean(state.words || state.like || state.picture);
}

/** The mode that will be searched: without words there is none to look up. */
export function modeOf(state) {
  return state.mode === "hybrid" && !(state.words && !state.like) ? "avg" : state.mode;
}

/** The state that an address tells; what it cannot mean is left out. */
export function fromAddress(query) {
  const said = new URLSearchParams(query);
  const state = nothing();
  state.words = (said.get("q") ?? "").slice(0, 20000);
  state.like = said.get("like") ?? "";
  if (Object.hasOwn(MODES, said.get("mode") ?? "")) state.mode = said.get("mode");
  const variety = Number(said.get("variety"));
  if (Number.isInteger(variety) && variety >= 1 && variety <= MOST_GROUPS) state.variety = variety;
  state.once = said.has("once");
  try {
    const where = JSON.parse(said.get("where") ?? "{}");
    if (where && typeof where === "object" && !Array.isArray(where)) state.where = new Map(Object.entries(where));
  } catch {
    // an address that was cut off: without its filters
  }
  return state;
}

/** The address of a state. */
export function toAddress(state) {
  const said = new URLSearchParams();
  if (state.words) said.set("q", state.words);
  if (state.like) said.set("like", state.like);
  if (state.mode !== "avg") said.set("mode", state.mode);
  if (state.variety > 1) said.set("variety", state.variety);
  if (state.once) said.set("once", "1");
  if (state.where.size) said.set("where", JSON.stringify(conditions(state)));
  const query = said.toString();
  return query ? `?${query}` : location.pathname;
}

/** The filters as the API takes them. */
export function conditions(state) {
  return state.where.size ? Object.fromEntries(state.where) : undefined;
}
