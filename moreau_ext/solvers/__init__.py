"""The numerics: a problem, its penalty, and the solvers of it."""
