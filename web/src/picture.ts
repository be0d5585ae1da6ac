// From a file to a picture that can be sent: opened, turned upright, made smaller where it is large.
// The server takes few formats; whatever else this browser can open is written anew as WebP or JPEG.

import { newId, type Picture } from "./conversation";

const LONGEST_SIDE = 1024; // pixels; image encoders take 224 to 490, so nothing is lost that they could see
const MOST_BYTES = 4_000_000; // of a small picture with a large file, such as an animation
const QUALITY = 0.9;

export class UnreadablePicture extends Error {}

export async function openPicture(file: Blob, name: string, formats: readonly string[]): Promise<Picture> {
  const bitmap = await createImageBitmap(file, { imageOrientation: "from-image" }).catch(() => null);
  if (!bitmap || bitmap.width === 0) throw new UnreadablePicture(refusal(name, formats));
  const scale = Math.min(1, LONGEST_SIDE / Math.max(bitmap.width, bitmap.height));
  const width = Math.max(1, Math.round(bitmap.width * scale));
  const height = Math.max(1, Math.round(bitmap.height * scale));
  const asItIs = scale === 1 && formats.includes(file.type) && file.size <= MOST_BYTES;
  const blob = asItIs ? file : await drawn(bitmap, width, height, file.type);
  bitmap.close();
  // A File may refer to its place on disk; the store shall keep the bytes.
  const kept = new Blob([blob], { type: blob.type });
  return { id: newId(), name, alt: "", credit: "", width, height, blob: kept };
}

async function drawn(bitmap: ImageBitmap, width: number, height: number, type: string): Promise<Blob> {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  if (!context) throw new UnreadablePicture("This browser cannot make a large picture smaller. Choose a smaller one.");
  context.imageSmoothingQuality = "high";
  if (type !== "image/jpeg") {
    const webp = await encoded(canvas, context, bitmap, "image/webp");
    if (webp?.type === "image/webp") return webp;
    context.fillStyle = "white"; // JPEG has no transparency; black would be its stand-in
    context.fillRect(0, 0, width, height);
  }
  const jpeg = await encoded(canvas, context, bitmap, "image/jpeg");
  if (!jpeg) throw new UnreadablePicture("The picture could not be made smaller. Choose a smaller one.");
  return jpeg;
}

function encoded(
  canvas: HTMLCanvasElement,
  context: CanvasRenderingContext2D,
  bitmap: ImageBitmap,
  type: string,
): Promise<Blob | null> {
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => canvas.toBlob(resolve, type, QUALITY));
}

function refusal(name: string, formats: readonly string[]): string {
  const names = formats.map((format) => format.replace("image/", "").toUpperCase());
  return `${name} cannot be opened as a picture. These kinds work: ${names.join(", ")}.`;
}

export function dataUrl(blob: Blob): Promise<string> {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(String(reader.result));
    reader.onerror = () => reject(new UnreadablePicture("The picture could not be read. Choose it again."));
    reader.readAsDataURL(blob);
  });
}

const urls = new Map<string, string>();

/** An address for `<img>`. One per picture for as long as the page lives or until it is forgotten. */
export function pictureUrl(picture: Picture): string {
  const known = urls.get(picture.id);
  if (known !== undefined) return known;
  const url = URL.createObjectURL(picture.blob);
  urls.set(picture.id, url);
  return url;
}

export function forgetPicture(id: string): void {
  const url = urls.get(id);
  if (url !== undefined) URL.revokeObjectURL(url);
  urls.delete(id);
}

/** The first picture among what was dropped or pasted, else any file, so that its refusal can be said. */
export function pictureFile(transfer: DataTransfer | null): File | null {
  const files = Array.from(transfer?.files ?? []);
  return files.find((file) => file.type.startsWith("image/")) ?? files[0] ?? null;
}
