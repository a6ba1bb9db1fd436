"""The verbs of the command line, by what they work on. Importing this registers them all."""

from . import database, model, stages, whole

__all__ = ["database", "model", "stages", "whole"]
