"""Fixtures that tests of several folders share: the default model's file, and servers over it.

The model is fetched at most once, by the engine's own fetcher into its own cache. Servers run as
a user would run them: `python -m server` in a process of its own.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.server_process import ServerProcess

DEFAULT_MODEL = "smollm2-135m"


@pytest.fixture(scope="session")
def default_model_path() -> Path:
    """The default model's .gguf file."""
    from engine.checkpoint.sources import resolve

    return Path(resolve(DEFAULT_MODEL, None).path)


@pytest.fixture
def start_server(
    default_model_path: Path, tmp_path: Path
) -> Iterator[Callable[..., ServerProcess]]:
    """Start servers with the given options; each is stopped at the end of the test."""
    started: list[ServerProcess] = []

    def start(*options: str, ready: bool = True) -> ServerProcess:
        log_path = tmp_path / f"server-{len(started)}.log"
        server = ServerProcess(["--model", str(default_model_path), *options], log_path)
        started.append(server)
        if ready:
            server.wait_ready()
        return server

    yield start
    for server in started:
        server.kill()


@pytest.fixture(scope="session")
def server(
    default_model_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """One server with the default model and default options for the whole session."""
    running = ServerProcess(
        ["--model", str(default_model_path), "--served-model-name", DEFAULT_MODEL],
        tmp_path_factory.mktemp("server") / "server.log",
    )
    running.wait_ready()
    yield running
    running.kill()
