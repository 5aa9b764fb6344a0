"""The programs that ``penstock run`` takes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

import pytest

from penstock import serve
from penstock.handles.errors import ConfigError
from penstock.serve.running.program import check_program, is_application, make_target, run_script, show_error

CODE = """
def greet(request):
    return "hi"

class Model:
    def __call__(self, request):
        return "model"

async def application(scope, receive, send):
    pass

routes = {"/": greet, "/model": Model}
number = 7
"""


class Made:
    """Records the calls of a client."""

    def __init__(self) -> None:
        self.backends: dict[str, Any] = {}
        self.routes: dict[str, str] = {}
        self.methods: tuple[str, ...] = ()

    def create_backend(self, tag: str, code: Any) -> None:
        self.backends[tag] = code

    def create_endpoint(self, name: str, *, backend: str, route: str, methods: tuple[str, ...]) -> None:
        assert backend in self.backends
        self.methods = methods
        self.routes[route] = name


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the current directory."""
    name = f"penstock_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name


def made(target: str) -> Made:
    client = Made()
    make_target(cast("serve.Client", client), target)
    return client


def test_a_function_or_a_class_is_served_at_the_root_by_its_import_path(module: str) -> None:
    for name in ("greet", "Model"):
        client = made(f"{module}:{name}")
        assert client.backends == {name: f"{module}:{name}"}
        assert client.routes == {"/": name}


def test_a_dict_is_served_at_its_routes(module: str) -> None:
    assert made(f"{module}:routes").routes == {"/": "greet", "/model": "Model"}


@pytest.mark.parametrize(
    ("name", "said"),
    [("number", "is a int; penstock run takes"), ("nothing", "has no 'nothing'")],
)
def test_other_objects_are_refused_by_name(module: str, name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        made(f"{module}:{name}")


def test_an_asgi_application_is_recognised_by_its_parameters(module: str) -> None:
    made(f"{module}:greet")
    found = sys.modules[module]
    assert is_application(found.application)
    assert not is_application(found.greet)
    assert not is_application(found.Model)
    client = made(f"{module}:application")
    assert client.routes == {"/{path:path}": "application"}
    assert client.methods == serve.ALL_METHODS
    assert client.backends["application"].target == f"{module}:application"


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("none.py", "there is no file 'none.py'"),
        ("none", "'none' is neither a script .'app.py'., nor a manifest"),
        ("penstock_nowhere:app", "there is no module 'penstock_nowhere' in "),
        ("broken.py", "broken.py, line 2: invalid syntax"),
        ("broken:app", "broken.py, line 2: invalid syntax"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, said: str
) -> None:
    (tmp_path / "broken.py").write_text("a = 1\ndef (\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=said):
        check_program(program)


def test_a_script_runs_as_main_with_its_arguments_and_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("path", list(sys.path)), ("argv", list(sys.argv))):
        monkeypatch.setattr(sys, name, value)
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    (tmp_path / f"helper_{tmp_path.name}.py").write_text("said = 'helped'\n")
    script = tmp_path / "app.py"
    script.write_text(f"import sys\nfrom helper_{tmp_path.name} import said\nprint(__name__, said, sys.argv[1:])\n")
    run_script(str(script), ["--model", "a"])
    assert capsys.readouterr().out == "__main__ helped ['--model', 'a']\n"


def test_the_traceback_of_a_script_begins_in_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("path", list(sys.path)), ("argv", list(sys.argv))):
        monkeypatch.setattr(sys, name, value)
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    script = tmp_path / "app.py"
    script.write_text("def load():\n    raise RuntimeError('no weights')\n\nload()\n")
    with pytest.raises(RuntimeError) as raised:
        run_script(str(script), [])
    show_error(raised.value, str(script))
    shown = capsys.readouterr().err.splitlines()
    assert [line.strip().split(",")[0] for line in shown if "File " in line] == [f'File "{script}"'] * 2
    assert shown[-1] == "RuntimeError: no weights"


def test_the_traceback_of_a_module_begins_in_the_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = tmp_path / "penstock_broken_module.py"
    module.write_text("import nothing_like_that\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError) as raised:
        made("penstock_broken_module:app")
    show_error(raised.value, "penstock_broken_module:app")
    shown = [line for line in capsys.readouterr().err.splitlines() if 'File "<' not in line and "^" not in line]
    files = [line.strip().split(",")[0] for line in shown if "File " in line and "test_program" not in line]
    assert files == [f'File "{module}"']
    assert shown[-1] == "ModuleNotFoundError: No module named 'nothing_like_that'"
