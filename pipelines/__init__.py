"""Composition: stages, configuration, the command line, trackers. Nobody imports this package."""
