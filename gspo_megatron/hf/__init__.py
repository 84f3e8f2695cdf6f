"""Between Hugging Face folders and Megatron's parameters.

architecture.py says what a config.json means, families/ how the tensors of each family are named, operators.py how
tensors are merged and split, table.py what that makes of one model, safetensors.py reads and writes the files, load.py
and export.py move weights between a folder and the model chunks of all ranks. Nothing but the last four imports torch.
"""
