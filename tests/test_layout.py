"""The dependency direction, held by parsing every import; and the packages are the repository's own."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STANDARD = set(sys.stdlib_module_names)
OURS = {"attentions", "tasks", "bench", "conf", "tests"}
ALLOWED = {
    "attentions": {"torch", "attentions"},
    "attentions.kernels": {"torch", "triton", "attentions"},
    "tasks": {"torch", "numpy", "datasets", "sklearn", "tokenizers", "numba", "tasks"},
}
NAMED = {"tasks.base", "tasks.sources", "attentions.base"}  # what bench may import by name
HEAVY_ONLY_IN = {"pandas": "bench/report", "matplotlib": "bench/report"}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Dotted names of everything a file imports, at any depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = path.relative_to(ROOT).with_suffix("").parts
            base = ".".join([*parts[: len(parts) - node.level], node.module or ""]) if node.level else node.module or ""
            names.add(base.rstrip("."))
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def third_party(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names} - STANDARD - {"__future__"}


@pytest.mark.parametrize("package", ["attentions", "tasks"])
def test_mechanisms_and_tasks_import_only_what_they_may(package):
    for path in modules(package):
        group = "attentions.kernels" if "kernels" in path.parts else package
        extra = third_party(imports(path)) - ALLOWED[group]
        assert not extra, f"{path.relative_to(ROOT)} imports {extra}"


def test_bench_names_only_the_bases_and_reaches_the_rest_through_targets():
    for path in modules("bench"):
        foreign = {n for n in imports(path) if n.split(".")[0] in ("attentions", "tasks")}
        foreign.discard("tasks")  # `from tasks import sources`, which is named too
        extra = {n for n in foreign if not any(n == base or n.startswith(f"{base}.") for base in NAMED)}
        if path.name == "race.py":  # it re-creates a published network, not a row of a leaderboard
            extra -= {"attentions.ssm.short_conv", "attentions.ssm.short_conv.ShortConv"}
        assert not extra, f"{path.relative_to(ROOT)} imports {extra}"


def test_plotting_and_frames_stay_in_the_report():
    for path in modules("bench"):
        for name, home in HEAVY_ONLY_IN.items():
            if name in third_party(imports(path)):
                assert str(path.relative_to(ROOT)).startswith(home), f"{path.relative_to(ROOT)} imports {name}"


def test_inside_a_family_cores_do_not_import_members():
    for path in modules("attentions"):
        own = imports(path)
        if path.name == "base.py":
            assert not {n for n in own if n.startswith("attentions.")}
        if path.name.startswith("_") and path.name != "__init__.py":
            members = {n for n in own if n.startswith("attentions.") and not n.split(".")[-1].startswith("_")}
            allowed = {n for n in members if n.startswith("attentions.base") or "._" in n}
            assert not members - allowed, f"{path.relative_to(ROOT)} imports {members - allowed}"


def test_nothing_imports_the_configs():
    for package in ("attentions", "tasks", "bench"):
        for path in modules(package):
            assert not {n for n in imports(path) if n.split(".")[0] in ("conf", "tests")}


@pytest.mark.parametrize("package", ["attentions", "tasks", "bench"])
def test_packages_load_from_the_repository(package):
    found = Path(importlib.import_module(package).__file__).resolve()
    assert found == ROOT / package / "__init__.py", f"{package} loads from {found}; run pytest in the repository root"


def test_importing_every_module_is_silent():
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for package in ("attentions", "tasks", "bench")
        for path in modules(package)
        if path.name != "__main__.py"
    ]
    code = "import importlib\n" + "\n".join(f"importlib.import_module({name!r})" for name in names)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr == ""


@pytest.mark.parametrize("command", [["bench", "--help"], ["bench.list"], ["bench.status", "attention=softmax,none"]])
def test_help_and_lists_do_not_import_torch(command):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "hydra" in loaded or "omegaconf" in loaded  # the probe sees imports at all
    assert not {"torch", "pandas", "matplotlib"} & loaded
