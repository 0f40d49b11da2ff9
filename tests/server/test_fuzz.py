"""A few seconds of what `python -m bench.faults --only fuzz` does for a minute of each kind."""

from collections.abc import Callable

import uvloop

from bench.fuzz import generated_requests, random_bytes
from tests.server_process import ServerProcess

SECONDS = 2.0
MODEL = "fuzzed"


def test_whatever_is_sent_there_is_no_500_and_no_hang(
    start_server: Callable[..., ServerProcess],
) -> None:
    server = start_server(
        *("--served-model-name", MODEL, "--max-model-len", "512"),
        *("--header-timeout-s", "2", "--body-timeout-s", "2"),
    )
    generated = generated_requests(server.url, SECONDS)
    noise = uvloop.run(random_bytes(server.port, MODEL, SECONDS))
    assert generated.failures == noise.failures == []
    # It got past the parser, and found what there is to refuse.
    assert noise.statuses[200] > 0
    assert noise.statuses[400] > 0
    assert generated.statuses[400] > 0
    server.wait_idle()
    assert server.terminate() == 0
