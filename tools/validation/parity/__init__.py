"""One fixed optimizer step, by a plain fp64 formula in one process and by Megatron in every parallel layout.

fixture.py makes the model and the rollouts, formula.py the truth, cases.py says what is compared, run.py compares one
case on the ranks of a process group, worker.py is what each rank runs. tools/validation/parity_matrix.py prints the
table.

Left out: the critic and the warm start (their layouts are compared in tests/backend), several steps in a row, rollouts.
"""
