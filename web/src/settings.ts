// What the user set (localStorage) and the server's key (sessionStorage: gone when the tab closes).
// Where a browser forbids either, the page works with the defaults and forgets.

export interface Settings {
  system: string;
  maxTokens: number | null; // null: the server's own
  temperature: number;
  opacity: number; // of the heat map, 0 to 1
}

const DEFAULTS: Settings = { system: "", maxTokens: null, temperature: 0, opacity: 0.65 };

export function readSettings(): Settings {
  try {
    return { ...DEFAULTS, ...(JSON.parse(read(localStorageOrNull(), "blip2.settings") || "{}") as Partial<Settings>) };
  } catch {
    return { ...DEFAULTS };
  }
}

export function writeSettings(settings: Settings): void {
  write(localStorageOrNull(), "blip2.settings", JSON.stringify(settings));
}

export function readOpenConversation(): string {
  return read(localStorageOrNull(), "blip2.open");
}

export function writeOpenConversation(id: string): void {
  write(localStorageOrNull(), "blip2.open", id);
}

let keyOfThisPage = ""; // where sessionStorage is forbidden

export function readKey(): string {
  return read(sessionStorageOrNull(), "blip2.key") || keyOfThisPage;
}

export function writeKey(key: string): void {
  keyOfThisPage = key;
  write(sessionStorageOrNull(), "blip2.key", key);
}

// Merely naming a forbidden storage throws, hence these two.
function localStorageOrNull(): Storage | null {
  try {
    return localStorage;
  } catch {
    return null;
  }
}

function sessionStorageOrNull(): Storage | null {
  try {
    return sessionStorage;
  } catch {
    return null;
  }
}

function read(storage: Storage | null, name: string): string {
  return storage?.getItem(name) ?? "";
}

function write(storage: Storage | null, name: string, value: string): void {
  try {
    storage?.setItem(name, value);
  } catch {
    // full or forbidden: a setting is then kept for this visit only
  }
}
