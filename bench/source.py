"""Facts about a class read from its source, without importing it: location, constants, keywords, hash.

`_target_` strings come from configs. They are resolved here to a class or function *defined* in a module of an
allowed package, so a config can neither name foreign code nor reach it through an alias, and listing commands
need no torch.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import io
import math
import tokenize
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bench.errors import UserError, nearest, unknown

OWN_PACKAGES = ("attentions", "tasks", "bench")
RESERVED = ("_target_", "_partial_")  # the keys with an underscore that a config may have; never `_args_`
Definition = ast.ClassDef | ast.FunctionDef


@dataclass(frozen=True)
class Target:
    """A class or function by its dotted name, and where it is defined."""

    name: str
    module: str
    path: Path
    node: Definition

    @property
    def family(self) -> str:
        """The sub-package of a mechanism: attentions.linear.based.Based -> linear."""
        return self.module.split(".")[1] if "." in self.module else self.module


def resolve(name: str, plugins: Sequence[str] = ()) -> Target:
    """The definition that a `_target_` names.

    Raises:
        UserError: the package is not allowed (nothing is imported then), or there is no such definition.
    """
    module, _, attribute = str(name).rpartition(".")
    package = module.split(".")[0]
    allowed = (*OWN_PACKAGES, *plugins)
    if package not in allowed:
        raise UserError(
            f'_target_ "{name}" is refused: it may only name {", ".join(allowed)}; '
            f"to allow your own package add plugins=[{package or 'my_package'}]"
        )
    path = _module_path(module)
    if path is None:
        raise UserError(f'_target_ "{name}": there is no module "{module}"')
    definitions = {node.name: node for node in _tree(path).body if isinstance(node, Definition)}
    if attribute not in definitions:
        near = nearest(attribute, definitions) if definitions else ["nothing"]
        raise UserError(f'_target_ "{name}": "{module}" defines no "{attribute}"; nearest: {", ".join(near)}')
    return Target(name=name, module=module, path=path, node=definitions[attribute])


def check(config: Any, plugins: Sequence[str] = (), where: str = "") -> None:
    """Check every `_target_` in a resolved config, however deep, its keywords, and that the rest is plain data.

    Raises:
        UserError: a refused target, a key that its constructor does not have, or a value that is not plain data.
    """
    if isinstance(config, Mapping):
        if "_target_" in config:
            target = resolve(config["_target_"], plugins)
            valid = keywords(target)
            for key, value in config.items():
                path = f"{where}.{key}" if where else str(key)
                if key in RESERVED:
                    continue
                if key not in valid:
                    raise unknown("key", path, [f"{where}.{k}" if where else k for k in valid])
                _check_type(path, value, valid[key].annotation)
            missing = [k for k, keyword in valid.items() if keyword.required and k not in config]
            if missing:
                raise UserError(
                    f"{where}: {config['_target_']} needs a value for {', '.join(missing)}; "
                    f"type {where}.{missing[0]}=VALUE"
                )
        for key, value in config.items():
            check(value, plugins, f"{where}.{key}" if where else str(key))
    elif isinstance(config, (list, tuple)):
        for index, value in enumerate(config):
            check(value, plugins, f"{where}.{index}")
    elif config is not None and not isinstance(config, (str, int, float)):
        raise UserError(f"{where} must be plain data, got {config!r}")
    elif isinstance(config, float) and not math.isfinite(config):
        raise UserError(f"{where} must be finite, got {config}")
    elif isinstance(config, str) and "${" in config:  # it would be resolved once more, after this check
        raise UserError(f"{where}: an escaped interpolation is not allowed, got {config!r}")


def targets(config: Any) -> list[str]:
    """All `_target_` names in a resolved config, outermost first."""
    if isinstance(config, Mapping):
        own = [str(config["_target_"])] if "_target_" in config else []
        return own + [name for value in config.values() for name in targets(value)]
    if isinstance(config, (list, tuple)):
        return [name for value in config for name in targets(value)]
    return []


SIMPLE_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
    "None": (type(None),),
}


def _check_type(path: str, value: Any, annotation: str) -> None:
    """Numbers, words and switches are checked against their annotation; anything richer is the constructor's matter."""
    names = [name.strip() for name in annotation.split("|")]
    if not all(name in SIMPLE_TYPES for name in names):
        return
    expected = {kind for name in names for kind in SIMPLE_TYPES[name]}
    if not isinstance(value, tuple(expected)) or (isinstance(value, bool) and bool not in expected):
        raise UserError(f"{path} must be {annotation.replace('|', 'or').replace('None', 'null')}, got {value!r}")


@dataclass(frozen=True)
class Keyword:
    """One keyword of a constructor: the text of its annotation, and whether it must be given."""

    annotation: str
    required: bool


