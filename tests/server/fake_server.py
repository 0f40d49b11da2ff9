"""`python -m tests.server.fake_server GRACE_S LOG_FORMAT`: the fake server as a process."""

import sys

from server.app import create_app
from server.http import Settings
from server.logs import start_logging
from server.run import bind, run
from tests.server.fake_engine import FakeEngine, toy_model


def main() -> int:
    grace_s, log_format = sys.argv[1:]
    listener = start_logging(log_format)  # type: ignore[arg-type]
    app = create_app(toy_model(), Settings(grace_s=float(grace_s)), FakeEngine(step_s=0.01).attach)
    try:
        return run(app, bind("127.0.0.1", 0), lambda address: print(address, flush=True))
    finally:
        listener.stop()


if __name__ == "__main__":
    sys.exit(main())
