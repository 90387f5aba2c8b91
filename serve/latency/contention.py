"""Who else used the processors while models were timed.

The load average would count this program's own threads too, and the minute before; here its own
processor time is taken off what all processors did meanwhile.
"""

from dataclasses import dataclass

import psutil

BUSY = 0.1  # of the time of all processors, from which a reader must know
SHORTEST = 0.5  # seconds of processor time; the counters step by hundredths of a second


@dataclass(frozen=True)
class Contention:
    """Shares of the time of all processors, 0 to 1.

    Attributes:
        others: Taken by other programs.
        stolen: Taken from a virtual machine by its host.
    """

    others: float
    stolen: float

    @property
    def words(self) -> str | None:
        """Say that the machine was busy; None where it was not."""
        if self.others + self.stolen < BUSY:
            return None
        shares = {"other programs": self.others, "the host": self.stolen}
        took = " and ".join(f"{who} {share:.0%}" for who, share in shares.items() if share >= 0.01)
        return (
            f"this machine was busy: {took} of all processors' time while models were timed; on an "
            "idle one intervals are narrower"
        )


@dataclass(frozen=True)
class Counters:
    """Seconds of processor time so far: of all processors in all, used, stolen; of this program."""

    total: float
    used: float
    stolen: float
    own: float

    @classmethod
    def now(cls) -> "Counters":
        """Read them."""
        times = psutil.cpu_times()._asdict()
        inside = times.pop("guest", 0.0) + times.pop("guest_nice", 0.0)  # counted as user time too
        total, stolen = sum(times.values()), times.get("steal", 0.0)
        used = total - times["idle"] - times.get("iowait", 0.0) - stolen - inside
        return cls(total, used, stolen, sum(psutil.Process().cpu_times()[:4]))

    def until(self, end: "Counters") -> Contention:
        """Return what happened between these counters and later ones."""
        total = end.total - self.total
        if total < SHORTEST:
            return Contention(0.0, 0.0)
        others = (end.used - self.used) - (end.own - self.own)
        return Contention(max(0.0, others / total), max(0.0, (end.stolen - self.stolen) / total))
