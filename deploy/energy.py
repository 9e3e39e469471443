"""Joules that this machine has used, where its processors count them and may be asked (RAPL, /sys/class/powercap).

Rule: None wherever a domain cannot be read, never an estimate. It is the packages' use, whoever caused it; memory,
disks and devices are not in it.
"""

from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class Meter:
    """From when it was made on."""

    def __init__(self, folder: Path = POWERCAP) -> None:
        """`folder` holds a folder for each domain."""
        # intel-rapl:0 is a package (AMD's kernel driver calls it so too), intel-rapl:0:1 a part of it
        self._domains = sorted(path for path in folder.glob("intel-rapl:*") if path.name.count(":") == 1)
        self._before = [_read(path / "energy_uj") for path in self._domains]

    def joules(self) -> float | None:
        """Used up to now; None where it is not counted, or may not be read."""
        total_uj = 0
        for path, before in zip(self._domains, self._before, strict=True):
            now, most = _read(path / "energy_uj"), _read(path / "max_energy_range_uj")
            if before is None or now is None or (now < before and most is None):
                return None
            # a counter that has run over begins at 0 again
            total_uj += now - before if now >= before else now + (most or 0) - before
        return total_uj / 1e6 if self._domains else None


def _read(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
