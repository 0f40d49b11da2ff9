"""`python -m tests.server.read_nvml SECONDS`: what the poller has read after that time, as JSON."""

import sys
import time

import msgspec

from server.telemetry.poller import Poller


def main() -> None:
    poller = Poller("gpu", interval_s=0.05)
    poller.start()
    time.sleep(float(sys.argv[1]))
    poller.stop()
    sys.stdout.write(msgspec.json.encode(poller.latest).decode())


if __name__ == "__main__":
    main()
