"""Memory and CPU time of a whole tree of processes."""

import threading
import time

import psutil


class Watch(threading.Thread):
    """Peak PSS of this process and all below it, twice a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self.cpu_s: dict[int, float] = {}

    def run(self) -> None:
        """Looks until the program ends."""
        while True:
            self.look()
            time.sleep(0.5)

    def look(self) -> None:
        """Adds up memory and CPU time at this moment."""
        total, this = 0, psutil.Process()
        for process in [this, *this.children(recursive=True)]:
            try:
                total += process.memory_full_info().pss
                times = process.cpu_times()
                self.cpu_s[process.pid] = times.user + times.system
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        self.peak_bytes = max(self.peak_bytes, total)
