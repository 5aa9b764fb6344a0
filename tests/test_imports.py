"""Imports run downhill only, type-only ones and those inside functions included."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FOLDERS_BELOW = {
    "runtime": set[str](),
    "broker": {"runtime"},
    "handles": {"runtime", "broker"},
    "proxy": {"runtime", "broker", "handles"},
    "workers": {"runtime", "broker", "handles"},
    "serve": {"runtime", "broker", "handles", "proxy", "workers"},
    "testing": {"runtime", "broker", "handles", "proxy", "workers", "serve"},
}

# orjson writes and reads JSON wherever there is some, and is part of the thin install. typing_extensions is for type
# checkers alone: they bring its types, and it is not installed with Penstock.
OTHERS = {
    "runtime": set[str](),
    "broker": {"redis", "hiredis", "orjson"},
    "handles": {"orjson", "typing_extensions"},
    "proxy": {"orjson", "httptools", "starlette", "uvicorn"},
    "workers": {"orjson", "pathspec", "starlette", "ray"},
    "testing": {"starlette"},
    "serve": {
        *("redis", "hiredis", "orjson", "starlette", "uvicorn", "ray", "pydantic", "pydantic_core"),
        *("click", "rich", "yaml"),
    },
}

FILES = sorted(file for folder in FOLDERS_BELOW for file in (ROOT / folder).rglob("*.py"))


def module_name(file: Path) -> str:
    parts = ("penstock", *file.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in FILES}


@cache
def nodes(file: Path) -> list[ast.AST]:
    """Return all nodes of a file's syntax tree."""
    return list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))


def imports(file: Path) -> Iterator[str]:
    """Yield the absolute name of all that a file imports, wherever in the file it does.

    ``from x import y`` is ``x.y`` where that is a module of ours, else ``x``.
    """
    name = module_name(file)
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in nodes(file):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in MODULES else base


def test_a_folder_imports_only_what_lies_below_it() -> None:
    def allowed(name: str, folder: str) -> bool:
        first, *rest = name.split(".")
        if first == "penstock" and rest:
            return rest[0] in {folder} | FOLDERS_BELOW[folder]
        return first in OTHERS[folder] | sys.stdlib_module_names

    too_far = {
        module: names
        for module, file in MODULES.items()
        if (names := [name for name in imports(file) if not allowed(name, file.relative_to(ROOT).parts[0])])
    }
    assert too_far == {}


def test_the_package_imports_itself_relatively() -> None:
    def absolute(node: ast.AST) -> list[str]:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names.append(node.module or "")
        return [name for name in names if name.split(".")[0] == "penstock"]

    found = [(module, name) for module, file in MODULES.items() for node in nodes(file) for name in absolute(node)]
    assert found == []


def test_no_modules_import_each_other() -> None:
    graph = {name: {other for other in imports(file) if other in MODULES} for name, file in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("a loop of imports: " + " ← ".join(error.args[1]))


@pytest.mark.slow
def test_calling_loads_nothing_that_only_serving_needs() -> None:
    code = "import sys, penstock.handles; penstock.handles.connect; print(*sys.modules)"
    loaded = set(subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert "penstock.handles" in loaded
    assert not loaded & {"ray", "httptools", "starlette", "uvicorn", "pydantic"}


@pytest.mark.slow
def test_the_api_of_serving_loads_no_ray() -> None:
    """Its import takes a second, and `serve.start` reports a wrong argument without it."""
    code = "import sys; from penstock import serve; print(serve.start, serve.Client, *sys.modules)"
    loaded = set(subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert "penstock.serve.lifecycle" in loaded
    assert not loaded & {"ray", "uvicorn", "yaml", "penstock.serve.controller.controller"}


@pytest.mark.slow
def test_a_replica_loads_nothing_that_only_calling_needs() -> None:
    """Unless its code calls other backends."""
    code = "import sys, penstock.workers.serving; print(*sys.modules)"
    loaded = set(subprocess.check_output([sys.executable, "-c", code], text=True).split())
    unneeded = ("calls.request_client", "batch", "files", "async_handle", "connection")
    assert not loaded & {f"penstock.handles.{name}" for name in unneeded}


def test_a_process_with_the_handle_of_an_actor_loads_nothing_that_the_actor_runs() -> None:
    """Ray imports the class there, on a thread of its own: in a replica while it starts, beside the user's code."""
    code = "import sys; from penstock.serve.ray_actors import controller, proxy, replica; print(*sys.modules)"
    loaded = set(subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert {name.split(".")[1] for name in loaded if name.startswith("penstock.")} == {"runtime", "serve"}
    assert not loaded & {"redis", "starlette", "uvicorn", "penstock.serve._api"}


def test_the_controller_loads_nothing_that_only_its_actors_need() -> None:
    code = "import sys; from penstock.serve.controller import controller; print(*sys.modules)"
    loaded = set(subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert "ray" in loaded
    assert not loaded & {"starlette", "uvicorn", "penstock.proxy.app"}
    assert not loaded & {"penstock.serve.config", "penstock.workers.serving"}


def test_the_root_imports_nothing() -> None:
    """Else ``penstock.handles`` would load it too, and pytest would load every module a second time."""
    body = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8")).body
    docstring, version, version_docstring = body
    assert [type(statement) for statement in (docstring, version, version_docstring)] == [
        ast.Expr,
        ast.Assign,
        ast.Expr,
    ]


def test_no_module_is_loaded_under_its_bare_name() -> None:
    assert not set(FOLDERS_BELOW) & set(sys.modules)


def test_private_modules_of_ray_are_imported_only_where_their_absence_is_handled() -> None:
    def bare(file: Path) -> list[int]:
        guarded = {
            node
            for block in nodes(file)
            if isinstance(block, ast.Try) and any(ast.unparse(h.type or block) == "ImportError" for h in block.handlers)
            for statement in block.body
            for node in ast.walk(statement)
        }
        private = (node for node in nodes(file) if isinstance(node, ast.ImportFrom) and node not in guarded)
        return [node.lineno for node in private if (node.module or "").startswith("ray._private")]

    assert {module: lines for module, file in MODULES.items() if (lines := bare(file))} == {}
