"""Types of command line options that the programs of bench share."""

import argparse
import json
from typing import Any


def levels(text: str) -> list[int]:
    """Parse numbers of streams, such as 1,8,32."""
    values = [int(part) for part in text.split(",")]
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text}: needs whole numbers of at least 1")
    return values


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return value


def json_object(text: str) -> dict[str, Any]:
    """Parse a JSON object."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("needs a JSON object")
    return value
