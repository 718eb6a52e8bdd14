"The reference: one Markdown page per module, from signatures, docments and comments."
import ast, importlib, inspect, re, typing
from pathlib import Path

from fastcore.docments import docments
from nbdev.config import get_config
from nbdev.doclinks import patch_name


def assigned(node):
    "Names that an assignment makes; `table[key] = value` makes none."
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]


def defined_names(node):
    "What a statement defines, with its line: functions, classes and their methods, `Class.method` by `@patch`, values."
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)): return {patch_name(node): node.lineno}
    if isinstance(node, ast.ClassDef): return {node.name: node.lineno} | {f"{node.name}.{name}": line for m in node.body if not isinstance(m, ast.AnnAssign) for name, line in defined_names(m).items()}
    return dict.fromkeys(assigned(node), node.lineno)


def type_words(annotation):
    "`str|Path|None` as a reader says it: str or Path or None; module names are left out."
    if annotation in (None, inspect.Parameter.empty): return "None" if annotation is None else ""
    if isinstance(annotation, type) and not typing.get_args(annotation): return annotation.__name__
    short = re.sub(r"\b(?:[A-Za-z_]\w*\.)+", "", str(annotation)).replace(" ", "")
    return re.sub(r"^Optional\[(.*)\]$", r"\1|None", short).replace("|", " or ")


def default_words(value):
    "A default as it is written, if it is short."
    if value is inspect.Parameter.empty: return ""
    text = getattr(value, "__name__", None) or repr(value)
    return "..." if " at 0x" in text or len(text) > 60 else text


def own_parameters(obj):
    "Name, type, default and meaning of each parameter; a class says only its own, not those of a foreign base."
    if inspect.isclass(obj) and issubclass(obj, BaseException): return [("message", "str", "", "one line: what was found, what was expected, what to do")]
    notes, rows = docments(obj, full=True), []
    foreign = inspect.isclass(obj) and not getattr(obj.__init__, "__globals__", {}).get("__name__", "").startswith("ctvlm")
    for name, p in inspect.signature(obj).parameters.items():
        if name in ("self", "cls") or foreign and name not in vars(obj).get("__annotations__", {}): continue
        kind, meaning = p.annotation, (notes.get(name) or {}).get("docment")
        if typing.get_origin(kind) is typing.Annotated:                    # a parameter of the command: its help is its meaning
            kind, info = typing.get_args(kind)[:2]
            meaning = meaning or info.help
        stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        rows.append((stars + name, type_words(kind), default_words(p.default), meaning or ""))
    back = notes.get("return") or {}
    returns = inspect.signature(obj).return_annotation
    if not inspect.isclass(obj) and (returns not in (None, inspect.Signature.empty) or back.get("docment")):
        rows.append(("returns", type_words(returns), "", back.get("docment") or ""))
    return rows


def cell(text):
    "Text for a cell of a Markdown table."
    line = " ".join(str(text).split()).replace("|", r"\|")
    return line if "`" in line else line.replace("<", "&lt;")


def signature_line(name, rows):
    "The call, on one line or with one parameter a line."
    said = [n + (f":{t.replace(' or ', '|')}" if t else "") + (f"={d}" if d else "") for n, t, d, _ in rows if n != "returns"]
    back = "".join(f"->{t.replace(' or ', '|')}" for n, t, *_ in rows if n == "returns" and t)
    line = f"{name}({', '.join(said)}){back}"
    return line if len(line) <= 88 else f"{name}(\n    " + ",\n    ".join(said) + f",\n){back}"


def definitions(source):
    "Public names that a piece of source defines, with their lines."
    return {name: line for node in ast.parse(source).body for name, line in defined_names(node).items() if not any(part.startswith("_") for part in name.split("."))}


def source_link(module, line):
    "A line of an exported module in the repository."
    config = get_config()
    return f"{config.git_url}/blob/{config.branch}/{module.__name__.replace('.', '/')}.py" + (f"#L{line}" if line else "")


