"""Batch scripts for Slurm come from here: what a job is, and the script that runs it. Nothing here imports torch."""
