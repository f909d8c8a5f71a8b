// Small charts, drawn into an SVG that stretches with the page.

const SVG = "http://www.w3.org/2000/svg";

function path(className, d) {
  const element = document.createElementNS(SVG, "path");
  element.setAttribute("class", className);
  element.setAttribute("d", d);
  return element;
}

/** A dot is a line of no length with a round cap, so that it stays round where the chart is stretched. */
const dot = ([x, y]) => `M${x.toFixed(2)} ${y.toFixed(2)}h0`;

/** Values in their order as dots, on a line at their median. */
export function dots(svg, values) {
  const [least, most] = [Math.min(...values), Math.max(...values)];
  const y = (value) => (most > least ? 28 - (24 * (value - least)) / (most - least) : 16);
  const x = (at) => 3 + (94 * at) / (values.length - 1);
  const middle = [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)];
  if (values.length < 2) return svg.replaceChildren();
  svg.replaceChildren(
    path("median", `M0 ${y(middle)}H100`),
    path("dots", values.map((value, at) => dot([x(at), y(value)])).join("")),
  );
}

/** Series of `[x, y]`, x from 0 to 1 and y from 0 to `most`, each as a line with its points. */
export function lines(svg, series, most) {
  const place = ([x, y]) => [300 * x, 98 - (94 * y) / most];
  svg.replaceChildren(
    path("grid", "M0 98H300M0 51H300M0 4H300"),
    ...series.flatMap((points, at) => {
      const placed = points.map(place);
      const line = placed.map(([x, y], first) => `${first ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
      return [path(`line of-${at}`, line), path(`dots of-${at}`, placed.map(dot).join(""))];
    }),
  );
}

/** The values of the last minute as a line, the newest at the right. */
export function sparkline(svg, values) {
  const most = Math.max(1, ...values);
  const points = values.map((value, i) => `${i ? "L" : "M"}${60 - values.length + 1 + i} ${19 - (18 * value) / most}`);
  svg.replaceChildren(path("line", points.join("")));
}
