"The repository itself: layout, import order, light import, notebooks that carry their outputs."
import ast, configparser, json, re, subprocess, sys, time
from pathlib import Path

import pytest, yaml

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted((ROOT / "nbs").glob("[0-9][0-9]*_*.ipynb"))
NOTEBOOKS = CHAPTERS + [ROOT / "nbs" / "index.ipynb"] + sorted((ROOT / "nbs" / "tutorials").glob("[!_]*.ipynb"))
NUMBER = {p.stem.split("_", 1)[1]: p.stem.split("_", 1)[0] for p in CHAPTERS} # "03" < "03a" < "04": the import order


def imports_of(path):
    "Names of the ctvlm modules that the module at `path` imports, anywhere in it."
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            if node.level: yield node.module.split(".")[0]
            elif (node.module or "").startswith("ctvlm."): yield node.module.split(".")[1]
        elif isinstance(node, ast.Import): yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("ctvlm."))


def test_every_chapter_is_there():
    "00 to 15, each with its letters in order: 04, 04a, 04b."
    numbers = [p.stem.split("_")[0] for p in CHAPTERS]
    assert [n for n in numbers if n.isdigit()] == [f"{n:02d}" for n in range(16)]
    for n in range(16):
        letters = [x[2:] for x in numbers if x.startswith(f"{n:02d}")]
        assert letters == ["", *"abcdefghijkl"][:len(letters)], f"{n:02d}: {letters}"


@pytest.mark.parametrize("module", sorted(NUMBER))
def test_modules_import_only_smaller_numbers(module):
    later = [m for m in imports_of(ROOT / "ctvlm" / f"{module}.py") if NUMBER[m] >= NUMBER[module]]
    assert not later, f"{module} imports {later}"


def test_import_is_light():
    code = "import time, sys; t = time.perf_counter(); import ctvlm; print(time.perf_counter() - t, 'torch' in sys.modules)"
    seconds, torch_loaded = min(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() for _ in range(3))
    assert float(seconds) < 0.3 and torch_loaded == "False"


def test_the_front_door():
    "`from ctvlm import ...` for what most begin with, and the ten lines of the front page in a plain prompt."
    import ctvlm
    from ctvlm import CTVLMModel, load_volume
    assert CTVLMModel.__name__ == "CTVLMModel" and callable(load_volume) and "mine_report" in dir(ctvlm)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"): ctvlm.nothing
    cells = json.loads((ROOT / "nbs" / "index.ipynb").read_text())["cells"]
    [lines] = ["".join(c["source"]) for c in cells if c["cell_type"] == "code" and not "".join(c["source"]).startswith("#|")]
    assert not re.search(r"^(for|if|with|while|def) ", lines, re.M)              # a prompt wants an empty line after a block
    assert len(lines.strip().splitlines()) <= 12


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_carry_ids_outputs_and_no_errors(path):
    nb = json.loads(path.read_text())
    code = [c for c in nb["cells"] if c["cell_type"] == "code"]
    outputs = [o for c in code for o in c["outputs"]]
    assert (nb["nbformat"], nb["nbformat_minor"]) == (4, 5) and all(c["id"] for c in nb["cells"])
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert outputs, "no cell has a stored output"
    assert any("image/png" in o.get("data", {}) for o in outputs), "no picture"
    assert "widgets" not in nb["metadata"]


def test_notebook_stems_are_unique():
    stems = [re.sub(r"^\d+[a-z]?_", "", p.stem) for p in NOTEBOOKS]
    assert len(stems) == len(set(stems))


def test_the_site_lists_every_notebook():
    sidebar = yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]["sidebar"]["contents"]
    listed = {p for e in sidebar for p in ([e] if isinstance(e, str) else e["contents"])}
    assert listed == {str(p.relative_to(ROOT / "nbs")) for p in NOTEBOOKS} | {f"api/{m}.ipynb" for m in [*NUMBER, "manual"]}


def test_readme_is_generated_from_the_index():
    before = (ROOT / "README.md").read_bytes()
    subprocess.run([sys.executable, "tools/build_docs.py", "--readme"], cwd=ROOT, check=True, capture_output=True)
    assert (ROOT / "README.md").read_bytes() == before


def test_constraints_satisfy_the_requirements():
    from packaging.requirements import Requirement
    config = configparser.ConfigParser(delimiters=["="]); config.read(ROOT / "settings.ini")
    pins = dict(line.lower().replace("_", "-").split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    wanted = [Requirement(r) for r in (config["DEFAULT"]["requirements"] + " " + config["DEFAULT"]["dev_requirements"]).split()]
    assert not {"timm", "torchvision"} & {r.name for r in wanted} and not {"timm", "torchvision"} & set(pins)
    for r in wanted: assert r.specifier.contains(pins[r.name.lower()]), r


def test_nothing_is_unpickled():
    for path in (ROOT / "ctvlm").glob("*.py"):
        source = path.read_text()
        assert "import pickle" not in source and "allow_pickle=True" not in source and "weights_only=False" not in source, path
        assert source.count("torch.load(") == len(re.findall(r"torch\.load\(.*weights_only=True", source)), path


def undocumented(source):
    "Public classes and functions of a module without a docstring; a patched method may say it in a comment on its signature."
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef)) or node.name.startswith("_") or ast.get_docstring(node): continue
        patched = isinstance(node, ast.FunctionDef) and any("patch" in ast.unparse(d) for d in node.decorator_list)
        if not (patched and any("#" in line for line in lines[node.lineno - 1:max(node.lineno, node.body[0].lineno - 1)])): yield node.name


@pytest.mark.parametrize("module", sorted(NUMBER))
def test_every_public_name_says_what_it_is(module):
    source = (ROOT / "ctvlm" / f"{module}.py").read_text()
    exported = set(ast.literal_eval(re.search(r"__all__ = (\[.*?\])", source, re.S)[1]))
    missing = [n for n in undocumented(source) if n.split(".")[0] in exported]
    assert not missing, f"no docstring: {', '.join(missing)}"


def test_a_missing_docstring_is_noticed():
    planted = 'def f(a): # tells\n    return a\nclass C:\n    "x"\n@patch\ndef m(self:C): # of C\n    return 1\nclass D:\n    a:int\n'
    assert list(undocumented(planted)) == ["f", "D"]
