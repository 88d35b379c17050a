"""What a model may be at fault for."""


class ModelError(ValueError):
    """A model for which a loss would compute something else than the model does, or that could not learn from it."""
