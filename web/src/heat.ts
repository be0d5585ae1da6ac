// A heat map's arithmetic: a coarse grid becomes smooth pixels in colours of even steps.
// The colours run in OKLCH from dark violet to pale yellow, lightness rising in a straight line.

export type Rgb = [red: number, green: number, blue: number];

const STEPS = 256;
const DARKEST = 0.2;
const LIGHTEST = 0.95;
const FIRST_HUE = 285; // violet, in degrees
const LAST_HUE = 465; // yellow, by way of red

const PLACES = [
  ...["at the upper left", "at the top", "at the upper right"],
  ...["on the left", "in the middle", "on the right"],
  ...["at the lower left", "at the bottom", "at the lower right"],
];

/** Each of `grid`'s numbers as its place between the least (0) and the most (1). */
export function spread(grid: readonly number[]): number[] {
  const least = Math.min(...grid);
  const range = Math.max(...grid) - least;
  return grid.map((value) => (range > 0 ? (value - least) / range : 0));
}

/** A word's map: the queries' maps, each by how much the word took from it. */
export function weighted(queries: readonly number[][], weights: readonly number[]): number[] {
  const size = queries[0]?.length ?? 0;
  return Array.from({ length: size }, (_, cell) =>
    queries.reduce((sum, query, at) => sum + (weights[at] ?? 0) * (query[cell] ?? 0), 0),
  );
}

/** Pixels of `width` x `height` between the centres of the cells, beyond the outermost centres as these. */
export function heatPixels(
  grid: readonly number[],
  rows: number,
  columns: number,
  width: number,
  height: number,
): ImageData {
  const values = spread(grid);
  const colours = colourMap();
  const image = new ImageData(width, height);
  for (let y = 0; y < height; y++) {
    const [top, bottom, down] = between(((y + 0.5) / height) * rows - 0.5, rows);
    for (let x = 0; x < width; x++) {
      const [left, right, across] = between(((x + 0.5) / width) * columns - 0.5, columns);
      const at = (row: number, column: number) => values[row * columns + column] ?? 0;
      const above = at(top, left) * (1 - across) + at(top, right) * across;
      const below = at(bottom, left) * (1 - across) + at(bottom, right) * across;
      const value = above * (1 - down) + below * down;
      const [red, green, blue] = colours[Math.round(value * (STEPS - 1))] ?? [0, 0, 0];
      image.data.set([red, green, blue, 255], (y * width + x) * 4);
    }
  }
  return image;
}

/** The two cells a place lies between, and how far it is from the first. */
function between(place: number, cells: number): [first: number, second: number, share: number] {
  const inside = Math.min(Math.max(place, 0), cells - 1);
  const first = Math.floor(inside);
  return [first, Math.min(first + 1, cells - 1), inside - first];
}

/** Where most of it lies, in words: the picture in thirds, each way. */
export function mostlyWhere(grid: readonly number[], rows: number, columns: number): string {
  const sums = Array.from({ length: 9 }, () => 0);
  const third = (at: number, of: number) => Math.min(2, Math.floor(((at + 0.5) / of) * 3));
  grid.forEach((value, cell) => {
    const region = third(Math.floor(cell / columns), rows) * 3 + third(cell % columns, columns);
    sums[region] = (sums[region] ?? 0) + value;
  });
  return PLACES[sums.indexOf(Math.max(...sums))] ?? "";
}

export function colourMap(): Rgb[] {
  return Array.from({ length: STEPS }, (_, step) => {
    const share = step / (STEPS - 1);
    const lightness = DARKEST + (LIGHTEST - DARKEST) * share;
    const hue = ((FIRST_HUE + (LAST_HUE - FIRST_HUE) * share) * Math.PI) / 180;
    return mostColourful(lightness, hue);
  });
}

/** As strong a colour as the screen can show at this lightness and hue, up to a bound that keeps the steps even. */
function mostColourful(lightness: number, hue: number): Rgb {
  let strong = 0.19;
  while (strong > 0 && !linearRgb(lightness, strong, hue).every((one) => one >= 0 && one <= 1)) strong -= 0.005;
  return linearRgb(lightness, Math.max(0, strong), hue).map(toByte) as Rgb;
}

// OKLab to linear sRGB, by the matrices of its definition (Ottosson 2020).
function linearRgb(lightness: number, chroma: number, hue: number): Rgb {
  const a = chroma * Math.cos(hue);
  const b = chroma * Math.sin(hue);
  const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
  return [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ];
}

function toByte(linear: number): number {
  const inside = Math.min(Math.max(linear, 0), 1);
  const encoded = inside <= 0.0031308 ? 12.92 * inside : 1.055 * inside ** (1 / 2.4) - 0.055;
  return Math.round(encoded * 255);
}
