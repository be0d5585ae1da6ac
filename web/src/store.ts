// Conversations and their pictures in the browser's IndexedDB (localStorage is too small for pictures).
// Where the browser forbids it, they are kept in memory and `lasts` says so.

import type { Conversation, Picture } from "./conversation";

export interface Store {
  readonly lasts: boolean; // whether what is kept survives a reload
  conversations(): Promise<Conversation[]>; // latest first
  pictures(ids: readonly string[]): Promise<Picture[]>;
  saveConversation(conversation: Conversation): Promise<void>;
  savePicture(picture: Picture): Promise<void>;
  remove(conversation: Conversation): Promise<void>; // with its pictures
}

export async function openStore(): Promise<Store> {
  try {
    return new DatabaseStore(await openDatabase());
  } catch {
    return new MemoryStore();
  }
}

function openDatabase(): Promise<IDBDatabase> {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open("blip2", 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("conversations", { keyPath: "id" });
      request.result.createObjectStore("pictures", { keyPath: "id" });
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

function result<T>(request: IDBRequest<T>): Promise<T> {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

function committed(transaction: IDBTransaction): Promise<void> {
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve();
    transaction.onabort = transaction.onerror = () => reject(transaction.error);
  });
}

class DatabaseStore implements Store {
  readonly lasts = true;

  constructor(private readonly database: IDBDatabase) {}

  async conversations(): Promise<Conversation[]> {
    const all: Conversation[] = await result(this.reading("conversations").getAll());
    return latestFirst(all);
  }

  async pictures(ids: readonly string[]): Promise<Picture[]> {
    const pictures = this.reading("pictures");
    const found = await Promise.all(ids.map((id) => result<Picture | undefined>(pictures.get(id))));
    return found.filter((one) => one !== undefined);
  }

  saveConversation(conversation: Conversation): Promise<void> {
    const transaction = this.database.transaction("conversations", "readwrite");
    transaction.objectStore("conversations").put(conversation);
    return committed(transaction);
  }

  savePicture(picture: Picture): Promise<void> {
    const transaction = this.database.transaction("pictures", "readwrite");
    transaction.objectStore("pictures").put(picture);
    return committed(transaction);
  }

  remove(conversation: Conversation): Promise<void> {
    const transaction = this.database.transaction(["conversations", "pictures"], "readwrite");
    transaction.objectStore("conversations").delete(conversation.id);
    for (const id of conversation.pictureIds) transaction.objectStore("pictures").delete(id);
    return committed(transaction);
  }

  private reading(name: string): IDBObjectStore {
    return this.database.transaction(name).objectStore(name);
  }
}

class MemoryStore implements Store {
  readonly lasts = false;
  private readonly kept = new Map<string, Conversation>();
  private readonly keptPictures = new Map<string, Picture>();

  async conversations(): Promise<Conversation[]> {
    return latestFirst([...this.kept.values()]);
  }

  async pictures(ids: readonly string[]): Promise<Picture[]> {
    return ids.map((id) => this.keptPictures.get(id)).filter((one) => one !== undefined);
  }

  async saveConversation(conversation: Conversation): Promise<void> {
    this.kept.set(conversation.id, conversation);
  }

  async savePicture(picture: Picture): Promise<void> {
    this.keptPictures.set(picture.id, picture);
  }

  async remove(conversation: Conversation): Promise<void> {
    this.kept.delete(conversation.id);
    for (const id of conversation.pictureIds) this.keptPictures.delete(id);
  }
}

function latestFirst(conversations: Conversation[]): Conversation[] {
  return conversations.sort((a, b) => b.updated - a.updated);
}
