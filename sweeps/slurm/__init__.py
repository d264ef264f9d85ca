"""SLURM: submission, the job, requeueing, and the state of the queue."""
