// Requests to the server this page came from. A token goes into a header, never into an address.

const KEY = "twotower-token";

/** The server said why there is no answer. */
export class Refused extends Error {
  constructor(status, sentence) {
    super(sentence);
    this.status = status;
  }
}

let held = null;

function token() {
  if (held === null) {
    try {
      held = sessionStorage.getItem(KEY) ?? "";
    } catch {
      held = ""; // storage is switched off: the token lives as long as the page
    }
  }
  return held;
}

/** Keep the token in this tab. */
export function keepToken(given) {
  held = given;
  try {
    sessionStorage.setItem(KEY, given);
  } catch {
    // as above
  }
}

async function ask(path, options = {}) {
  const headers = new Headers(options.headers);
  try {
    if (token()) headers.set("Authorization", `Bearer ${token()}`);
  } catch {
    throw new Refused(401, "The token is not right."); // a header cannot carry each letter that can be pasted
  }
  let answer;
  try {
    answer = await fetch(path, { ...options, headers, credentials: "omit", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server does not answer.");
  }
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => ({}));
  throw new Refused(answer.status, said.error ?? `The server answered ${answer.status}.`);
}

/** What the release can be asked. */
export async function schema() {
  return (await ask("/schema")).json();
}

/**
 * The hits of a query.
 *
 * @param query {words, picture, like}: a picture with words is a mixture of both; `like` is a product.
 * @param options mode, k, offset, where, clusters, candidates, collapse_duplicates, mark_duplicates
 */
export async function search(query, options, signal) {
  const address = addressOf(options);
  if (query.like) return (await ask(`/similar/${encodeURIComponent(query.like)}?${address}`, { signal })).json();
  if (query.picture && query.words) return mixed(query, options, signal);
  if (query.picture) {
    const headers = { "Content-Type": query.picture.type || "application/octet-stream" };
    return (await ask(`/search?${address}`, { method: "POST", body: query.picture, headers, signal })).json();
  }
  address.set("q", query.words);
  return (await ask(`/search?${address}`, { signal })).json();
}

function addressOf(options) {
  const address = new URLSearchParams();
  for (const [name, value] of Object.entries(options)) {
    if (value !== undefined) address.set(name, typeof value === "object" ? JSON.stringify(value) : value);
  }
  return address;
}

async function mixed(query, { clusters, candidates, ...options }, signal) {
  const parts = [{ image: await base64(query.picture) }, { text: query.words }];
  const body = { ...options, mixture: parts };
  if (clusters) body.diversify = { clusters, candidates };
  const headers = { "Content-Type": "application/json" };
  return (await ask("/search", { method: "POST", body: JSON.stringify(body), headers, signal })).json();
}

function base64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Refused(0, "The picture cannot be read."));
    reader.readAsDataURL(file);
  });
}

/** Put a product's picture into an image element; `missing` is called where there is none. */
export async function picture(image, productId, release, missing) {
  const address = `/thumbnail/${encodeURIComponent(productId)}?release=${release}`;
  image.addEventListener("error", missing, { once: true });
  if (!token()) {
    image.src = address;
    return;
  }
  try {
    const blob = await (await ask(address)).blob(); // an image's own request could not carry the token
    const url = URL.createObjectURL(blob);
    image.addEventListener("load", () => URL.revokeObjectURL(url), { once: true });
    image.src = url;
  } catch {
    missing();
  }
}
