"""Runs an app on bound sockets until a signal, then drains it; called by `__main__`."""

import asyncio
import contextlib
import errno
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import uvloop
from aiohttp import web

from engine.config import ConfigError
from server.connection import Site
from server.http import CLIENT, SETTINGS

logger = logging.getLogger("fulcrum")

# A name may have an address of a family that this machine does not use.
_UNUSABLE = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
_FLUSH_S = 2.0  # for answers that are complete but not yet read, at the end


def bind(host: str, port: int) -> list[socket.socket]:
    """Bind every address of `host`, so that a port in use shows before a model is loaded."""
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no valid name"
        raise ConfigError(f"--host {host}: cannot be resolved ({reason})") from None
    sockets: list[socket.socket] = []
    unusable = OSError()
    for family, kind, protocol, _, address in dict.fromkeys(infos):
        if sockets and port == 0:
            break  # a second address would get another free port
        try:
            sockets.append(_bind(family, kind, protocol, address))
        except OSError as error:
            if error.errno in _UNUSABLE:
                unusable = error
                continue
            for bound in sockets:
                bound.close()
            raise ConfigError(f"--host {host} --port {port}: {error.strerror}") from None
    if not sockets:
        raise ConfigError(f"--host {host} --port {port}: {unusable.strerror}")
    return sockets


def _bind(family: int, kind: int, protocol: int, address: tuple[object, ...]) -> socket.socket:
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


def run(
    app: web.Application, sockets: list[socket.socket], on_listening: Callable[[str], None]
) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code. Call from the main thread.

    `on_listening` gets the address once connections are taken. The first signal lets running
    requests finish within the grace time, a second one ends the process at once.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(app, sockets, on_listening))


async def _serve(
    app: web.Application, sockets: list[socket.socket], on_listening: Callable[[str], None]
) -> int:
    # What is loaded by now stays: collections need not look at it again.
    gc.collect()
    gc.freeze()
    runner = web.AppRunner(
        app, handler_cancellation=True, access_log=None, shutdown_timeout=_FLUSH_S
    )
    await runner.setup()
    _wait_for_turns()
    # Threads inherit the policy of those that start them; this one is the event loop's alone.
    executor = ThreadPoolExecutor(thread_name_prefix="aside", initializer=_take_turns)
    asyncio.get_running_loop().set_default_executor(executor)
    try:
        for bound in sockets:
            await Site(runner, bound).start()
        stopping = _on_signals()
        on_listening(_address(sockets[0]))
        await stopping.wait()
        logger.info("stopping: running requests have %g s", app[SETTINGS].grace_s)
        await app[CLIENT].drain(app[SETTINGS].grace_s)
    except OSError as error:
        raise ConfigError(f"cannot listen on {_address(sockets[0])}: {error.strerror}") from None
    finally:
        await runner.cleanup()
    logger.info("stopped")
    return 0


def _wait_for_turns() -> None:
    """Have the event loop's thread wake up without preempting others.

    The threads that compute offer their cores every fraction of a millisecond. Taken from them in
    the middle of an operation, a core holds up all the others. The engine has its threads by now.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _take_turns() -> None:
    """Have a thread, and those that it starts as an apply does, compute as the engine's do."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def _on_signals() -> asyncio.Event:
    """An event that the first signal sets; the second one does not come back."""
    stopping = asyncio.Event()

    def on_signal(number: int) -> None:
        if stopping.is_set():
            os._exit(128 + number)
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
    return stopping


def _address(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
