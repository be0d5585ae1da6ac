// An alt text from a caption: one short sentence, and the same as an HTML attribute.
// 125 characters is where several screen readers break an alt text in two.

const LONGEST = 125;

export function tidyAltText(caption: string): string {
  const words = caption.trim().replace(/\s+/g, " ").replace(/[\s.,;:]+$/, "");
  if (words === "") return "";
  const [first = "", ...rest] = words; // by code point, so that a letter beyond 16 bits stays whole
  const capital = first.toLocaleUpperCase() + rest.join("");
  const ended = /[!?…]$/.test(capital) ? capital : capital + ".";
  return ended.length <= LONGEST ? ended : shortened(capital);
}

function shortened(text: string): string {
  const cut = text.slice(0, LONGEST); // one more than can stay, so that a word that just fits is seen to end
  const space = cut.lastIndexOf(" ");
  const kept = space > 0 ? cut.slice(0, space) : cut.slice(0, LONGEST - 1);
  return kept.replace(/[\s.,;:]+$/, "") + ".";
}

export function altAttribute(text: string): string {
  const escaped = text.replace(/&/g, "&amp;").replace(/"/g, "&quot;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  return `alt="${escaped}"`;
}
