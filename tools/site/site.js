// Light and dark, the folded menu of small screens, code folding, search. No page needs it to be read.
const root = document.documentElement, box = document.getElementById("site-search"), list = document.getElementById("site-found");

document.getElementById("site-theme").addEventListener("click", () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  try { localStorage.setItem("theme", root.dataset.theme); } catch (e) {}
});

if (matchMedia("(max-width: 800px)").matches) document.querySelector(".menu").open = false;
const here = document.querySelector(".menu [aria-current]");
if (here) document.querySelector(".menu").scrollTop = here.offsetTop - 200;

document.getElementById("site-fold")?.addEventListener("click", e => {
  const cells = [...document.querySelectorAll("details.code")], open = !cells.some(c => c.open);
  cells.forEach(c => { c.open = open; });
  e.target.textContent = open ? "Hide code" : "Show code";
});

let index;                                     // [page, title, heading, anchor, text], loaded when first asked
const load = () => index ??= new Promise(ready => {
  const s = document.createElement("script");
  s.src = root.dataset.up + "search.js"; s.onload = () => ready(window.searchIndex); document.head.append(s);
});

const count = (text, words) => words.reduce((n, w) => n + (text.includes(w) ? 1 : 0), 0);
async function search() {
  const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
  const hits = !words.length ? [] : (await load())
    .map(([page, title, heading, anchor, text]) => {
      const low = text.toLowerCase(), name = heading.toLowerCase();
      const score = words.every(w => (low + " " + name).includes(w)) ? 1 + 10 * count(name, words) + (name === words.join(" ") ? 50 : 0) + count(low, words) : 0;
      return { page, title, heading, anchor, text, score, at: Math.max(0, low.indexOf(words[0]) - 40) };
    }).filter(h => h.score).sort((a, b) => b.score - a.score).slice(0, 20);
  list.replaceChildren(...hits.map(h => {
    const item = document.createElement("li"), a = item.appendChild(document.createElement("a")), small = document.createElement("small");
    a.href = root.dataset.up + h.page + (h.anchor ? "#" + h.anchor : "");
    a.textContent = h.heading === h.title ? h.title : h.title + ": " + h.heading;
    small.textContent = h.text.slice(h.at, h.at + 120);
    a.append(small);
    return item;
  }));
  if (words.length && !hits.length) list.append(Object.assign(document.createElement("li"), { textContent: "Nothing found." }));
  list.hidden = !words.length;
}
box.addEventListener("input", search);
box.addEventListener("focus", load);
document.addEventListener("keydown", e => {
  if (e.key === "/" && !/INPUT|TEXTAREA/.test(document.activeElement.tagName)) { e.preventDefault(); box.focus(); }
  if (e.key === "Escape") list.hidden = true;
});
document.addEventListener("click", e => { if (!e.target.closest(".search")) list.hidden = true; });
