"""What the user's model, rewards or folder may be at fault for; each message is one line."""


class CheckpointError(ValueError):
    """A checkpoint, or a run's folder, does not fit the run that is to go on from it, or to begin there."""


class Finished(CheckpointError):
    """A run that is to go on is at its end."""


class ModelError(ValueError):
    """A model for which the loss would compute something else than the model does, or that could not learn from it."""


class RewardError(ValueError):
    """A reward function returned something else than one reward for each completion."""
