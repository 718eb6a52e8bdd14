"""Build README.md from nbs/index.ipynb and the documentation site in _docs/.

Chapters go through nbdev's processors, the reference comes from docments; both are notebooks in _proc/. Quarto renders
them where it is installed; otherwise nbconvert makes plain HTML of the same notebooks, with the navigation of _quarto.yml,
search, light and dark, and code folding (tools/site/)."""
import argparse, html, json, re, shutil, subprocess, sys
from functools import cache, cached_property
from importlib import import_module
from pathlib import Path

import nbformat, yaml
from execnb.nbio import read_nb, write_nb
from jinja2 import pass_context
from latex2mathml.converter import convert as mathml
from nbconvert import HTMLExporter, MarkdownExporter, TemplateExporter
from nbconvert.filters.highlight import Highlight2HTML
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbdev.config import get_config
from nbdev.process import NBProcessor
from nbdev.processors import FilterDefaults
from nbdev.quarto import refresh_quarto_yml
from traitlets.config import Config

from api_pages import api_page, definitions

ROOT = Path(__file__).resolve().parent.parent
NBS, PROC, SITE = ROOT / "nbs", ROOT / "_proc", Path(__file__).resolve().parent / "site"
WORDS = {"train"}   # also a split and a verb: the function is meant where its parentheses are written
LEFT_OUT = {"add_show_docs", "exec_show_docs", "insert_warning", "rm_export", "mv_exports", "add_fold"}   # code stays in the chapters, signatures have pages


# --- both ways: notebooks in _proc/

def page_name(notebook):
    "`02_mining.ipynb` becomes `mining.html`."
    p = Path(notebook)
    return str(p.with_name(re.sub(r"^\d+[a-z]?_", "", p.stem) + ".html"))


def chapter_of():
    "Module -> its notebook."
    return {p.stem.split("_", 1)[1]: p.name for p in sorted(NBS.glob("[0-9][0-9]*_*.ipynb"))}


def last_sentence(markdown):
    "The end of the prose before a picture: its alternative text where a cell gives none."
    text = re.sub(r"```.*?```|\$\$.*?\$\$|^[#|>][^\n]*$|<[^>]+>", " ", markdown, flags=re.S | re.M)
    text = re.sub(r"[`*$]|\[([^\]]+)\]\([^)]*\)", r"\1", text)
    return " ".join(re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(text.split()))[-2:])[:300]


def relative_links(markdown, up, home):
    "nbdev links names to chapters on the web: here public ones lead to the reference, and files of the repository to the repository."
    config = get_config()
    markdown = re.sub(rf"\[(`[^`]*`)\]\({re.escape(home)}[^)]*#(?:[^)]*\.)?_[^)]*\)", r"\1", markdown)
    here = rf"\[`([^`]*?)(\(\))?`\]\({re.escape(home)}([\w/]+\.html)#([^)]*)\)"           # in small letters, which are not enough to tell names apart
    def lead(m):
        if m[1] in WORDS and not m[2]: return f"`{m[1]}`"
        return f"[`{m[1]}{m[2] or ''}`]({up}api/{m[3]}#{m[1][-len(m[4]):]})"
    markdown = re.sub(here, lead, markdown)
    return re.sub(r"\]\(" + re.escape(up) + r"\.\./([^)#]+)", rf"]({config.git_url}/blob/{config.branch}/\1", markdown)


def chapter_links(markdown, up):
    "Where the prose names a chapter by its number it leads there; code, formulas and links stay as they are."
    notebooks = {name.split("_")[0]: name for name in chapter_of().values()}
    def lead(m): return re.sub(r"\d\d[a-z]?", lambda n: f"[{n[0]}]({up}{notebooks[n[0]]})", m[0])
    kept = r"```.*?```|`[^`]*`|\$\$.*?\$\$|!?\[[^\]]*\]\([^)]*\)"
    named = r"\b[Cc]hapters? \d\d[a-z]?\b(?:(?:, | and | to )\d\d[a-z]?\b)*"
    return re.sub(f"{kept}|({named})", lambda m: lead(m) if m[1] else m[0], markdown, flags=re.S)


