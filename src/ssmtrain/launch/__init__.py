"""Runs on a cluster: a job of Slurm written, submitted, and put back in the queue until it is finished."""