def entry(name, obj, level, chapter, source):
    "One function, class, method or property as Markdown."
    links = f"[source]({source}) - [chapter](../{chapter}#code-{name})"
    prose = inspect.getdoc(obj) or ""
    out = [f"{'#' * level} `{name}` {{#{name}}}"]
    if isinstance(obj, property): return out + [f"*Property.* {prose}", links]
    rows = own_parameters(obj)
    out += [prose, f"```python\n{signature_line(name, rows)}\n```"]
    if rows: out.append("\n".join(["| name | type | default | meaning |", "| --- | --- | --- | --- |"] +
        [f"| {'**returns**' if n == 'returns' else f'`{n}`'} | {cell(t)} | {f'`{cell(d)}`' if d else ''} | {cell(m)} |" for n, t, d, m in rows]))
    return out + [links]


def members(cls):
    "Public methods and properties that this package gives a class."
    for name, value in vars(cls).items():
        obj = value if isinstance(value, property) else getattr(cls, name)
        f = value.fget if isinstance(value, property) else getattr(obj, "__func__", obj)          # of class methods, patched ones too
        if not name.startswith("_") and inspect.isfunction(f) and f.__module__.startswith("ctvlm"): yield name, obj


def constants(module):
    "Exported names that are values: name, what it is, the comment beside it."
    path = Path(module.__file__)
    lines, rows = path.read_text().splitlines(), []
    for node in ast.parse("\n".join(lines)).body:
        if not (names := assigned(node)): continue
        found = re.search(r"\s# (.+)$", lines[node.lineno - 1]) or re.search(r"\s# (.+)$", lines[node.end_lineno - 1]) or re.match(r"# (?!%%|AUTO)(.+)$", lines[node.lineno - 2])
        for name in names:
            value = getattr(module, name, None)
            if name not in module.__all__ or inspect.isclass(value): continue                # a named tuple has its entry already
            text = repr(value)
            if len(text) > 60 or " at 0x" in text: text = type(value).__name__ + (f" of {len(value)}" if hasattr(value, "__len__") else "")
            rows.append(f"| <span id=\"{name}\"></span>`{name}` | `{cell(text)}` | {cell(found.group(1)) if found else ''} |")
    return rows


def own_names(source):
    "What a module defines itself; the rest of its names comes from earlier chapters, whose pages tell of them."
    return {*definitions(source), *(n for node in ast.parse(source).body for n in assigned(node) or ())}


def api_page(name, chapter):
    "The page of one module: what it is for, its functions and classes, its constants."
    module = importlib.import_module(f"ctvlm.{name}")
    out = [f"{module.__doc__} [The chapter](../{chapter}) builds it step by step."]
    source = Path(module.__file__).read_text()
    lines, own = definitions(source), own_names(source)
    for n in (n for n in module.__all__ if n in own):
        obj = getattr(module, n)
        if not (inspect.isclass(obj) or inspect.isfunction(inspect.unwrap(obj) if callable(obj) else obj)): continue
        out += entry(n, obj, 2, chapter, source_link(module, lines.get(n)))
        if inspect.isclass(obj):
            for m, value in members(obj):
                if f"{n}.{m}" in lines: out += entry(f"{n}.{m}", value, 3, chapter, source_link(module, lines.get(f"{n}.{m}")))
    for n in sorted({l.split(".")[0] for l in lines if "." in l} - own - {n for n in lines if "." not in n}):   # methods that this chapter gives to classes of earlier ones
        found = [(m, value) for m, value in members(getattr(module, n, type)) if f"{n}.{m}" in lines]
        if found: out.append(f"## Given to `{n}` {{#{n}}}")
        for m, value in found: out += entry(f"{n}.{m}", value, 3, chapter, source_link(module, lines[f"{n}.{m}"]))
    if rows := constants(module): out += ["## Constants", "\n".join(["| name | value | meaning |", "| --- | --- | --- |"] + rows)]
    if rest := [n for n in module.__all__ if n not in own]:
        of = {n: getattr(getattr(module, n), "__module__", "") for n in rest}
        own_name = {n: getattr(getattr(module, n), "__name__", n) for n in rest}         # of what is imported by another name
        links = [f"[`{n}`]({of[n].split('.')[-1]}.html#{own_name[n]})" if str(of[n]).startswith("ctvlm.") else f"`{n}`" for n in rest]
        out += ["## From earlier chapters", "Also importable from here: " + ", ".join(links) + "."]
    return "\n\n".join(out) + "\n"
