"""Every error that a user of `interp` can meet.

InterpError(ValueError)
└── SteeringError       a feature, a dose or an SAE that does not fit the model
"""


class InterpError(ValueError):
    """Root of the tree."""


class SteeringError(InterpError):
    """A feature, a dose or an SAE does not fit the model."""
