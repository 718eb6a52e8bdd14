"The repository itself: layout, import order, light import, notebooks that carry their outputs."
import ast, configparser, json, re, subprocess, sys, time
from pathlib import Path

import pytest, yaml

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted((ROOT / "nbs").glob("[0-9][0-9]*_*.ipynb"))
TUTORIALS = sorted((ROOT / "nbs" / "tutorials").glob("[!_]*.ipynb"))
NOTEBOOKS = [*CHAPTERS, ROOT / "nbs" / "index.ipynb", *TUTORIALS]
# the import order: "03" < "03a" < "04"
NUMBER = {p.stem.split("_", 1)[1]: p.stem.split("_", 1)[0] for p in CHAPTERS}


def imports_of(path):
    "Names of the ctvlm modules that the module at `path` imports, anywhere in it."
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            if node.level: yield node.module.split(".")[0]
            elif (node.module or "").startswith("ctvlm."): yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("ctvlm."))


def test_every_chapter_is_there():
    "00 to 15, each with letters of its own: 04, 04a, 04b."
    numbers = [p.stem.split("_")[0] for p in CHAPTERS]
    assert [n for n in numbers if n.isdigit()] == [f"{n:02d}" for n in range(16)]
    for n in range(16):
        letters = [x[2:] for x in numbers if x.startswith(f"{n:02d}")]
        assert letters == sorted(set(letters)) and letters[0] == "", f"{n:02d}: {letters}"


@pytest.mark.parametrize("module", sorted(NUMBER))
def test_modules_import_only_smaller_numbers(module):
    later = [m for m in imports_of(ROOT / "ctvlm" / f"{module}.py") if NUMBER[m] >= NUMBER[module]]
    assert not later, f"{module} imports {later}"


def test_import_is_light():
    code = ("import time, sys; t = time.perf_counter(); import ctvlm;"
            " print(time.perf_counter() - t, 'torch' in sys.modules)")
    command = [sys.executable, "-c", code]
    def once(): return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    seconds, torch_loaded = min(once().split() for _ in range(3))
    assert float(seconds) < 0.3 and torch_loaded == "False"


def test_the_front_door():
    "`from ctvlm import ...` for what most begin with; ten lines on the front page for a prompt."
    import ctvlm
    from ctvlm import CTVLMModel, load_volume
    assert CTVLMModel.__name__ == "CTVLMModel" and callable(load_volume)
    assert "mine_report" in dir(ctvlm)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"): ctvlm.nothing
    cells = json.loads((ROOT / "nbs" / "index.ipynb").read_text())["cells"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    [lines] = [s for s in code if not s.startswith("#|")]
    # a prompt wants an empty line after a block
    assert not re.search(r"^(for|if|with|while|def) ", lines, re.M)
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
    reference = {f"api/{m}.ipynb" for m in [*NUMBER, "manual"]}
    assert listed == {str(p.relative_to(ROOT / "nbs")) for p in NOTEBOOKS} | reference


def test_readme_is_generated_from_the_index():
    before = (ROOT / "README.md").read_bytes()
    command = [sys.executable, "tools/build_docs.py", "--readme"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert (ROOT / "README.md").read_bytes() == before


def test_constraints_satisfy_the_requirements():
    from packaging.requirements import Requirement
    config = configparser.ConfigParser(delimiters=["="]); config.read(ROOT / "settings.ini")
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if "==" in line)
    texts = (config["DEFAULT"][k] for k in ("requirements", "dev_requirements"))
    wanted = [Requirement(r) for r in " ".join(texts).split()]
    assert not {"timm", "torchvision"} & {*pins, *(r.name for r in wanted)}
    for r in wanted: assert r.specifier.contains(pins[r.name.lower()]), r


def test_nothing_is_unpickled():
    for path in (ROOT / "ctvlm").glob("*.py"):
        source = path.read_text()
        for word in ("import pickle", "allow_pickle=True", "weights_only=False"):
            assert word not in source, path
        careful = re.findall(r"torch\.load\(.*weights_only=True", source)
        assert source.count("torch.load(") == len(careful), path


def undocumented(source):
    "Public names of a module without a docstring; a patched method may say it on its signature."
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef)): continue
        if node.name.startswith("_") or ast.get_docstring(node): continue
        patched = any("patch" in ast.unparse(d) for d in node.decorator_list)
        signature = lines[node.lineno - 1:max(node.lineno, node.body[0].lineno - 1)]
        is_function = isinstance(node, ast.FunctionDef)
        if not (is_function and patched and any("#" in line for line in signature)): yield node.name


