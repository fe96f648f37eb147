"""SIGTERM and Ctrl-C ask a run to stop; they do not tear it."""

import os
import signal
import sys
from types import FrameType


class StopSignal:
    """Remembers SIGTERM or SIGINT instead of dying of it; a second one ends the process at once, with 130."""

    def __init__(self) -> None:
        self.requested = False
        self.name = "another rank's signal"
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os.write(sys.stderr.fileno(), b"stopped at once; the newest checkpoint is as it was\n")
            os._exit(130)  # no clean-up: it could wait for a save, or for ranks that are gone
        self.requested, self.name = True, signal.Signals(number).name
