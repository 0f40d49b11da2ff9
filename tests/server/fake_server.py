"""`python -m tests.server.fake_server GRACE_S LOG_FORMAT [TELEMETRY]`: a fake server's process."""

import sys
from typing import Any

from server.app import create_app
from server.http import Settings
from server.logs import start_logging, stop_logging
from server.run import bind, run
from tests.server.fake_engine import FakeEngine, toy_model


def main(grace_s: str, log_format: Any, telemetry: Any = "auto") -> int:
    listener = start_logging(log_format)
    settings = Settings(grace_s=float(grace_s), telemetry=telemetry)
    app = create_app(toy_model(), settings, FakeEngine(step_s=0.01).attach)
    code = run(app, bind("127.0.0.1", 0), lambda address: print(address, flush=True))
    stop_logging(listener, code)
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
