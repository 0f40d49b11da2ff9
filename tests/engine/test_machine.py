"""What the machine offers is within what it has."""

import os

import pytest

from engine.machine import available_memory_bytes, physical_cores


def test_cores_are_within_the_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    cpus = os.sched_getaffinity(0)
    assert 1 <= physical_cores() <= len(cpus)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {min(cpus)})
    assert physical_cores() == 1


def test_available_memory_is_positive_and_below_the_total() -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < available_memory_bytes() <= total
