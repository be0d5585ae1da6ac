// Asks for the server's key, in a password field, and keeps it until the tab closes.
// One question at a time: who asks meanwhile waits for the same answer.

import type { KeyHolder } from "./api";
import { button, byId } from "./dom";
import { readKey, writeKey } from "./settings";

export class KeyView implements KeyHolder {
  private readonly dialog = byId("key-dialog", HTMLDialogElement);
  private readonly field = byId("key", HTMLInputElement);
  private asking: Promise<string | null> | null = null;

  current(): string {
    return readKey();
  }

  ask(wasRefused: boolean): Promise<string | null> {
    this.asking ??= this.show(wasRefused).finally(() => (this.asking = null));
    return this.asking;
  }

  private show(wasRefused: boolean): Promise<string | null> {
    byId("key-reason", HTMLElement).textContent = wasRefused
      ? "The key it was given is not the right one."
      : "Whoever runs it can tell you the key.";
    this.field.value = "";
    this.dialog.showModal();
    this.field.focus();
    return new Promise((resolve) => {
      const listening = new AbortController();
      const until = { signal: listening.signal };
      let given: string | null = null;
      byId("key-form", HTMLFormElement).addEventListener(
        "submit",
        (event) => {
          event.preventDefault();
          const key = this.field.value.trim();
          if (key === "") return this.field.focus();
          given = key;
          this.dialog.close();
        },
        until,
      );
      button("key-cancel").addEventListener("click", () => this.dialog.close(), until);
      // by Escape too
      this.dialog.addEventListener(
        "close",
        () => {
          listening.abort();
          this.field.value = "";
          if (given !== null) writeKey(given);
          resolve(given);
        },
        until,
      );
    });
  }
}
