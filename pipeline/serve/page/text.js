// Text of a catalog as it may be shown. It becomes the text of elements and never markup, wherever it comes from.

const CONTROLS = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}]/gu;

/** Text with control and direction characters written out, as the server does it for captions. */
export function visible(value) {
  return String(value).replace(CONTROLS, (character) => {
    if (character === "\n" || character === "\t" || character === "\r") return " ";
    const code = character.codePointAt(0);
    return code < 256 ? `\\x${code.toString(16).padStart(2, "0")}` : `\\u${code.toString(16).padStart(4, "0")}`;
  });
}

/** The name of a column as a heading: "broad_category" is "Broad category". */
export function heading(name) {
  if (name === "n_images") return "Number of pictures";
  const words = visible(name).replaceAll("_", " ").trim();
  return words.charAt(0).toUpperCase() + words.slice(1);
}

/** A number with the reader's separators. */
export function number(value, digits = 2) {
  return Number(value).toLocaleString(undefined, { maximumFractionDigits: digits });
}

/** A value of a column, shown. */
export function shown(value) {
  if (value === null || value === undefined || value === "") return "–";
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (typeof value === "number") return number(value, 4);
  if (Array.isArray(value)) return value.map(shown).join(", ");
  return visible(value);
}

/** An element with properties and children; strings become text. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.includes("-") || name === "role" || name === "for") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}
