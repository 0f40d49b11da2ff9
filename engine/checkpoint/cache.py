"""The folder that fetched models are kept in, and the lock of processes that fetch at once.

The sources that fetch (packages, hub) use it.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.checkpoint.progress import Progress


def cache_folder() -> Path:
    """$FULCRUM_CACHE, else $XDG_CACHE_HOME/fulcrum, else ~/.cache/fulcrum."""
    if own := os.environ.get("FULCRUM_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "fulcrum"
    return Path.home() / ".cache" / "fulcrum"


@contextmanager
def exclusive(folder: Path, progress: Progress) -> Iterator[None]:
    """Make `folder` and hold it alone; waits while another process does.

    The lock goes with the process, so one that was killed holds up nobody. Raises OSError where
    the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock_file:
        try:
            fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.note(f"Another process is fetching into {folder}; waiting for it")
            fcntl.flock(lock_file, fcntl.LOCK_EX)
        yield
