"""The explainers: settings that are checked once, and ``attribute``."""