def process_chapter(path):
    "A notebook of the book as it is shown: hidden cells gone, names linked, options for pictures and exported code."
    nb = read_nb(path)
    NBProcessor(nb=nb, procs=[p for p in FilterDefaults().base_procs() if p.__name__ not in LEFT_OUT]).process()
    relative = path.relative_to(NBS)
    up, cells, before = "../" * (len(relative.parts) - 1), [], ""
    home = f"{get_config().doc_host}{get_config().doc_baseurl}/"
    for c in nb.cells:
        directives = c.get("directives_", {})
        if "default_exp" in directives or not c.source.strip(): continue
        if c.cell_type == "markdown":
            c.source = chapter_links(relative_links(c.source, up, home), up)
            before = last_sentence(c.source) or before
        if c.cell_type == "code":
            options = []
            if any("image/png" in o.get("data", {}) for o in c.outputs): options.append(f"#| fig-alt: {json.dumps(before, ensure_ascii=False)}")
            names = list(definitions(c.source)) if "export" in directives else []
            if names:
                options.append(f"#| code-summary: {json.dumps('Exported: ' + ', '.join(n for n in names if n.split('.')[0] not in names or '.' not in n))}")
                cells.append(dict(cell_type="markdown", id=f"{c.id}-names", metadata={}, source="".join(f'<span id="code-{n}"></span>' for n in names)))
            c.source = "\n".join(options + [c.source])
        cells.append({k: v for k, v in c.items() if not k.endswith("_")})
    (PROC / relative).parent.mkdir(parents=True, exist_ok=True)
    write_nb({**nb, "cells": cells}, PROC / relative)


def reference_page(name, title, text):
    "A page of the reference, as a notebook."
    front = nbformat.v4.new_raw_cell(f"---\ntitle: {title}\noutput-file: {name}.html\n---\n")
    (PROC / "api").mkdir(exist_ok=True)
    kernel = dict(display_name="python3", language="python", name="python3")
    page = nbformat.v4.new_notebook(cells=[front, nbformat.v4.new_markdown_cell(text)], metadata=dict(kernelspec=kernel))
    nbformat.write(page, PROC / "api" / f"{name}.ipynb")


def process():
    "Write _proc/: every notebook of the site."
    shutil.rmtree(PROC, ignore_errors=True)
    PROC.mkdir()
    for path in sorted(p for p in NBS.rglob("[!_.]*.ipynb") if not any(part[0] in "._" for part in p.relative_to(NBS).parts)): process_chapter(path)
    for name, chapter in chapter_of().items(): reference_page(name, f"ctvlm.{name}", api_page(name, chapter))
    title, _, text = import_module("ctvlm.cli").manual().partition("\n")
    reference_page("manual", title.lstrip("# "), text)
    for extra in ("styles.css", "images"):
        if (NBS / extra).is_dir(): shutil.copytree(NBS / extra, PROC / extra)
        elif (NBS / extra).exists(): shutil.copy(NBS / extra, PROC / extra)


def quarto_site(out):
    "The site by Quarto."
    refresh_quarto_yml()
    for name in ("_quarto.yml", "nbdev.yml"): shutil.copy(NBS / name, PROC / name)
    subprocess.run(["quarto", "render", "--no-cache"], cwd=PROC, check=True)
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(PROC / get_config().doc_path.name, out)
    print(f"{out}: by Quarto")


# --- without Quarto

class MathRenderer(IPythonRenderer):
    "Formulas as MathML: no script, no font from elsewhere."
    def inline_math(self, body, display="inline"): return mathml(body.strip().replace(r"\arg", r"\operatorname{arg}"), display=display)  # the one word that it lacks
    def block_math(self, body): return self.inline_math(body, "block")
    def latex_environment(self, name, body): return self.block_math(f"\\begin{{{name}}}{body}\\end{{{name}}}")


