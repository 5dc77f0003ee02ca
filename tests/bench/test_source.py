"""Facts read from source: keywords and constants through inheritance, targets by definition only, the hash of code."""

import sys
from pathlib import Path

import pytest

from bench import source
from bench.errors import UserError

CORE = '"""A core."""\n\n\ndef gain():\n    """What it returns."""\n    return 2  # two\n'
BASE = '''"""A base."""


class Base:
    version = 3
    paper: str = "first"

    def __init__(self, spec, *, width: int, bias: bool = False):
        self.width = width
'''
MECHANISM = '''"""A mechanism."""

from .base import Base
from .core import gain  # the family


class Mechanism(Base):
    """Its first sentence.

    More.
    """

    paper = "second"

    def forward(self):
        text = """
# not a comment
"""
        return gain(), text


class Own(Base):
    def __init__(self, spec, *, depth: float | None = None):
        pass


class Passes(Mechanism):
    def __init__(self, spec, *, depth: int = 2, width: float = 0.5, **base):
        super().__init__(spec, width=int(width), **base)


alias = Mechanism
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A plug-in package `mine` on the path: mine/{__init__,base,core,mechanism,other}.py."""
    folder = tmp_path / "mine"
    folder.mkdir()
    files = {"__init__": "", "base": BASE, "core": CORE, "mechanism": MECHANISM, "other": "x = 1\n"}
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    clear()
    assert not any(name.split(".")[0] == "mine" for name in sys.modules)  # nothing was imported


def clear():
    for function in (source.source_hash, source._tree, source._module_path):
        function.cache_clear()


def hash_of(*names):
    clear()
    return source.source_hash(names or ("mine.mechanism.Mechanism",), ("mine",))


def target(name):
    return source.resolve(f"mine.{name}", ["mine"])


def test_keywords_and_constants_are_inherited_and_the_nearest_wins(package):
    mechanism, own = target("mechanism.Mechanism"), target("mechanism.Own")
    assert source.keywords(mechanism) == {"width": source.Keyword("int", True), "bias": source.Keyword("bool", False)}
    assert source.keywords(own) == {"depth": source.Keyword("float | None", False)}
    assert source.keywords(target("mechanism.Passes")) == {  # nearest first, and what is passed on to the base
        "depth": source.Keyword("int", False),
        "width": source.Keyword("float", False),
        "bias": source.Keyword("bool", False),
    }
    assert source.literal(mechanism, "version") == 3 and source.literal(mechanism, "paper") == "second"
    assert source.literal(own, "paper") == "first" and source.literal(own, "missing", 5) == 5
    assert source.summary(mechanism) == "Its first sentence."


@pytest.mark.parametrize(
    "name", ["mechanism.alias", "mechanism.Base", "mechanism.gain", "mechanism.Mechanims", "other.x"]
)
def test_only_what_a_module_defines_itself_can_be_named(package, name):
    with pytest.raises(UserError, match=f'"mine.{name.split(".")[0]}" defines no "{name.split(".")[1]}"; nearest: '):
        target(name)


@pytest.mark.parametrize(
    "module", ["nowhere", "mechanism.Mechanism", "", "..mechanism", "/etc/passwd", "mechanism.sys"]
)
def test_a_module_that_is_not_there_is_one_line(package, module):
    with pytest.raises(UserError, match="there is no module"):
        source.resolve(f"mine.{module}.Mechanism", ["mine"])


def test_a_file_that_is_not_python_is_one_line(package):
    (package / "mechanism.py").write_text("class Mechanism(:\n")
    with pytest.raises(UserError, match=r"mechanism\.py is not valid Python: "):
        target("mechanism.Mechanism")


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("mechanism", "# the family", "# other words"),
        ("mechanism", '"""A mechanism."""', '"""Reworded,\n\nand longer."""'),
        ("mechanism", "    More.\n", "    Much more.\n"),
        ("mechanism", "\n\n\nclass Own", "\n\n\n# a remark\n\n\n\nclass Own"),
        ("core", "# two", "# 2"),
        ("core", '    """What it returns."""\n', ""),
        ("other", "x = 1", "x = 2"),
    ],
)
def test_the_hash_ignores_comments_docstrings_blank_lines_and_files_that_are_not_used(package, file, old, new):
    before = hash_of()
    edit(package / f"{file}.py", old, new)
    assert hash_of() == before


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("mechanism", "gain(), text", "2 * gain(), text"),
        ("mechanism", "# not a comment", "# a string all the same"),
        ("mechanism", 'paper = "second"', 'paper = "third"'),
        ("core", "return 2", "return 3"),
        ("base", "version = 3", "version = 4"),
    ],
)
def test_the_hash_follows_the_code_of_the_mechanism_its_base_and_its_core(package, file, old, new):
    before = hash_of()
    edit(package / f"{file}.py", old, new)
    assert hash_of() != before


def test_code_beside_a_docstring_on_one_line_counts(package):
    (package / "core.py").write_text('def gain():\n    """Two."""; return 2\n')
    before = hash_of()
    edit(package / "core.py", "return 2", "return 3")
    assert hash_of() != before


def test_the_hash_follows_relative_imports_of_a_package_itself(package):
    (package / "__init__.py").write_text("from .core import gain\n\n\nclass Mechanism:\n    value = gain()\n")
    before = hash_of("mine.Mechanism")
    edit(package / "core.py", "return 2", "return 3")
    assert hash_of("mine.Mechanism") != before


def test_mechanisms_of_a_family_share_its_core_and_others_do_not():
    files: dict[str, Path] = {}
    source._collect("attentions.local.sliding_window", files, {"attentions"})
    assert {"attentions.local.sliding_window", "attentions.dense.softmax", "attentions.base"} <= set(files)
    assert not [name for name in files if name.startswith(("attentions.linear", "attentions.ssm", "torch"))]


def edit(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


# -- values ---------------------------------------------------------------------------------------------


def softmax(**fields):
    return {"_target_": "attentions.dense.softmax.Softmax", "_partial_": True, **fields}


def test_a_good_config_passes_however_deep():
    inner = {"_target_": "attentions.local.sliding_window.SlidingWindow", "_partial_": True, "window": 3}
    source.check({"_target_": "attentions.hybrid.hybrid", "layers": [softmax(dropout=0), inner]}, (), "attention")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dropuot": 0.1}, 'unknown key "attention.dropuot"; nearest: attention.dropout'),
        ({"dropout": "high"}, "attention.dropout must be float, got 'high'"),
        ({"bias": 1}, "attention.bias must be bool, got 1"),
        ({"dropout": True}, "attention.dropout must be float, got True"),
        ({"dropout": float("nan")}, "attention.dropout must be finite, got nan"),
        ({"_args_": [1]}, 'unknown key "attention._args_"'),
        ({"_convert_": "all"}, 'unknown key "attention._convert_"'),
    ],
)
def test_a_wrong_value_is_one_line_with_its_path(fields, message):
    with pytest.raises(UserError) as error:
        source.check(softmax(**fields), (), "attention")
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_missing_value_is_named():
    window = {"_target_": "attentions.local.sliding_window.SlidingWindow", "_partial_": True}
    with pytest.raises(UserError, match=r"needs a value for window; type attention.window=VALUE"):
        source.check(window, (), "attention")


@pytest.mark.parametrize("value", [b"bytes", object(), {1, 2}, "${oc.env:HOME}", float("-inf")])
def test_only_plain_data_can_stand_in_a_config(value):
    with pytest.raises(UserError, match=r"attention.layers.0"):
        source.check({"_target_": "attentions.hybrid.hybrid", "layers": [value]}, (), "attention")
