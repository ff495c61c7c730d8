// What the page does: light and dark, its figures, and the buttons and keys of a timeline.
"use strict";

const root = document.documentElement;
const dark = matchMedia("(prefers-color-scheme: dark)");
const CHOICES = ["auto", "light", "dark"];
let choice = "auto";
try { choice = localStorage.getItem("prestage-theme") || "auto"; } catch { /* a page from a file may not remember */ }

function models() {
  return Bokeh.documents.flatMap((page) => [...page.all_models]);
}

function applyTheme() {
  root.dataset.theme = choice === "auto" ? (dark.matches ? "dark" : "light") : choice;
  document.getElementById("theme").textContent = "Theme: " + choice;
  // Colors of text come from the style sheet whenever a figure is painted.
  if (window.Bokeh) models().filter((model) => model.type === "Figure").forEach((plot) => plot.change.emit());
}

document.getElementById("theme").addEventListener("click", () => {
  choice = CHOICES[(CHOICES.indexOf(choice) + 1) % CHOICES.length];
  try { localStorage.setItem("prestage-theme", choice); } catch { /* as above */ }
  applyTheme();
});
dark.addEventListener("change", applyTheme);
applyTheme();

// Moves or scales what a timeline shows, within its bounds.
function look(range, start, end) {
  const [low, high] = range.bounds;
  const width = Math.min(Math.max(end - start, range.min_interval), high - low);
  const from = Math.min(Math.max(low, (start + end - width) / 2), high - width);
  range.setv({start: from, end: from + width});
}

function zoom(range, factor) {
  const middle = (range.start + range.end) / 2;
  const half = (range.end - range.start) / 2 * factor;
  look(range, middle - half, middle + half);
}

function move(range, share) {
  const by = (range.end - range.start) * share;
  look(range, range.start + by, range.end + by);
}

const KEYS = {w: (range) => zoom(range, 0.5), s: (range) => zoom(range, 2), a: (range) => move(range, -0.25), d: (range) => move(range, 0.25)};

function wireTimelines() {
  const ranges = models().filter((model) => model.tags && model.tags.includes("timeline"));
  const renderers = models().filter((model) => model.type === "GlyphRenderer");
  // What two timelines show at first is more than each was given to draw.
  ranges.forEach((range) => range.properties.start.change.emit());
  const firsts = ranges.map((range) => [range.start, range.end]);
  const each = (change) => ranges.forEach(change);
  const ACTIONS = {
    first: (range, at) => range.setv({start: firsts[at][0], end: firsts[at][1]}),
    whole: (range) => look(range, ...range.bounds),
    closer: KEYS.w,
    farther: KEYS.s,
  };
  for (const button of document.querySelectorAll("button[data-action]")) {
    button.addEventListener("click", () => each(ACTIONS[button.dataset.action]));
  }
  for (const button of document.querySelectorAll("button[data-kind]")) {
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", shown);
      renderers.filter((model) => model.name === button.dataset.kind && model.tags.includes("span"))
        .forEach((model) => { model.visible = shown; });
    });
  }
  const card = document.getElementById("timeline");
  document.addEventListener("keydown", (event) => {
    const key = KEYS[event.key];
    if (key && card && card.matches(":hover") && !event.ctrlKey && !event.metaKey && !event.altKey) each(key);
  });
}

const figures = JSON.parse(document.getElementById("figures").textContent);
if (figures.roots) {
  Bokeh.embed.embed_items({page: figures.page}, [{docid: "page", roots: figures.roots, root_ids: Object.keys(figures.roots)}])
    .then(() => { wireTimelines(); root.dataset.ready = "true"; });
} else {
  root.dataset.ready = "true";
}
