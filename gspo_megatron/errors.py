"""A user can cause these errors. Each message names the field, the value, the constraint and the remedy.

The command line prints these without a stack trace and exits with status 2; every other exception is a
defect (ours or a library's) and keeps its trace.
"""


class GspoError(Exception):
    """This is the base of every error that is reported to the user as one message."""


class ConfigError(GspoError):
    """Raised for a recipe or command-line value that cannot work, before a process group or a model is built."""


class CheckpointError(GspoError):
    """Raised for a checkpoint that is missing, incomplete or does not fit the model."""


class RolloutError(GspoError):
    """Raised for a prompt or a completion that cannot be used (for example longer than the context)."""


class TrainingError(GspoError):
    """Raised where training cannot go on, for example because a gradient is not finite."""


class StopRequested(GspoError):
    """Raised once a run that was told to stop (SIGUSR1) has written a checkpoint; no fault."""


class LostRankError(GspoError):
    """Raised where a collective broke because another rank has ended or hangs; that rank's message says more."""


class ConversionError(GspoError):
    """Raised for weights that cannot be converted: a tensor or file that is missing, left over or damaged."""
