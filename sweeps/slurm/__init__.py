"""The SLURM executor: submission, the jobs, requeueing after a job, and the state of the queue.

docs/slurm.md describes the life of a job and the states of a run, and docs/run-directory.md the files. Every call reads
the run root and asks SLURM; nothing is kept in memory between calls.
"""
