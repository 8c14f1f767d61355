"""Which machine this is: enough to tell whether a profile was measured here, nothing personal."""

from __future__ import annotations

import hashlib
import os
import platform
from contextlib import suppress
from pathlib import Path

from profiler.model_profile import DeviceInfo

_MEMORY_STEP = 2**28  # firmware and kernel updates move the total by less
_CPU_KEYS = ("model name", "Model", "Hardware", "cpu model", "uarch")


def cpu_name() -> str:
    """The processor's name, or its architecture where the system tells no name."""
    values: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            values.setdefault(key.strip(), value.strip())
    named = next((values[key] for key in _CPU_KEYS if values.get(key)), "")
    part = "/".join(values[key] for key in ("CPU implementer", "CPU part") if key in values)
    return " ".join((named or part or platform.processor() or "cpu").split()) + f" ({platform.machine()})"


def memory_bytes() -> int:
    """All memory of the machine."""
    with suppress(OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 0


def disk_name(path: str | os.PathLike[str]) -> str:
    """Kind, model and size of the disk that holds path, as far as the system tells; no serial number."""
    device = os.stat(path).st_dev
    folder = Path(os.path.realpath(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"))
    if (folder / "partition").exists():
        folder = folder.parent
    facts = []
    for name in ("device/model", "device/name", "size", "queue/rotational"):
        with suppress(OSError):
            facts.append((folder / name).read_text().strip())
    return " ".join(facts) or "unknown disk"


def usable_cores() -> int:
    """Processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def device_info(path: str | os.PathLike[str]) -> DeviceInfo:
    """This machine, with the disk that holds path. The id is the same on every run and after updates."""
    cpu, n_cores, memory = cpu_name(), os.cpu_count() or 1, memory_bytes()
    facts = "\n".join((cpu, str(n_cores), str(round(memory / _MEMORY_STEP)), disk_name(path)))
    identity = hashlib.blake2b(facts.encode(), digest_size=8).hexdigest()
    return DeviceInfo(identity, cpu, n_cores, memory, f"{platform.system()} {platform.release()}")
