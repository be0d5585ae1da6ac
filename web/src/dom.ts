// Small things every view uses: elements made from script, the page's own by their id, what a screen reader hears.
// Text goes in as text nodes only; nothing here or elsewhere parses markup.

type Attributes = Record<string, string | boolean | (() => void)>;

/** A new element. A function among the attributes listens to its event; `true` sets an attribute, `false` omits it. */
export function el<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  attributes: Attributes = {},
  ...children: (Node | string)[]
): HTMLElementTagNameMap[K] {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

export function icon(name: string): SVGSVGElement {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

/** The element of index.html with this id, which is of class `kind` there. */
export function byId<T extends HTMLElement>(id: string, kind: new () => T): T {
  const element = document.getElementById(id);
  if (!(element instanceof kind)) throw new Error(`index.html has no ${kind.name} with the id ${id}.`);
  return element;
}

export function button(id: string): HTMLButtonElement {
  return byId(id, HTMLButtonElement);
}

/** Says it to a screen reader, without showing it. */
export function announce(text: string): void {
  byId("status", HTMLElement).textContent = text;
}

/** Shows it above everything until the next action; a screen reader reads it at once. */
export function notify(text: string): void {
  const notice = byId("notice", HTMLElement);
  notice.replaceChildren(
    el("p", {}, text),
    el("button", { type: "button", class: "quiet", click: clearNotice }, icon("close"), "Close"),
  );
  notice.hidden = false;
}

export function clearNotice(): void {
  byId("notice", HTMLElement).hidden = true;
}

/** Copies, says so on the button for a moment. */
export async function copyText(text: string, from: HTMLButtonElement): Promise<void> {
  const label = from.lastChild;
  const before = label?.textContent ?? "";
  const copied = await writeClipboard(text);
  announce(copied ? "Copied." : "This browser does not let the page copy.");
  if (label && before !== "Copied") {
    label.textContent = copied ? "Copied" : "Cannot copy";
    setTimeout(() => (label.textContent = before), 1500);
  }
}

async function writeClipboard(text: string): Promise<boolean> {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Over plain http to another machine there is no clipboard interface; the old command still works there.
    const holder = el("textarea", { class: "visually-hidden", "aria-hidden": "true" });
    holder.value = text;
    const focused = document.activeElement;
    document.body.append(holder);
    holder.select();
    const copied = document.execCommand("copy");
    holder.remove();
    if (focused instanceof HTMLElement) focused.focus();
    return copied;
  }
}
