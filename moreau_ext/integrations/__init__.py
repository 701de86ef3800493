"""Explainers for the models and data of other toolboxes; each toolbox is imported only when it is used."""
