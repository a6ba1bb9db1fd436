"""The verbs of the command line, by what they work on. Importing this registers them all."""

from . import cache, database, export, finetune, label, model, stages, training, whole

__all__ = [
    "cache",
    "database",
    "export",
    "finetune",
    "label",
    "model",
    "stages",
    "training",
    "whole",
]
