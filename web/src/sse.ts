// Server-sent events out of a response's body: the text of each `data:` field, as it arrives.
// Pieces of the network end anywhere, also within a character or a line.

export async function* serverSentEvents(body: ReadableStream<Uint8Array>): AsyncGenerator<string> {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let unread = "";
  let data: string[] = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      unread += done ? decoder.decode() + "\n\n" : decoder.decode(value, { stream: true });
      const lines = unread.split("\n");
      unread = lines.pop() ?? "";
      for (const line of lines.map((one) => one.replace(/\r$/, ""))) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        if (line === "" && data.length > 0) {
          yield data.join("\n");
          data = [];
        }
      }
      if (done) return;
    }
  } finally {
    // also when the reader of the events leaves early: the server then stops the model
    reader.cancel().catch(() => undefined);
  }
}
