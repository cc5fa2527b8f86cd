"""What a job that scripts/slurm.py submits does in each of its processes."""

import signal
import subprocess
import sys
from types import FrameType

from submitit.helpers import DelayedSubmission

STOPPED = (128 + signal.SIGTERM, -signal.SIGTERM)  # by SIGTERM: after a checkpoint, or before one


class Job:
    """Runs a command in a process of its own, and has it queued again when its time is over.

    SLURM sends SIGUSR2 some time before the limit. The command then gets SIGTERM, upon which it
    saves a checkpoint and ends, and submitit has the same job queued again, from where it goes on.
    After a SIGTERM of SLURM, as by scancel, it is not. Whether a preempted job is queued again, is
    for the cluster to say.
    """

    def __init__(self, command: list[str]) -> None:
        self.command = command

    def __call__(self) -> None:
        """Ends with the status of the command, if that has failed."""
        requeue = signal.getsignal(signal.SIGUSR2)  # of submitit: does it in the first process
        # SLURM sends signals to every process of a job. SIGUSR2 would kill the command, were it not
        # ignored in what is started now; of SIGTERM it has heard without help, and a second one
        # would end it at once.
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        process = subprocess.Popen(self.command)
        received = []

        def tell(number: int, frame: FrameType | None) -> None:
            del frame
            if number == signal.SIGUSR2 and not received:
                process.send_signal(signal.SIGTERM)
            received.append(number)

        signal.signal(signal.SIGUSR2, tell)
        signal.signal(signal.SIGTERM, tell)
        status = process.wait()
        if signal.SIGUSR2 in received and status in STOPPED:
            requeue(signal.SIGUSR2, None)
        elif status:
            sys.exit(status if status > 0 else 128 - status)

    def checkpoint(self) -> DelayedSubmission:
        """What submitit is to run in the job that is queued again: the same."""
        return DelayedSubmission(self)
