"""Adapters for other toolboxes. Each module imports its toolbox only when it is used."""
