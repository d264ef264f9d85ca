"""Exit statuses of a job's processes and of its batch script, as a shell counts them.

`sweeps.slurm.job` exits with them, the batch script passes them to `sweeps.slurm.requeue`, which decides by them.
"""

from __future__ import annotations

DONE = 0  # the run finished, or stopped at a checkpoint on request
ERROR = 1  # an exception ended the training program
INVALID_RUN = 2  # the run cannot be trained as it is (UserError); another attempt would not help
NOT_RECORDED = 74  # the job's exit could not be recorded, because the disk is full perhaps; not a fault of the node
LEFT_EARLY = 75  # the job was signalled before training began; nothing is lost, and another attempt may start
LEASE_LOST = 76  # another process trains the run
KILLED = 137  # SIGKILL ended the process: 128 + 9

OF_SLURM_STATE = {
    "TIMEOUT": KILLED,
    "DEADLINE": KILLED,
    "OUT_OF_MEMORY": KILLED,
    "NODE_FAIL": LEFT_EARLY,
    "PREEMPTED": LEFT_EARLY,
}
"""Status to record when SLURM ended a job, batch script included, in that state; the last two are not the run's fault.
In every other state the batch script ran to its end and recorded the exit itself."""