@cache
def keywords(target: Target) -> dict[str, Keyword]:
    """Keywords of the constructor or function; `spec`, `task` and the like are positional.

    A constructor that takes `**keywords` passes them to its base's, whose own then count too.
    """
    constructors = [
        node
        for base in _ancestry(target)
        for node in base.body
        if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    ]
    functions = constructors if isinstance(target.node, ast.ClassDef) else [target.node]
    found: dict[str, Keyword] = {}
    for function in functions:
        arguments = function.args
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
            annotation = ast.unparse(argument.annotation) if argument.annotation else ""
            found.setdefault(argument.arg, Keyword(annotation, required=default is None))
        if arguments.kwarg is None:  # nothing is passed on to the base's constructor
            break
    return found


def constant(target: Target, name: str) -> str | None:
    """Source text of a class attribute, inherited ones included; None when there is none."""
    for node in _ancestry(target):
        for statement in node.body:
            if isinstance(statement, ast.Assign):
                names = [t.id for t in statement.targets if isinstance(t, ast.Name)]
            elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                names = [statement.target.id]
            else:
                continue
            if name in names and statement.value is not None:
                return ast.unparse(statement.value)
    return None


def literal(target: Target, name: str, default: Any = None) -> Any:
    """A class attribute that is a literal, such as `version = 1`."""
    text = constant(target, name)
    return default if text is None else ast.literal_eval(text)


def summary(target: Target) -> str:
    """First sentence of the docstring."""
    return (ast.get_docstring(target.node) or "").partition("\n")[0]


@cache
def source_hash(names: tuple[str, ...], plugins: tuple[str, ...] = ()) -> str:
    """Hash of the code of all named targets: their modules and what these import from our packages and the plugins.

    Comments, docstrings and blank lines do not count: a reworded docstring does not make results stale.
    """
    files: dict[str, Path] = {}
    for name in names:
        _collect(resolve(name, plugins).module, files, {*OWN_PACKAGES, *plugins})
    digest = hashlib.blake2b(digest_size=8)
    for module in sorted(files):
        digest.update(module.encode() + b"\0" + _code(files[module]).encode() + b"\0")
    return digest.hexdigest()


def _collect(module: str, files: dict[str, Path], packages: set[str]) -> None:
    path = _module_path(module)
    if path is None or module in files:
        return
    files[module] = path
    for imported in _imports(path, module):
        if imported.split(".")[0] in packages:
            _collect(imported, files, packages)


def _imports(path: Path, module: str) -> Iterable[str]:
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, module, path)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)  # `from package import module`


def _code(path: Path) -> str:
    """The file without comments, docstrings on lines of their own, blank lines and trailing space."""
    text = path.read_text(encoding="utf-8")
    lines = text.split("\n")
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(_tree(path)):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            start, end = first.lineno - 1, first.end_lineno or first.lineno
            alone = not lines[start].encode()[: first.col_offset].strip()
            if alone and not lines[end - 1].encode()[first.end_col_offset :].strip():
                lines[start:end] = [""] * (end - start)
    return "\n".join(line.rstrip() for line in lines if line.strip())


def _ancestry(target: Target) -> Iterable[ast.ClassDef]:
    """The class and its bases, depth first, as far as their source can be found in the same package."""
    if not isinstance(target.node, ast.ClassDef):
        return
    yield target.node
    tree = _tree(target.path)
    origins = {
        alias.asname or alias.name: (base, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for base in [_absolute(node, target.module, target.path)]
        for alias in node.names
    }
    local = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    for base in target.node.bases:
        if not isinstance(base, ast.Name):
            continue
        if base.id in local:
            yield from _ancestry(Target(base.id, target.module, target.path, local[base.id]))
        elif base.id in origins:
            module, attribute = origins[base.id]
            path = (
                _module_path(module) if module.split(".")[0] in (*OWN_PACKAGES, target.module.split(".")[0]) else None
            )
            if path is not None:
                nodes = [n for n in _tree(path).body if isinstance(n, ast.ClassDef) and n.name == attribute]
                if nodes:
                    yield from _ancestry(Target(attribute, module, path, nodes[0]))


def _absolute(node: ast.ImportFrom, module: str, path: Path) -> str:
    if not node.level:
        return node.module or ""
    parts = [*module.split("."), "__init__"] if path.name == "__init__.py" else module.split(".")
    return ".".join([*parts[: -node.level], *([node.module] if node.module else [])])


@cache
def _module_path(module: str) -> Path | None:
    """The source file of a module, found without importing its parents."""
    package, *rest = module.split(".")
    if not all(part.isidentifier() for part in (package, *rest)):
        return None
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    if found is None:
        return None
    places = [Path(place).joinpath(*rest) for place in found.submodule_search_locations or ()]
    candidates = [file for place in places for file in (place / "__init__.py", place.with_suffix(".py"))]
    if not rest and found.origin:
        candidates.insert(0, Path(found.origin))
    return next((file for file in candidates if file.suffix == ".py" and file.is_file()), None)


@cache
def _tree(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{path} is not valid Python: {error}") from error
