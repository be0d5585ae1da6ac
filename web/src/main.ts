// Begins: asks the server what it can do, opens the store, then the conversation that was open last.

import { fetchPageInfo, Server, ServerError } from "./api";
import { Chat } from "./chat";
import { byId, notify } from "./dom";
import { KeyView } from "./key_view";
import { readOpenConversation, readSettings } from "./settings";
import { openStore } from "./store";

async function begin(): Promise<void> {
  const info = await fetchPageInfo();
  const model = byId("model", HTMLElement);
  model.textContent = `${info.model} · ${info.version}`;
  model.title = `Model ${info.model}, ${info.name} ${info.version}`;
  model.hidden = false;
  const key = new KeyView();
  const chat = new Chat(new Server(info, key), await openStore(), readSettings());
  await chat.begin(readOpenConversation());
  if (info.needs_key && key.current() === "") await key.ask(false);
}

begin().catch((error: unknown) => {
  if (!(error instanceof ServerError)) console.error(error);
  notify("The page could not begin. See whether the server is running, then load the page anew.");
});
