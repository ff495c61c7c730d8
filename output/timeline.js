// Draws what of a timeline can be seen now: runs whenever its axis moves, so that a million spans zoom at once.
// Arguments: plot; all: a source of every span, by group and then by start; groups: [kind, row, first, end] of each;
// shown: for each kind, the source of what is drawn. Spans of a group, which is one kind on one lane, do not overlap.
// Spans narrower than a pixel are drawn as one, the more opaque the more of it they take.

const FAINTEST = 0.35;

function firstEndingAfter(ends, at, first, end) {
  while (first < end) {
    const middle = (first + end) >> 1;
    if (ends[middle] > at) end = middle; else first = middle + 1;
  }
  return first;
}

function draw() {
  const {from, to, layer, expert} = all.data;
  const {start, end} = plot.x_range;
  const pixel = (end - start) / Math.max(plot.inner_width || 1000, 100);
  const drawn = shown.map(() => ({from: [], to: [], row: [], alpha: [], count: [], layer: [], expert: []}));
  for (const [kind, row, first, last] of groups) {
    const out = drawn[kind];
    const add = (at, until, alpha, count, span) => {
      out.from.push(at); out.to.push(until); out.row.push(row); out.alpha.push(alpha); out.count.push(count);
      out.layer.push(layer[span]); out.expert.push(expert[span]);
    };
    let i = firstEndingAfter(to, start, first, last);
    while (i < last && from[i] < end) {
      if (to[i] - from[i] >= pixel) { add(from[i], to[i], 1, 1, i); i++; continue; }
      const begins = from[i], span = i;
      let busy = 0, count = 0;
      while (i < last && from[i] < begins + pixel && to[i] - from[i] < pixel) { busy += to[i] - from[i]; count++; i++; }
      const until = Math.max(begins + pixel, to[i - 1]);
      add(begins, until, FAINTEST + (1 - FAINTEST) * busy / (until - begins), count, span);
    }
  }
  shown.forEach((source, kind) => { source.data = drawn[kind]; });
}

// Both ends of the axis change, one after the other: draw once for both.
if (!plot.tags.includes("waiting")) {
  plot.tags.push("waiting");
  requestAnimationFrame(() => { plot.tags.splice(plot.tags.indexOf("waiting"), 1); draw(); });
}
