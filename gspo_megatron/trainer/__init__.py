"""This is a training run. READ FIRST: train.py, then rl.py, where one step stands in the order in which it happens."""
