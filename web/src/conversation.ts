// A conversation: pictures, and turns of a question and its answer; and what of it the model is sent.
// Nothing here touches the page, the network or the browser's store.

export interface Picture {
  id: string;
  name: string;
  alt: string; // what is known of it beforehand: an example's description, else empty
  credit: string; // where an example comes from and its licence, else empty
  width: number;
  height: number;
  blob: Blob; // as it is sent
}

// A question is the user's own words; a caption and an alt text are asked for by the picture alone.
export type TurnKind = "question" | "caption" | "alt";

export type TurnState = "waiting" | "streaming" | "done" | "stopped" | "failed";

export interface Turn {
  id: string;
  kind: TurnKind;
  pictureId: string;
  question: string;
  answer: string;
  state: TurnState;
  error: string; // why it failed, else empty
  notes: string[]; // what the reader should know of the answer: warnings of the server, a length limit
}

export interface Conversation {
  id: string;
  title: string; // given by the user, else empty
  created: number; // milliseconds since 1970
  updated: number;
  pictureIds: string[]; // in the order they came; questions are about the last
  turns: Turn[];
}

export interface Limits {
  body_bytes: number;
  image_pixels: number;
  images: number;
  messages: number;
  max_tokens: number;
}

/** One turn as the model is to read it, with its picture where the model has not just seen it. */
export interface SentTurn {
  turn: Turn;
  withPicture: boolean;
}

export function newId(): string {
  // randomUUID is missing where the page is served over plain http to another machine
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function newConversation(): Conversation {
  const now = Date.now();
  return { id: newId(), title: "", created: now, updated: now, pictureIds: [], turns: [] };
}

export function newTurn(kind: TurnKind, pictureId: string, question: string): Turn {
  return { id: newId(), kind, pictureId, question, answer: "", state: "waiting", error: "", notes: [] };
}

export function isRunning(turn: Turn): boolean {
  return turn.state === "waiting" || turn.state === "streaming";
}

/** What was asked, in words a person reads. */
export function askedText(turn: Turn): string {
  if (turn.kind === "caption") return "Caption";
  if (turn.kind === "alt") return "Alt text";
  return turn.question;
}

export function titleOf(conversation: Conversation, pictures: ReadonlyMap<string, Picture>): string {
  const question = conversation.turns.find((turn) => turn.kind === "question")?.question;
  const picture = pictures.get(conversation.pictureIds[0] ?? "");
  return conversation.title || question || picture?.name || "New conversation";
}

/**
 * The turns to send so that `asked` can be answered, oldest first, `asked` last.
 *
 * A caption is of the picture alone, so nothing comes before it. For a question the oldest turns are left out
 * until the server's limits hold; `leftOut` says how many.
 */
export function turnsToSend(
  turns: readonly Turn[],
  asked: Turn,
  pictures: ReadonlyMap<string, Picture>,
  limits: Limits,
  hasSystemLine: boolean,
): { sent: SentTurn[]; leftOut: number } {
  if (asked.kind !== "question") return { sent: [{ turn: asked, withPicture: true }], leftOut: 0 };
  const before = turns.slice(0, Math.max(0, turns.indexOf(asked)));
  const history = before.filter((turn) => turn.answer !== "" && (turn.state === "done" || turn.state === "stopped"));
  for (let leftOut = 0; ; leftOut++) {
    const sent = withPictures([...history.slice(leftOut), asked]);
    if (leftOut === history.length || fits(sent, pictures, limits, hasSystemLine)) return { sent, leftOut };
  }
}

function withPictures(turns: readonly Turn[]): SentTurn[] {
  let shown = "";
  return turns.map((turn) => {
    const withPicture = turn.pictureId !== shown || turn.kind !== "question";
    shown = turn.pictureId;
    return { turn, withPicture };
  });
}

function fits(
  sent: readonly SentTurn[],
  pictures: ReadonlyMap<string, Picture>,
  limits: Limits,
  hasSystemLine: boolean,
): boolean {
  const messages = 2 * sent.length - 1 + (hasSystemLine ? 1 : 0);
  const shown = sent.filter((one) => one.withPicture);
  const bytes = shown.reduce((sum, one) => sum + (pictures.get(one.turn.pictureId)?.blob.size ?? 0), 0);
  // base64 makes 4 characters of 3 bytes; 64 kB is more than the words take
  return messages <= limits.messages && shown.length <= limits.images && (bytes * 4) / 3 + 65536 <= limits.body_bytes;
}