@pytest.mark.parametrize("module", sorted(NUMBER))
def test_every_public_name_says_what_it_is(module):
    source = (ROOT / "ctvlm" / f"{module}.py").read_text()
    exported = set(ast.literal_eval(re.search(r"__all__ = (\[.*?\])", source, re.S)[1]))
    missing = [n for n in undocumented(source) if n.split(".")[0] in exported]
    assert not missing, f"no docstring: {', '.join(missing)}"


def test_a_missing_docstring_is_noticed():
    planted = ('def f(a): # tells\n    return a\nclass C:\n    "x"\n'
               '@patch\ndef m(self:C): # of C\n    return 1\nclass D:\n    a:int\n')
    assert list(undocumented(planted)) == ["f", "D"]


# --- the page and its size

def house():
    "`tools/house.py` and the chapters that may exceed a limit."
    import csv, importlib.util
    spec = importlib.util.spec_from_file_location("house", ROOT / "tools" / "house.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = list(csv.DictReader(open(ROOT / "tests" / "house.csv")))
    return module, {r["chapter"]: {k: float(r[k]) for k in module.LIMITS} for r in rows}


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_a_chapter_fits_its_page(path):
    "Long lines, cells, exported lines; tests/house.csv excuses some, with numbers that only fall."
    module, allowed = house()
    found = module.measured(json.loads(path.read_text()))
    excused = allowed.get(path.stem, {})
    limits = {k: max(limit, excused.get(k, 0)) for k, limit in module.LIMITS.items()}
    assert not {k: (found[k], limit) for k, limit in limits.items() if found[k] > limit}


def test_no_chapter_is_excused_without_need():
    module, allowed = house()
    assert set(allowed) <= set(module.exceeding(module.chapters())), "python tools/house.py --write"


def test_a_long_line_is_noticed():
    module, _ = house()
    source = ["#| export\n", "x = 1\n", "y = " + "1 + " * 30 + "1"]
    found = module.measured({"cells": [{"cell_type": "code", "source": source}]})
    assert found["over_100"] == pytest.approx(1 / 3, abs=1e-3)
    assert module.exceeding({"page": found})


def test_the_house_is_drawn_as_it_is():
    "The drawing of CONTRIBUTING.md holds each chapter, and an import from another floor is an arc."
    module, _ = house()
    found = module.chapters()
    drawn = (ROOT / "nbs" / "images" / "house.svg").read_text()
    assert all(f"<title>{name}:" in drawn for name in found), "python tools/house.py --write"
    numbers = {"cells": 3, "lines": 700}
    two = {"00_core": numbers | {"imports": []}, "01_solids": numbers | {"imports": ["core"]}}
    assert module.drawing(two, {"00_core": two["00_core"]}).count("<path") == 1


def test_extras_hold_what_is_needed_by_some():
    "What `needed` imports is in the extra that it names, and no longer in a plain installation."
    config = configparser.ConfigParser(delimiters=["="]); config.read(ROOT / "settings.ini")
    config = config["DEFAULT"]
    name = {"sklearn": "scikit-learn", "dicomweb_client": "dicomweb-client"}
    modules = [p.read_text() for p in (ROOT / "ctvlm").glob("*.py")]
    found = {m for s in modules for m in re.findall(r'needed\("([\w.]+)", "(\w+)"', s)}
    found.discard(("ray", "ray"))                                   # an extra of its own name
    assert len(found) >= 7
    for module, extra in found:
        package = module.split(".")[0]
        wanted = name.get(package, package)
        pattern = rf"(^| ){wanted}>="
        if package != "requests":
            assert re.search(pattern, config[f"{extra}_requirements"]), (module, extra)
        assert not re.search(pattern, config["requirements"]), module


@pytest.mark.parametrize("module, call, said", [
    ("openpyxl", "from ctvlm.tables import read_table; read_table('x.xlsx')", r"\[xlsx\]"),
    ("anywidget", "from ctvlm.reader import widget_classes; widget_classes()", r"\[view\]"),
    ("voila.app", "from ctvlm.viewer import _voila_class; _voila_class()", r"\[view\]"),
    ("highdicom", "from ctvlm.structured_reports import _libraries; _libraries()", r"\[dicom\]"),
    ("dicomweb_client", "from ctvlm.dicomweb import _libraries; _libraries()", r"\[dicom\]"),
    ("accelerate", "from ctvlm.demo import run_demo; run_demo('run', quiet=True)", r"\[train\]"),
    ("sklearn", "from ctvlm.demo import run_demo; run_demo('run', quiet=True)", r"\[train\]"),
])
def test_what_is_missing_is_said_in_one_line(module, call, said, monkeypatch, tmp_path):
    from ctvlm.core import InputError
    monkeypatch.setitem(sys.modules, module, None)                 # as if it were not installed
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.xlsx").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match=said) as e: exec(call, {})
    assert "\n" not in str(e.value)
