// Where questions are written, with the folded settings.
// Enter asks, Shift+Enter begins a line; while the model answers, the button stops it.

import { byId, button } from "./dom";
import type { Settings } from "./settings";

export class Composer {
  private readonly form = byId("composer", HTMLFormElement);
  private readonly question = byId("question", HTMLTextAreaElement);
  private readonly system = byId("system", HTMLTextAreaElement);
  private readonly maxTokens = byId("max-tokens", HTMLInputElement);
  private readonly temperature = byId("temperature", HTMLInputElement);

  /** `onAsk` says whether it took the question; if so the field is emptied. */
  constructor(onAsk: (question: string) => boolean, onStop: () => void) {
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (onAsk(this.question.value.trim())) this.question.value = "";
    });
    this.question.addEventListener("keydown", (event) => {
      // while an input method composes, Enter chooses a character
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.form.requestSubmit();
    });
    button("stop").addEventListener("click", () => {
      onStop();
      this.focus();
    });
  }

  showSettings(settings: Settings, mostTokens: number, onChange: (settings: Settings) => void): void {
    this.system.value = settings.system;
    this.maxTokens.max = String(mostTokens);
    this.writeNumbers(settings);
    const read = () => {
      settings.system = this.system.value.trim();
      settings.maxTokens = within(this.maxTokens, 1, mostTokens);
      settings.temperature = within(this.temperature, 0, 2) ?? 0;
      onChange(settings);
    };
    for (const field of [this.system, this.maxTokens, this.temperature]) {
      field.addEventListener("input", read);
      // only when the field is left: what is half typed must not change under the fingers
      field.addEventListener("change", () => this.writeNumbers(settings));
    }
  }

  private writeNumbers(settings: Settings): void {
    this.maxTokens.value = settings.maxTokens === null ? "" : String(settings.maxTokens);
    this.temperature.value = String(settings.temperature);
  }

  focus(): void {
    this.question.focus({ preventScroll: true });
  }

  setBusy(busy: boolean): void {
    button("send").hidden = busy;
    button("stop").hidden = !busy;
  }
}

/** The field's number, or the nearest that its bounds allow; null where it is empty. */
function within(field: HTMLInputElement, least: number, most: number): number | null {
  if (field.value.trim() === "" || Number.isNaN(field.valueAsNumber)) return null;
  const value = Math.min(Math.max(field.valueAsNumber, least), most);
  return field.step === "1" ? Math.round(value) : value;
}
