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

// what is typed can be copied; outputs cannot
for (const pre of navigator.clipboard || !isSecureContext ? document.querySelectorAll("main details.code pre, main .highlight pre, main pre:has(> code)") : []) {
  const box = document.createElement("div"), button = Object.assign(document.createElement("button"), { type: "button", className: "copy", textContent: "Copy" });
  pre.replaceWith(box); box.className = "copied"; box.append(pre, button);
  button.addEventListener("click", async () => { await navigator.clipboard.writeText(pre.textContent.trimEnd()); button.textContent = "Copied"; setTimeout(() => { button.textContent = "Copy"; }, 1500); });
}

let index;                                     // [page, title, heading, anchor, text], loaded when first asked
const load = () => index ??= new Promise(ready => {
  const s = document.createElement("script");
  s.src = root.dataset.up + "search.js"; s.onload = () => ready(window.searchIndex); document.head.append(s);
});

const count = (text, words) => words.reduce((n, w) => n + (text.includes(w) ? 1 : 0), 0);
async function search() {
  const asked = box.value.toLowerCase().trim(), words = [...asked.matchAll(/"([^"]+)"|(\S+)/g)].map(m => (m[1] ?? m[2]).replaceAll('"', "")).filter(Boolean);      // "in quotes": as a phrase
  const phrase = words.join(" "), cut = (text, at) => { const from = at <= 40 ? 0 : text.indexOf(" ", at - 40) + 1, end = text.lastIndexOf(" ", from + 130); return (from ? "… " : "") + text.slice(from, end > from ? end : from + 130); };
  const hits = !words.length ? [] : (await load())
    .map(([page, title, heading, anchor, text]) => {
      const low = text.toLowerCase(), name = heading.toLowerCase();
      const score = words.every(w => (low + " " + name).includes(w)) ? 1 + 10 * count(name, words) + (name === phrase ? 50 : 0) + (words.length > 1 && (low + " " + name).includes(phrase) ? 20 : 0) + count(low, words) : 0;
      return { page, title, heading, anchor, text, score, at: Math.max(0, low.indexOf(low.includes(phrase) ? phrase : words[0])) };
    }).filter(h => h.score).sort((a, b) => b.score - a.score).slice(0, 20);
  list.replaceChildren(...hits.map(h => {
    const item = document.createElement("li"), a = item.appendChild(document.createElement("a")), small = document.createElement("small");
    a.href = root.dataset.up + h.page + (h.anchor ? "#" + h.anchor : "");
    a.textContent = h.heading === h.title ? h.title : h.title + ": " + h.heading;
    small.textContent = cut(h.text, h.at);
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
