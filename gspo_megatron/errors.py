"""The errors a user can cause. Each message names the field, the value, the constraint and the remedy.

The command line prints these without a stack trace and exits with status 2; every other exception is a
defect (ours or a library's) and keeps its trace.
"""


class GspoError(Exception):
    """Base of every error that is reported to the user as one message."""


class ConfigError(GspoError):
    """A recipe or command-line value that cannot work, found before a process group or a model is built."""


class CheckpointError(GspoError):
    """A checkpoint that is missing, incomplete or does not fit the model."""


class RolloutError(GspoError):
    """A prompt or a completion that cannot be used (for example longer than the context)."""


class TrainingError(GspoError):
    """Training cannot go on, for example because a gradient is not finite."""


class StopRequested(GspoError):
    """The run was told to stop (SIGUSR1) and has written a checkpoint; no fault."""


class LostRankError(GspoError):
    """A collective broke because another rank has ended or hangs; that rank's own message says more."""


class ConversionError(GspoError):
    """Weights that cannot be converted: a tensor or file that is missing, left over or damaged."""