class PlainExporter(HTMLExporter):
    "nbconvert's HTML of a notebook, with folded code, pictures as files and formulas as MathML."
    def __init__(self): super().__init__(raw_template="""{%- extends 'basic/index.html.j2' -%}
{% block codecell %}<!--cell--><div class="cell">{{ super.super() }}</div><!--/cell-->{% endblock %}
{% block input_group %}{% if cell.source %}<details class="code{{ ' exported' if cell.metadata.exported }}" open><summary>{{ cell.metadata.summary }}</summary>
{{ cell.source | highlight_code(metadata=cell.metadata) }}</details>{% endif %}{% endblock %}
{% block markdowncell %}{{ cell.source | markdown2html }}{% endblock %}{% block rawcell %}{% endblock %}""",
        config=Config({"ExtractOutputPreprocessor": {"enabled": True}}))

    @pass_context
    def markdown2html(self, context, source): return MarkdownWithMath(renderer=MathRenderer(escape=False, anchor_link_text="#")).render(source)

    def from_notebook_node(self, nb, resources): # not the parent's, which parses the page once more for alternative texts that are there
        self.register_filter("highlight_code", Highlight2HTML(pygments_lexer="python3", parent=self))
        return TemplateExporter.from_notebook_node(self, nb, resources)


@cache
def exporter():
    "One exporter for all pages."
    return PlainExporter()


class Page:
    "One processed notebook and its HTML."
    def __init__(self, notebook):
        self.notebook, self.name = notebook, page_name(notebook)
        self.up = "../" * (len(Path(notebook).parts) - 1)
        self.nb = nbformat.read(PROC / notebook, as_version=4)
        self.front = yaml.safe_load(next((c.source for c in self.nb.cells if c.cell_type == "raw"), "---\n---").strip().strip("-")) or {}
        self.title, self.description = self.front.get("title", "ctvlm"), self.front.get("description", "")
        for c in self.nb.cells:
            if c.cell_type != "code": continue
            options = dict(re.findall(r"^#\| *([\w-]+): *(.*)$", c.source, re.M))
            options = {k: yaml.safe_load(v) for k, v in options.items()}
            c.source = "" if options.get("echo") is False else re.sub(r"^#\|.*\n?", "", c.source, flags=re.M).strip()
            c.metadata.update(summary=options.get("code-summary", "Code"), exported="code-summary" in options, alt=options.get("fig-alt", ""))

    @cached_property
    def html(self):
        "The body; links between notebooks lead to pages, and headings of the reference have the anchors that they name."
        self.nb.metadata.pop("widgets", None)
        stem = Path(self.name).stem
        body, resources = exporter().from_notebook_node(self.nb, resources={"unique_key": stem, "output_files_dir": f"{stem}_pictures"})
        self.pictures = resources["outputs"]
        body = re.sub(r'(href=")(?!https?:)([^"#]+\.ipynb)', lambda m: m[1] + page_name(m[2]), body)
        return re.sub(r'<h([2-6]) id="[^"]*">(.*?) \{#([\w.]+)\}<a class="anchor-link" href="[^"]*">', r'<h\1 id="\3">\2<a class="anchor-link" href="#\3">', body)

    @cached_property
    def sections(self):
        "Heading level, text, anchor and prose of each part of the page."
        prose = re.sub(r"<!--cell-->.*?<!--/cell-->", "", self.html, flags=re.S)
        parts = re.split(r'<h([23]) id="([^"]*)">(.*?)<a class="anchor-link"', prose)
        plain = lambda text: " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())
        return [(1, self.title, "", plain(self.description + " " + parts[0]))] + [(int(level), plain(text), anchor, plain("<" + body)) for level, anchor, text, body in zip(*[iter(parts[1:])] * 4)]


def entries(sidebar):
    "The notebooks of a sidebar, in order."
    return [p for e in sidebar for p in ([e] if isinstance(e, str) else e["contents"])]


