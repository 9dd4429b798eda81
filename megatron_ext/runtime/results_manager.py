"""What the process that collects the writers' results begins with. It imports nothing large: every rank starts one."""

import multiprocessing
import os
import signal
import threading


def end_with_parent() -> None:
    """End when the trainer does, and not by a signal that is sent to all processes of a job."""
    for number in (signal.SIGTERM, signal.SIGUSR1):  # sent to all processes of a job: the last save still needs the manager
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
