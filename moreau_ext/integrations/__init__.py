"""Thin adapters to other toolboxes, each imported only when it is used."""
