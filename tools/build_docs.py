"""Build README.md from nbs/index.ipynb and the documentation site in _docs/.

The site is made by Quarto where it is installed. Otherwise the same processed notebooks (nbdev adds the API
tables) become plain HTML through nbconvert, with the navigation of _quarto.yml."""
import argparse, html, re, shutil, subprocess, sys
from pathlib import Path

import nbformat, yaml
from nbconvert import HTMLExporter, MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
NBS, OUT = ROOT / "nbs", ROOT / "_docs"

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} | ctvlm</title><link rel="stylesheet" href="{up}site.css"></head>
<body><a class="skip" href="#content">Skip to content</a>
<details class="menu" open><summary>Contents</summary><nav aria-label="Chapters">{nav}</nav></details>
<main id="content">{body}</main></body></html>
"""

CSS = """:root { --bg: #fff; --fg: #1b1f24; --soft: #f4f5f7; --line: #d5d9de; --link: #0b62a4; }
@media (prefers-color-scheme: dark) { :root { --bg: #15181c; --fg: #e3e6ea; --soft: #1f242a; --line: #39414a; --link: #7cb8ea; }
  main img { background: #fff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--fg); font: 16px/1.55 system-ui, sans-serif; display: flex; align-items: flex-start; }
a { color: var(--link); } .skip { position: absolute; left: -999px; } .skip:focus { left: 8px; top: 8px; background: var(--bg); }
.menu { flex: 0 0 240px; padding: 16px; position: sticky; top: 0; max-height: 100vh; overflow: auto; border-right: 1px solid var(--line); }
.menu ul { list-style: none; padding-left: 0; margin: 4px 0 12px; } .menu [aria-current] { font-weight: 700; }
main { flex: 1 1 auto; min-width: 0; max-width: 900px; padding: 16px 24px 64px; overflow-wrap: anywhere; }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: 4px; padding: 8px 12px; overflow-x: auto; font-size: 13.5px; line-height: 1.4; overflow-wrap: normal; }
code { font-family: ui-monospace, monospace; } img { max-width: 100%; height: auto; }
table { border-collapse: collapse; display: block; overflow-x: auto; max-width: 100%; font-size: 14px; } th, td { border-bottom: 1px solid var(--line); padding: 3px 10px; text-align: left; }
blockquote { margin: 0; padding-left: 12px; border-left: 4px solid var(--line); } math { max-width: 100%; overflow-x: auto; overflow-y: hidden; }
.anchor-link, .jp-InputPrompt, .jp-OutputPrompt { display: none; }
.highlight .k, .highlight .kn, .highlight .kc { color: #8250df; } .highlight .s1, .highlight .s2, .highlight .sd { color: #0a7040; } .highlight .c1 { color: #6e7781; }
@media (prefers-color-scheme: dark) { .highlight .k, .highlight .kn, .highlight .kc { color: #d2a8ff; } .highlight .s1, .highlight .s2, .highlight .sd { color: #7ee0a8; } .highlight .c1 { color: #9aa4af; } }
@media (max-width: 800px) { body { display: block; } .menu { position: static; max-height: none; border: 0; border-bottom: 1px solid var(--line); } main { padding: 8px 14px 48px; } }
"""


def page_name(notebook):
    "`02_mining.ipynb` becomes `mining.html`."
    p = Path(notebook)
    return str(p.with_name(re.sub(r"^\d+[a-z]?_", "", p.stem) + ".html"))


def title_of(nb):
    "The first heading of a notebook."
    found = re.search(r"^#\s+(.+)$", next((c.source for c in nb.cells if c.cell_type == "markdown"), ""), re.M)
    return found.group(1).strip() if found else "ctvlm"


def navigation(sidebar, titles, current, up):
    "The contents of `_quarto.yml` as nested HTML lists."
    def item(nb):
        mark = ' aria-current="page"' if nb == current else ""
        return f'<li><a href="{up}{page_name(nb)}"{mark}>{html.escape(titles[nb])}</a></li>'
    out = []
    for entry in sidebar:
        if isinstance(entry, str): out.append(f"<ul>{item(entry)}</ul>")
        else: out.append(f"<strong>{html.escape(entry['section'])}</strong><ul>{''.join(item(nb) for nb in entry['contents'])}</ul>")
    return "".join(out)


def with_alternative_texts(body):
    "Pictures of cells carry the sentence before them: `alt` is never empty."
    parts, last = re.split(r"(<img\b[^>]*>)", body), "figure"
    for i, part in enumerate(parts):
        if part.startswith("<img"):
            if not re.search(r'alt="[^"]+"', part) or 'alt="No description has been provided for this image"' in part:
                part = re.sub(r'\s*alt="[^"]*"', "", part)
                parts[i] = part.replace("<img", f'<img alt="{html.escape(last)}"', 1)
        else:
            for text in re.findall(r"<p>(.*?)</p>", part, re.S): last = re.sub(r"<[^>]+>|\s+", " ", text).strip()[:160] or last
    return "".join(parts)


def plain_site():
    "The site without Quarto: processed notebooks through nbconvert."
    from nbdev.quarto import proc_nbs
    source = Path(proc_nbs(str(NBS), n_workers=1, force=True))
    sidebar = yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]["sidebar"]["contents"]
    pages = [p for e in sidebar for p in ([e] if isinstance(e, str) else e["contents"])]
    notebooks = {p: nbformat.read(source / p, as_version=4) for p in pages}
    titles = {p: title_of(nb) for p, nb in notebooks.items()}
    exporter = HTMLExporter(template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True)
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    (OUT / "site.css").write_text(CSS)
    for p, nb in notebooks.items():
        body, _ = exporter.from_notebook_node(nb)
        body = re.sub(r'(href=")(?!https?:)([^"#]+\.ipynb)', lambda m: m[1] + page_name(m[2]), body)
        up = "../" * (len(Path(p).parts) - 1)
        target = OUT / page_name(p)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(PAGE.format(title=html.escape(titles[p]), up=up, nav=navigation(sidebar, titles, p, up), body=with_alternative_texts(body)))
    if (NBS / "images").is_dir(): shutil.copytree(NBS / "images", OUT / "images")
    print(f"{len(pages)} pages in {OUT.relative_to(ROOT)}/ (plain version; install Quarto for search and themes)")


def readme():
    "README.md from the index notebook: its hidden cells left out, pictures that cells drew in nbs/images/."
    nb = nbformat.read(NBS / "index.ipynb", as_version=4)
    nb.cells = [c for c in nb.cells if not re.match(r"#\|\s*(hide|default_exp)", c.source)]
    for c in nb.cells:
        if c.cell_type == "code": c.source = "" if re.search(r"^#\|\s*echo:\s*false", c.source, re.M) else re.sub(r"^#\|.*\n?", "", c.source, flags=re.M)
    nb.metadata.language_info = {"name": "python"}
    body, resources = MarkdownExporter().from_notebook_node(nb)
    body = re.sub(r"```python\s*```\n", "", body)
    heading = ""
    lines = []                                                     # no picture without an alternative text: its heading
    for line in body.split("\n"):
        heading = line.lstrip("# ") if line.startswith("#") else heading
        lines.append(line.replace("![png](", f"![{heading}]("))
    body = "\n".join(lines)
    (NBS / "images").mkdir(exist_ok=True)
    for i, (name, data) in enumerate(sorted(resources.get("outputs", {}).items()), 1):
        (NBS / "images" / f"index_{i}.png").write_bytes(data)
        body = body.replace(f"({name})", f"(images/index_{i}.png)")
    body = re.sub(r"\]\((?!https?:|#|\.\./)([^)]+\.(?:ipynb|png|svg|md))\)", r"](nbs/\1)", body).replace("](../", "](")
    text = "<!-- Generated from nbs/index.ipynb by tools/build_docs.py; edit that. -->\n\n" + re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"
    (ROOT / "README.md").write_text(text)
    print("README.md")


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--readme", action="store_true", help="only README.md")
    args = ap.parse_args()
    readme()
    if args.readme: return
    if shutil.which("quarto"): sys.exit(subprocess.run(["nbdev_docs"], cwd=ROOT).returncode)
    plain_site()


if __name__ == "__main__": main()
