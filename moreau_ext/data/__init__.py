"""The image reader, the manifest of an output folder and the progress bar, shared by ``batch`` and ``evaluation``."""
