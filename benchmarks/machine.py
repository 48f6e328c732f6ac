"""Where and when the figures were taken."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_ROOT = Path(__file__).resolve().parents[1]


def describe() -> dict[str, str]:
    """Machine, software and commit, for the head of the report."""
    described = {
        "CPU": _cpu(),
        "cores": f"{_cores()}",
        "torch threads": f"{torch.get_num_threads()}",
        "software": ", ".join(
            [f"Python {platform.python_version()}", *map(_version, ("torch", "lightning", "timm", "pillow"))]
        ),
        "system": f"{platform.system()} {platform.machine()}",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    commit = _commit()
    return described | ({"commit": commit} if commit else {})


def load() -> str:
    """The load average over one minute, where the system has one."""
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


class OtherLoad:
    """How many cores other processes kept busy since this was made: what spoils a figure unseen."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._own, self._all = _own_seconds(), _busy_seconds()

    def __str__(self) -> str:
        busy = _busy_seconds()
        if busy is None or self._all is None:
            return "unknown"
        others = (busy - self._all) - (_own_seconds() - self._own)
        return f"{max(0.0, others / (time.perf_counter() - self._start)):.2f}"


def _own_seconds() -> float:
    """CPU time of this process and the children it has waited for."""
    return sum(os.times()[:4])


def _busy_seconds() -> float | None:
    """CPU time of the whole system (Linux)."""
    try:
        words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, words[:8])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    shown = fields.get("model name", platform.machine())
    extras = [f"{name} {fields[name]}" for name in ("cpu family", "model") if name in fields]
    return f"{shown} ({', '.join(extras)})" if extras else shown


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} absent"


def _commit() -> str | None:
    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", *arguments]
        return subprocess.run(command, cwd=_ROOT, check=True, capture_output=True, text=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short", "HEAD")
        return f"{commit}, with changes not committed" if git("status", "--porcelain") else commit
    except (OSError, subprocess.CalledProcessError):
        return None
