"""Explainers for the models and data of other toolboxes, and adapters; each imports its toolbox only when used."""
