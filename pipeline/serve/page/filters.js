// Controls for the columns of the release. Each makes a typed condition; the server checks it and builds the filter.

import { heading, make, number, shown, visible } from "/page/text.js";

const OPEN_AT_FIRST = 3;
const FIND_FROM = 12;
const FIRST = ["broad_category", "fine_category", "price"];
const LAST = ["product_id", "title", "description", "n_images", "has_text"];

/**
 * Build the controls.
 *
 * @param root where they go
 * @param columns of the schema
 * @param changed called with a column's name and its condition, undefined for none
 * @returns functions by column that show a condition in its control
 */
export function buildFilters(root, columns, changed) {
  const showers = new Map();
  for (const [place, column] of ordered(columns).entries()) {
    const [body, show] = control(column, (condition) => {
      count.textContent = amount(condition);
      changed(column.name, condition);
    });
    const count = make("span", { className: "count" });
    const summary = make("summary", {}, make("span", {}, heading(column.name)), count);
    root.append(make("details", { className: "facet", open: place < OPEN_AT_FIRST }, summary, body));
    showers.set(column.name, (condition) => {
      count.textContent = amount(condition);
      show(condition);
    });
  }
  return showers;
}

/** A condition in words, for the list of filters in use. */
export function described(name, condition) {
  if (name === "and" || name === "or" || name === "not") return `${name}: ${visible(JSON.stringify(condition))}`;
  const simple = condition !== null && typeof condition === "object" ? condition : { eq: condition };
  const parts = Object.entries(simple).map(([operator, value]) => {
    if (operator === "in" && Array.isArray(value)) return value.map(shown).join(" or ");
    const signs = { eq: "", ne: "not ", ge: "from ", gt: "over ", le: "to ", lt: "under ", contains: "with " };
    return `${signs[operator] ?? `${visible(operator)} `}${shown(isTime(value) ? value.slice(0, 10) : value)}`;
  });
  return `${heading(name)}: ${parts.join(" ")}`;
}

function ordered(columns) {
  const weight = ({ name, kind, values }) => {
    if (LAST.includes(name)) return 5;
    if (FIRST.includes(name)) return 0;
    if (values.length) return 1;
    return kind === "text" ? 4 : kind === "bool" ? 3 : 2;
  };
  return [...columns].sort((a, b) => weight(a) - weight(b));
}

function amount(condition) {
  if (condition === undefined) return "";
  return String(condition !== null && Array.isArray(condition.in) ? condition.in.length : 1);
}

function control(column, changed) {
  if (column.kind === "text") return column.values.length ? choices(column, changed) : contains(column, changed);
  if (column.kind === "bool") return yesOrNo(column, changed);
  return range(column, changed);
}

function choices(column, changed) {
  const boxes = new Map();
  const list = make("div", { className: "choices" });
  const extra = []; // values of an address that are none of the commonest
  const report = () => {
    const chosen = [...boxes].filter(([, box]) => box.checked).map(([value]) => value);
    const all = [...chosen, ...extra];
    changed(all.length ? { in: all } : undefined);
  };
  for (const [value, products] of column.values) {
    const box = make("input", { type: "checkbox", onchange: report });
    boxes.set(value, box);
    const label = make("span", {}, visible(value) || "–");
    list.append(make("label", { className: "check" }, box, label, make("span", { className: "soft" }, number(products))));
  }
  const find = make("input", { type: "search", placeholder: "Find", "aria-label": `Find a ${heading(column.name).toLowerCase()}` });
  find.addEventListener("input", () => {
    const wanted = find.value.trim().toLowerCase();
    for (const [value, box] of boxes) box.parentElement.hidden = !value.toLowerCase().includes(wanted);
  });
  const legend = make("legend", { className: "unseen" }, heading(column.name));
  const body = make("fieldset", {}, legend, column.values.length > FIND_FROM ? find : null, list);
  const show = (condition) => {
    const wanted = condition === undefined ? [] : Array.isArray(condition?.in) ? condition.in : [condition?.eq ?? condition];
    for (const [value, box] of boxes) box.checked = wanted.includes(value);
    extra.splice(0, extra.length, ...wanted.filter((value) => typeof value === "string" && !boxes.has(value)));
  };
  return [body, show];
}

function contains(column, changed) {
  const input = make("input", { type: "search", placeholder: "Contains", "aria-label": `${heading(column.name)} contains` });
  input.addEventListener("change", () => changed(input.value ? { contains: input.value } : undefined));
  return [input, (condition) => (input.value = condition?.contains ?? "")];
}

function yesOrNo(column, changed) {
  const options = [["", "Either"], ["true", "Yes"], ["false", "No"]].map(([value, said]) => make("option", { value }, said));
  const select = make("select", { "aria-label": heading(column.name) }, ...options);
  select.addEventListener("change", () => changed(select.value ? { eq: select.value === "true" } : undefined));
  return [select, (condition) => (select.value = String(condition?.eq ?? condition ?? ""))];
}

function range(column, changed) {
  const isDate = column.kind === "date" || column.kind === "timestamp";
  const end = (word, value) => {
    const properties = { type: isDate ? "date" : "number", "aria-label": `${heading(column.name)} ${word}` };
    if (!isDate) Object.assign(properties, { step: "any", placeholder: value === null ? "" : number(value), inputMode: "decimal" });
    return make("input", properties);
  };
  const from = end("from", column.low);
  const to = end("to", column.high);
  const read = (input, suffix) => (isDate ? input.value + suffix : Number(input.value));
  const report = () => {
    const condition = {};
    const whole = column.kind === "timestamp";
    if (from.value) condition.ge = read(from, "");
    if (to.value) condition.le = read(to, whole ? "T23:59:59.999999" : "");
    changed(Object.keys(condition).length ? condition : undefined);
  };
  from.addEventListener("change", report);
  to.addEventListener("change", report);
  const written = (value) => (value === undefined ? "" : isDate ? String(value).slice(0, 10) : String(value));
  const show = (condition) => {
    from.value = written(condition?.ge ?? condition?.gt);
    to.value = written(condition?.le ?? condition?.lt);
  };
  return [make("div", { className: "range" }, from, make("span", { "aria-hidden": "true" }, "–"), to), show];
}

function isTime(value) {
  return typeof value === "string" && /^\d{4}-\d\d-\d\dT/.test(value);
}
