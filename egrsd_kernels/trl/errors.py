"""What the user's rewards or folder may be at fault for; each message is one line."""


class CheckpointError(ValueError):
    """A checkpoint, or a run's folder, does not fit the run that is to go on from it, or to begin there."""


class Finished(CheckpointError):
    """A run that is to go on is at its end."""


class RewardError(ValueError):
    """A reward function returned something else than one reward for each completion."""
