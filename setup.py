"Packaging for pip: everything it needs to know stands in settings.ini."
import re
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

def description(url): # README.md with links that work anywhere
    text = Path("README.md").read_text(encoding="utf-8") if Path("README.md").exists() else ""
    return re.sub(r"(!?)\]\((?!https?:|#|mailto:)([^)]+)\)", lambda m: f"{m[1]}]({url}/blob/main/{m[2]})", re.sub(r"(!\[[^\]]*\])\((?!https?:)([^)]+)\)", lambda m: f"{m[1]}({url}/raw/main/{m[2]})", text))

config = ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

extras = {name: cfg[f"{name}_requirements"].split() for name in ("dicom", "view", "train", "xlsx", "ray", "dev")}
extras["all"] = [r for name in ("dicom", "view", "train", "xlsx") for r in extras[name]]
extras["dev"] += extras["all"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=description(cfg["git_url"]),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    keywords=cfg["keywords"].split(),
    project_urls={"Documentation": cfg["doc_host"] + cfg["doc_baseurl"], "Issues": cfg["git_url"] + "/issues"},
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Science/Research", "Operating System :: POSIX :: Linux", "Programming Language :: Python :: 3.11",
                 "Programming Language :: Python :: 3.12", "Topic :: Scientific/Engineering :: Medical Science Apps.", "Topic :: Scientific/Engineering :: Image Processing"],
    packages=find_packages(include=["ctvlm", "ctvlm.*"]),
    package_data={"ctvlm": ["py.typed", "data/*", "data/tiny/*"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": cfg["console_scripts"].split(), "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
    zip_safe=False,
)
