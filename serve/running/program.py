"""The programs that ``penstock run`` takes: a script, or an object of a module. Both make backends with a client."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from ...broker.errors import ConfigError
from ...workers.asgi.application import asgi
from ..client import Client
from ..deploy.sources import find_source
from ..validation import ALL_METHODS

_OWN_FOLDER = str(Path(__file__).parent.parent.parent) + os.sep
_LIBRARY = (_OWN_FOLDER, "<frozen importlib", importlib.__file__)
"""Files whose frames a traceback of a program does not begin with."""
_METHODS = ("GET", "POST")


def check_program(target: str) -> None:
    """Refuse what cannot be run, before anything is started. Imports nothing.

    Raises:
        ConfigError: there is no such file or module, or it is not valid Python.
    """
    if is_script(target):
        path = Path(target)
        if not path.is_file():
            raise ConfigError(f"there is no file {target!r}")
    else:
        module, _, name = target.partition(":")
        if not module or not name:
            raise ConfigError(
                f"{target!r} is neither a script ('app.py'), nor a manifest ('app.yaml'), nor an object of a module "
                "('module:app')"
            )
        source = find_source(target, None)
        if source is None:
            raise ConfigError(f"there is no module {module!r} in {os.getcwd()!r} or where this command imports from")
        path = source.path
    if path.is_file():
        compiled(path)


def is_script(target: str) -> bool:
    return target.endswith(".py")


def compiled(path: Path) -> Any:
    """Return the code of a script. Raises `ConfigError` with the line of a syntax error."""
    try:
        return compile(path.read_bytes(), str(path), "exec")
    except (SyntaxError, ValueError) as e:
        line = f", line {e.lineno}" if isinstance(e, SyntaxError) else ""
        raise ConfigError(f"{path}{line}: {getattr(e, 'msg', None) or e}") from None
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}") from None


def run_script(script: str, arguments: Sequence[str]) -> None:
    """Run a script as Python does: as ``__main__``, with its arguments and its folder to import from."""
    path = Path(script)
    code = compiled(path)
    module = ModuleType("__main__")
    module.__dict__.update(__file__=script, __builtins__=__builtins__)
    sys.modules["__main__"] = module
    sys.argv[:] = [script, *arguments]
    sys.path.insert(0, str(path.resolve().parent))
    exec(code, module.__dict__)


def make_target(client: Client, target: str) -> None:
    """Make backends and endpoints of ``module:name``, which is imported.

    A function or a class becomes a backend of its name at the route ``/``, an ASGI application one at every path. A
    mapping has several functions and classes by route.

    Raises:
        ConfigError: the module has no such name, or the object is none of these.
    """
    module_name, _, name = target.partition(":")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    found: Any = importlib.import_module(module_name)
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise ConfigError(f"module {module_name!r} has no {name!r}") from None
    if isinstance(found, Mapping):
        for route, code in cast("Mapping[object, Any]", found).items():
            if not isinstance(route, str) or not callable(code):
                raise ConfigError(f"{target} must have routes as keys and functions or classes as values")
            _make(client, _name_of(code, route), code, route)
    elif is_application(found):
        tag = name.rpartition(".")[2]
        client.create_backend(tag, asgi(target))
        client.create_endpoint(tag, backend=tag, route="/{path:path}", methods=ALL_METHODS)
    elif callable(found):
        code = target if _is_defined_in(found, module_name, name) else found
        _make(client, name.rpartition(".")[2], code, "/")
    else:
        raise ConfigError(
            f"{target} is a {type(found).__name__}; penstock run takes a function, a class, an ASGI application, or a "
            "dict of functions and classes by route"
        )


def is_application(found: object) -> bool:
    """Return whether an object is called with ``(scope, receive, send)``, as ASGI applications are."""
    if isinstance(found, type) or not callable(found):
        return False
    try:
        signature = inspect.signature(found)
        signature.bind(None, None, None)
    except (TypeError, ValueError):
        return False
    try:
        signature.bind(None)
    except TypeError:
        return True
    return False


def _make(client: Client, name: str, code: Callable[..., Any] | str, route: str) -> None:
    client.create_backend(name, code)
    client.create_endpoint(name, backend=name, route=route, methods=_METHODS)


def _name_of(code: Any, route: str) -> str:
    return getattr(code, "__name__", None) or route.strip("/").replace("/", "-") or "root"


def _is_defined_in(found: Any, module: str, name: str) -> bool:
    return getattr(found, "__module__", None) == module and getattr(found, "__qualname__", None) == name


def show_error(error: BaseException, target: str) -> None:
    """Write the traceback of a program to standard error, without the frames of Penstock at its beginning."""
    if isinstance(error, ConfigError) and error.__traceback__ is not None and _is_own(error):
        sys.stderr.write(f"{target}: {error}\n")
        return
    report = traceback.TracebackException.from_exception(error)
    frames = list(report.stack)
    while frames and (frames[0].filename.startswith(_LIBRARY) or not frames[0].filename):
        del frames[0]
    report.stack = traceback.StackSummary.from_list(frames)
    sys.stderr.write("".join(report.format()))


def _is_own(error: BaseException) -> bool:
    """Return whether no frame of a user's program is in the traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    return all(frame.filename.startswith((_OWN_FOLDER, "<")) for frame in frames)
