"""Limits that keep the code readable, and structure that packaging and start-up rely on."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path
    for folder in ("dtune", "kernels", "launch", "tests", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
)
LIBRARY = [path for path in SOURCES if path.parts[len(ROOT.parts)] not in ("tests", "benchmarks")]

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_KERNEL_LINES = 150
MAX_NESTING = 4
BLOCKS = (ast.For, ast.AsyncFor, ast.While, ast.If, ast.With, ast.AsyncWith, ast.Try, ast.Match)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def too_long_file(path: Path, text: str) -> Iterator[str]:
    lines = len(text.splitlines())
    if lines > MAX_FILE_LINES:
        yield f"{lines} lines, at most {MAX_FILE_LINES}"


def too_long_functions(path: Path, text: str) -> Iterator[str]:
    limit = MAX_KERNEL_LINES if path.name.startswith("triton") else MAX_FUNCTION_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, FUNCTIONS):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > limit:
                yield f"{node.lineno}: {node.name} has {lines} lines, at most {limit}"


def too_deep(path: Path, text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, FUNCTIONS) and _depth(node) > MAX_NESTING:
            yield f"{node.lineno}: {node.name} nests {_depth(node)} blocks, at most {MAX_NESTING}"


def _depth(node: ast.AST) -> int:
    """Blocks inside each other below ``node``; ``elif`` is not deeper than its ``if``."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (*FUNCTIONS, ast.ClassDef, ast.Lambda)):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        deepest = max(deepest, _depth(child) + (isinstance(child, BLOCKS) and not is_elif))
    return deepest


def broad_excepts(path: Path, text: str) -> Iterator[str]:
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        names = {kind.id for kind in caught if isinstance(kind, ast.Name)}
        is_broad = None in caught or names & {"Exception", "BaseException"}
        # With BLE001 and a reason beside it: a process that must pass on whatever went wrong.
        if is_broad and "BLE001 - " not in lines[node.lineno - 1]:
            yield f"{node.lineno}: catches everything, and no reason beside it"


def star_imports(path: Path, text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            yield f"{node.lineno}: import *"


def probing_getattrs(path: Path, text: str) -> Iterator[str]:
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "getattr"
            and isinstance(node.args[1], ast.Constant)
            and not any("#" in line for line in lines[node.lineno - 1 : node.end_lineno])
        ):
            yield f"{node.lineno}: getattr with a literal and no reason beside it"


RULES = (
    too_long_file,
    too_long_functions,
    too_deep,
    broad_excepts,
    star_imports,
    probing_getattrs,
)

BREAKS_EVERY_RULE = (
    f"""
from os import *
def too_much(x):
    for a in x:
        while a:
            with a:
                try:
                    if a:
                        getattr(a, "b")
                except (ValueError, Exception):
                    pass
{"    x = 1" + chr(10)}"""
    + "    x = 1\n" * (MAX_FILE_LINES)
)

KEEPS_EVERY_RULE = '''
def fine(x):
    """A chain of elif is one block."""
    if x == 1:
        return 1
    elif x == 2:
        return 2
    elif x == 3:
        return 3
    elif x == 4:
        return 4
    elif x == 5:
        return getattr(x, "real")  # a stand-in for a reason
    try:
        return x
    except ValueError:
        return 6
'''


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_rejects_what_breaks_it_and_passes_what_keeps_it(rule) -> None:
    assert list(rule(Path("x.py"), BREAKS_EVERY_RULE))
    assert not list(rule(Path("x.py"), KEEPS_EVERY_RULE))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_sources_keep_the_rule(rule) -> None:
    assert SOURCES
    broken = [
        f"{path.relative_to(ROOT)}:{message}"
        for path in SOURCES
        for message in rule(path, path.read_text(encoding="utf-8"))
    ]
    assert not broken, "\n" + "\n".join(broken)


@pytest.mark.parametrize("folder", ["kernels", "launch", "conf", "launch/hydra_plugins"])
def test_source_roots_are_no_packages(folder: str) -> None:
    # kernels/__init__.py would shadow the Hub's library of that name, and hydra_plugins is a
    # namespace that other distributions share.
    assert not (ROOT / folder / "__init__.py").exists()


def test_schemas_and_config_import_no_torch() -> None:
    """A wrong key is answered within a second, and importing torch alone takes longer."""
    schemas = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in LIBRARY
        if "schema" in (path.stem, path.parent.name)
    ]
    assert len(schemas) > 20
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "heavy = {'torch', 'transformers', 'datasets', 'peft', 'deepspeed'} & set(sys.modules)\n"
        "sys.exit(f'imported {sorted(heavy)}' if heavy else 0)\n"
    )
    light = [*schemas, "dtune.config.compose", "dtune.config.support", "dtune.resources"]
    light += ["dtune_launch.local", "hydra_plugins.dtune_launcher"]
    done = subprocess.run([sys.executable, "-c", code, *light], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
