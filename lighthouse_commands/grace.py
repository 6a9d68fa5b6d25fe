"""The launcher's answer to SIGTERM and SIGINT: its processes get time to save."""

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType

import psutil
from torch.distributed.elastic.multiprocessing.api import SignalException

from .protocol import SECONDS_OF_ONE_SIGNAL, SIGNALS


class Grace:
    """Passes the first signal on to the training processes, and ends those that outstay it.

    torchrun would wait for 30 seconds and then not say how its processes ended. Here it goes on
    watching them, so that their exit codes and reports arrive.

    Args:
        seconds: time from the first signal until processes that still run are killed.

    Attributes:
        number: the first signal; None before any.
        overdue: why they were killed; empty if they were not.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.number: signal.Signals | None = None
        self.overdue = ""
        self._since = 0.0

    def listen(self) -> None:
        """Take signals from here on."""
        for number in SIGNALS:
            signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            if time.monotonic() - self._since > SECONDS_OF_ONE_SIGNAL:
                self._kill("twice, without saving")
            return
        self.number, self._since = signal.Signals(number), time.monotonic()
        if not self._send(signal.SIGTERM):
            raise SignalException(f"no process runs yet: {self.number.name}", self.number)
        # print is not safe here: the signal may have interrupted it.
        text = (
            f"{self.number.name}: processes save after the step under way, for {self.seconds:g} s "
            "at most, or end now if it is their first; a second signal ends them at once\n"
        )
        os.write(2, text.encode())
        timer = threading.Timer(
            self.seconds, self._kill, [f"and not saved within --grace {self.seconds:g} s"]
        )
        timer.daemon = True
        timer.start()

    def _kill(self, why: str) -> None:
        if self._send(signal.SIGKILL):
            self.overdue = why

    def _send(self, number: signal.Signals) -> bool:
        """Send a signal to this process's children, and return whether there are any."""
        children = psutil.Process().children()
        for child in children:
            with suppress(psutil.Error):
                child.send_signal(number)
        return bool(children)
