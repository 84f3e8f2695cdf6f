"""Batch scripts for Slurm: what a job is, and the script that runs it. Nothing here imports torch."""
