"""The whole path of a request: deployed code serves HTTP and both kinds of handle."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path
from typing import Any, cast
from zipfile import ZipFile

import pytest
from httpx import Client as HTTPClient
from redis import Redis

from penstock import handles, serve
from penstock.broker.wire.keys import Keys
from tests.serve.backends import SMALL
from tests.serve.conftest import StartClient
from tests.support.waiting import wait_until


def test_path_parameters_have_the_types_of_their_route(web: serve.Client, http: HTTPClient) -> None:
    def f(request: serve.Request) -> list[Any]:
        return [[name, type(value).__name__, value] for name, value in request.path_params.items()]

    web.create_backend("f", f)
    web.create_endpoint("complex", backend="f", route="/api/{user_id:int}/{number:float}")
    web.create_endpoint("simple", backend="f", route="/api/{username}")

    assert http.get("/api/123/3.14").json() == [["user_id", "int", 123], ["number", "float", 3.14]]
    assert http.get("/api/abc/3.14").status_code == 404
    assert http.get("/api/ada").json() == [["username", "str", "ada"]]


@pytest.mark.usefixtures("cluster")
def test_the_whole_path_works_on_every_broker(broker_url: str) -> None:
    def f(request: serve.Request) -> list[Any]:
        return [request.data, request.path_params.get("n")]

    with serve.start(redis_url=broker_url, http_options={"port": 0}) as client:
        client.create_backend("f", f, config={"num_replicas": 2})
        client.create_endpoint("e", backend="f", route="/e/{n:int}", methods=["POST"])
        with HTTPClient(base_url=str(client.http_url)) as http:
            assert http.post("/e/7", json={"a": 1}).json() == [{"a": 1}, 7]
        handle = client.get_handle("e")
        assert [handle.remote(n).result(timeout=10) for n in range(20)] == [[n, None] for n in range(20)]
        client.shutdown()


async def test_both_kinds_of_handle_call_a_backend(client: serve.Client) -> None:
    class Greeter:
        def __init__(self, greeting: str, *, mark: str) -> None:
            self.greeting, self.mark = greeting, mark

        async def __call__(self, request: serve.Request) -> str:
            return f"{self.greeting} {request.data['name']}{self.mark}"

    client.create_backend("greeter", Greeter, "hello", mark="!")
    client.create_endpoint("greet", backend="greeter")
    with pytest.warns(UserWarning, match="sync=False"):  # because this test runs on an event loop
        handle = client.get_handle("greet")
    assert handle.remote({"name": "Ada"}).result(timeout=10) == "hello Ada!"
    future = await client.get_handle("greet", sync=False).remote({"name": "Grace"})
    assert await future == "hello Grace!"


def test_code_that_only_the_replicas_can_import(client: serve.Client) -> None:
    client.create_backend("method", "operator:attrgetter", "method")
    client.create_endpoint("method", backend="method")
    handle = client.get_handle("method").options(http_method="PUT")
    assert handle.remote().result(timeout=10) == "PUT"
    with pytest.raises(serve.errors.ConfigError, match="max_batch_size is 4, but attrgetter takes one request"):
        client.update_backend_config("method", {"max_batch_size": 4})
    assert client.get_backend_config("method").max_batch_size is None
    with pytest.raises(serve.errors.ConfigError, match="user_config is given, but attrgetter has no method reconfigur"):
        client.update_backend_config("method", {"user_config": 1})
    with pytest.raises(serve.errors.ConfigError, match="user_config is given, but attrgetter has no method reconfigur"):
        client.create_backend("other", "operator:attrgetter", "method", config={"user_config": 1})
    assert handle.remote().result(timeout=10) == "PUT"
    with pytest.raises(serve.errors.BackendError, match="ModuleNotFoundError: No module named 'nowhere'"):
        client.create_backend("other", "nowhere:Model")


def test_waiting_requests_form_one_batch(client: serve.Client) -> None:
    @serve.accept_batch
    def sizes(requests: list[serve.Request]) -> list[int]:
        return [len(requests)] * len(requests)

    client.create_backend("sizes", sizes, config={"max_batch_size": 4, "batch_wait_timeout": 60.0})
    client.create_endpoint("sizes", backend="sizes")
    handle = client.get_handle("sizes")
    futures = [handle.remote(i) for i in range(4)]
    assert [future.result(timeout=10) for future in futures] == [4, 4, 4, 4]


def test_a_backend_finds_its_own_instance_and_its_name(web: serve.Client, http: HTTPClient) -> None:
    async def doubled(request: serve.Request) -> Any:
        inner = serve.connect().get_handle("inner", sync=False)
        return [await (await inner.remote(request.data)), serve.get_current_backend_tag()]

    def double(request: serve.Request) -> Any:
        return 2 * request.data

    web.create_backend("inner", double)
    web.create_endpoint("inner", backend="inner")
    web.create_backend("outer", doubled)
    web.create_endpoint("outer", backend="outer", route="/double", methods=["POST"])
    assert http.post("/double", json=21).json() == [42, "outer"]


def test_a_backend_of_an_instance_with_another_name_finds_its_own(start: StartClient) -> None:
    def where(request: serve.Request) -> Any:
        with handles.connect() as own:
            return [
                serve.connect().instance,
                own.instance,
                sorted(own.list_endpoints()),
                os.environ["PENSTOCK_INSTANCE"],
            ]

    for name in ("default", "blue"):
        client = start(instance=name)
        client.create_backend("where", where, ray_actor_options=SMALL)
        client.create_endpoint(f"where-{name}", backend="where")
        said = client.get_handle(f"where-{name}").remote().result(timeout=20)
        assert said == [name, name, [f"where-{name}"], name]


def test_a_backend_calls_others_in_parallel(client: serve.Client, tmp_path: Path) -> None:
    async def meet(request: serve.Request) -> Any:
        (tmp_path / str(request.data)).touch()
        while len(list(tmp_path.iterdir())) < 2:  # noqa: ASYNC110, ASYNC240 - it is another process that makes the file
            await asyncio.sleep(0.01)
        return request.data

    async def both(request: serve.Request) -> Any:
        handles = [serve.connect().get_handle(name, sync=False) for name in ("one", "two")]
        futures = await asyncio.gather(*[handle.remote(n) for n, handle in enumerate(handles)])
        return await asyncio.gather(*futures)

    for name, code in {"one": meet, "two": meet, "both": both}.items():
        client.create_backend(name, code, ray_actor_options=SMALL)
        client.create_endpoint(name, backend=name)
    # Neither returns before both are called.
    assert client.get_handle("both").remote().result(timeout=30) == [0, 1]


def test_a_runtime_env_applies_to_the_replicas(client: serve.Client) -> None:
    def colour(request: serve.Request) -> str | None:
        return os.environ.get("COLOUR")

    client.create_backend("env", colour, runtime_env={"env_vars": {"COLOUR": "red"}})
    client.create_endpoint("env", backend="env")
    assert client.get_handle("env").remote().result(timeout=10) == "red"


def test_replicas_share_gpus_and_other_resources_of_a_cluster(client: serve.Client) -> None:
    async def gpu(request: serve.Request) -> str | None:
        return os.environ.get("CUDA_VISIBLE_DEVICES")

    options = {"num_cpus": 0.1, "num_gpus": 0.5, "resources": {"disk": 1}}
    client.create_backend("half", gpu, config={"num_replicas": 4}, ray_actor_options=options)
    client.create_endpoint("half", backend="half")
    handle = client.get_handle("half")
    wait_until(lambda: {handle.remote().result(timeout=10) for _ in range(20)} == {"0", "1"})

    with pytest.raises(serve.errors.ConfigError, match=r"GPU 0\.25 each requested, room for 0: .* GPU 2 \(0 unused\)"):
        client.create_backend("more", gpu, ray_actor_options={"num_cpus": 0.1, "num_gpus": 0.25})
    client.update_backend_config("half", {"num_replicas": 2})
    with pytest.raises(serve.errors.ConfigError, match=r"disk 3 each requested, room for 0: .* disk 4 \(2 unused\)"):
        client.create_backend("more", gpu, ray_actor_options={"num_cpus": 0.1, "resources": {"disk": 3}})
    client.create_backend("more", gpu, ray_actor_options={"num_cpus": 0.1, "num_gpus": 1})
    client.create_endpoint("more", backend="more")
    assert client.get_handle("more").remote().result(timeout=10) in {"0", "1"}


def test_a_runtime_env_brings_modules_and_a_working_directory(client: serve.Client, tmp_path: Path) -> None:
    modules, folder = tmp_path / "modules.zip", tmp_path / "folder.zip"
    with ZipFile(modules, "w") as archive:
        archive.writestr("modules/penstock_colours/__init__.py", "def red(request):\n    return 'red'\n")
    with ZipFile(folder, "w") as archive:
        archive.writestr("folder/colour.txt", "blue")
        archive.writestr("folder/penstock_read.py", "def read(request):\n    return open('colour.txt').read()\n")

    environments: dict[str, dict[str, Any]] = {
        "penstock_colours:red": {"py_modules": [modules.as_uri()]},
        "penstock_read:read": {"working_dir": folder.as_uri()},
    }
    answers = list[str]()
    for number, (path, environment) in enumerate(environments.items()):
        client.create_backend(f"b{number}", path, runtime_env=environment, ray_actor_options=SMALL)
        client.create_endpoint(f"e{number}", backend=f"b{number}")
        answers.append(client.get_handle(f"e{number}").remote().result(timeout=10))
    assert answers == ["red", "blue"]


def test_a_runtime_env_brings_packages(client: serve.Client, tmp_path: Path) -> None:
    """The package is a wheel on this machine, so that no index is needed."""
    wheel = tmp_path / "penstock_tint-1.0-py3-none-any.whl"
    about = "penstock_tint-1.0.dist-info"
    with ZipFile(wheel, "w") as archive:
        archive.writestr("penstock_tint.py", "def tint(request):\n    return 'green'\n")
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: penstock-tint\nVersion: 1.0\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    packages = {"packages": [str(wheel)], "pip_install_options": ["--no-index", "--no-deps"]}
    client.create_backend("tint", "penstock_tint:tint", runtime_env={"pip": packages}, ray_actor_options=SMALL)
    client.create_endpoint("tint", backend="tint")
    assert client.get_handle("tint").remote().result(timeout=10) == "green"


def test_local_directories_are_stored_with_the_backend(client: serve.Client, tmp_path: Path) -> None:
    """They are in the registry, so replicas find them after they were deleted on this machine."""
    folder, module = tmp_path / "folder", tmp_path / "penstock_shades"
    folder.mkdir()
    module.mkdir()
    (folder / "colour.txt").write_text("blue")
    (folder / "weights.bin").write_text("left at home")
    (folder / "penstock_local.py").write_text(
        "import os, penstock_shades\n"
        "def read(request):\n"
        "    return [penstock_shades.SHADE + open('colour.txt').read(), sorted(os.listdir()), os.getcwd()]\n"
    )
    (module / "__init__.py").write_text("SHADE = 'dark '\n")
    environment = {"working_dir": folder, "py_modules": [str(module)], "excludes": ["*.bin"]}
    config = {"autoscaling_config": {"min_replicas": 0, "max_replicas": 1, "downscale_delay_s": 0.1}}

    def ask() -> tuple[str, list[str], Path]:
        colour, files, place = client.get_handle("e").remote().result(timeout=20)
        return colour, [name for name in files if name != "__pycache__"], Path(place)

    client.create_backend("b", "penstock_local:read", runtime_env=environment, ray_actor_options=SMALL, config=config)
    client.create_endpoint("e", backend="b")
    shutil.rmtree(folder)
    shutil.rmtree(module)
    colour, files, place = ask()
    assert (colour, files) == ("dark blue", ["colour.txt", "penstock_local.py"])
    wait_until(lambda: client.status()["backends"]["b"]["ready"] == 0)
    wait_until(lambda: not place.exists())
    colour, files, another = ask()
    assert (colour, files) == ("dark blue", ["colour.txt", "penstock_local.py"])
    assert another != place

    # New code keeps them or replaces them; unused ones are deleted.
    client.update_backend("b", "penstock_local:read")
    assert ask()[0] == "dark blue"
    folder.mkdir()
    (folder / "penstock_local.py").write_text("def read(request):\n    return ['red', [], '/']\n")
    client.update_backend("b", "penstock_local:read", runtime_env={"working_dir": str(folder)})
    assert ask()[0] == "red"
    (folder / "penstock_local.py").write_text("1 / 0")
    with pytest.raises(serve.errors.BackendError, match="ZeroDivisionError"):
        client.update_backend("b", "penstock_local:read", runtime_env={"working_dir": str(folder)})
    assert ask()[0] == "red"
    assert len(stored(client)) == 2
    client.update_backend("b", "operator:attrgetter", "data", runtime_env={})
    assert len(stored(client)) == 1


def stored(client: serve.Client) -> list[Any]:
    """The keys of all code and of all files in the registry."""
    with Redis.from_url(client.redis_url) as redis:
        return cast("list[Any]", redis.keys(Keys(client.instance).code("*")))