def navigation(sidebar, pages, current):
    "The sidebar of _quarto.yml as nested lists; below the current page its sections, for windows too narrow for a third column."
    here = "".join(f'<li><a href="#{anchor}">{html.escape(text)}</a></li>' for level, text, anchor, _ in current.sections[1:] if level == 2)
    sections = f'<ul class="here">{here}</ul>' if here else ""

    def link(notebook):
        page, mark, below = pages[notebook], "", ""
        if notebook == current.notebook: mark, below = " aria-current=page", sections
        return f'<li><a href="{current.up}{page.name}"{mark}>{html.escape(page.title)}</a>{below}</li>'

    def part(entry):
        if isinstance(entry, str): return f"<ul>{link(entry)}</ul>"
        return f"<strong>{html.escape(entry['section'])}</strong><ul>{''.join(map(link, entry['contents']))}</ul>"
    return "".join(map(part, sidebar))


def on_this_page(page):
    "The headings of a page as links."
    links = [f'<li><a class="h{level}" href="#{anchor}">{html.escape(text)}</a></li>' for level, text, anchor, _ in page.sections[1:]]
    return f"<strong>On this page</strong><ul>{''.join(links)}</ul>" if links else ""


def neighbours(sidebar, pages, page):
    "Links to the page before and the page after."
    order = entries(sidebar)
    k = order.index(page.notebook)
    link = lambda p, text: f'<a href="{page.up}{pages[p].name}">{text.format(html.escape(pages[p].title))}</a>'
    return (link(order[k - 1], "&larr; {}") if k else "") + (link(order[k + 1], "{} &rarr;") if k + 1 < len(order) else "")


def write_page(page, sidebar, pages, out):
    "One page of the plain site with its pictures."
    config, stem = get_config(), Path(page.notebook).stem
    where = f"ctvlm/{stem.replace('manual', 'cli')}.py" if page.notebook.startswith("api/") else f"nbs/{page.notebook}"
    text = (SITE / "page.html").read_text().format(
        title=html.escape(page.title), description=html.escape(re.sub("[`*]", "", page.description)), lead=exporter().markdown2html(None, page.description),
        up=page.up, version=config.version, body=page.html, navigation=navigation(sidebar, pages, page), contents=on_this_page(page), neighbours=neighbours(sidebar, pages, page),
        tools='<button id="site-fold" type="button">Hide code</button>' if 'class="code' in page.html else "",
        footer=f'<a href="{config.git_url}/blob/{config.branch}/{where}">{where}</a> - <a href="{config.git_url}/issues/new">Report an issue</a> - For research, not for diagnosis.')
    target = out / page.name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)
    for name, data in page.pictures.items():
        (target.parent / name).parent.mkdir(exist_ok=True)
        (target.parent / name).write_bytes(data)


def plain_site(out):
    "The site by nbconvert."
    sidebar = yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]["sidebar"]["contents"]
    pages = {p: Page(p) for p in entries(sidebar)}
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for page in pages.values(): write_page(page, sidebar, pages, out)
    for name in ("site.css", "site.js"): shutil.copy(SITE / name, out)
    shutil.copytree(NBS / "images", out / "images", dirs_exist_ok=True)
    index = [(p.name, p.title, heading, anchor, text) for p in pages.values() for _, heading, anchor, text in p.sections]
    (out / "search.js").write_text("window.searchIndex = " + json.dumps(index, ensure_ascii=False) + ";\n")
    print(f"{out}: {len(pages)} pages, plain (with Quarto installed, by Quarto)")


# --- README.md

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
    ap.add_argument("--plain", action="store_true", help="without Quarto, even where it is installed")
    ap.add_argument("--out", type=Path, default=ROOT / "_docs", help="folder of the site, replaced")
    args = ap.parse_args()
    readme()
    if args.readme: return
    process()
    if shutil.which("quarto") and not args.plain: quarto_site(args.out)
    else: plain_site(args.out)


if __name__ == "__main__": main()
