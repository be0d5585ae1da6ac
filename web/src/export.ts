// A conversation as a file: JSON with everything in it, or Markdown to read and paste.

import { askedText, titleOf, type Conversation, type Picture } from "./conversation";
import { dataUrl } from "./picture";

export async function asJson(
  conversation: Conversation,
  pictures: ReadonlyMap<string, Picture>,
  model: string,
): Promise<string> {
  const shown = conversation.pictureIds.map((id) => pictures.get(id)).filter((one) => one !== undefined);
  const content = {
    format: "blip2-conversation",
    version: 1,
    title: titleOf(conversation, pictures),
    model,
    created: new Date(conversation.created).toISOString(),
    updated: new Date(conversation.updated).toISOString(),
    pictures: await Promise.all(
      shown.map(async ({ id, name, width, height, credit, blob }) => ({
        id,
        name,
        width,
        height,
        ...(credit === "" ? {} : { credit }),
        data: await dataUrl(blob),
      })),
    ),
    turns: conversation.turns.map(({ kind, pictureId, question, answer, state, notes }) => ({
      kind,
      picture: pictureId,
      question,
      answer,
      state,
      notes,
    })),
  };
  return JSON.stringify(content, null, 2) + "\n";
}

export function asMarkdown(
  conversation: Conversation,
  pictures: ReadonlyMap<string, Picture>,
  model: string,
): string {
  const lines = [`# ${escaped(titleOf(conversation, pictures))}`, "", `Answers of the model ${escaped(model)}.`, ""];
  let shown = "";
  for (const turn of conversation.turns) {
    const picture = pictures.get(turn.pictureId);
    if (picture && picture.id !== shown) {
      lines.push(`## ${escaped(picture.name)} (${picture.width} × ${picture.height})`, "");
      shown = picture.id;
    }
    lines.push(`**${escaped(askedText(turn))}**`, "", escaped(turn.answer) || "(no answer)", "");
    if (turn.state === "stopped") lines.push("(stopped)", "");
  }
  return lines.join("\n");
}

/** So that what somebody or the model wrote shows as written. */
function escaped(text: string): string {
  return text.replace(/[\\`*_[\]<>#|]/g, "\\$&").replace(/\s*\n\s*/g, "  \n");
}

export function fileName(title: string, ending: string): string {
  const words = title.normalize("NFC").replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 60);
  return `${words || "conversation"}.${ending}`;
}

export function download(text: string, name: string, type: string): void {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
  // not at once: some browsers begin to read only after the click was handled
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
