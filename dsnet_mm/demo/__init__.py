"""Code of the demos only. Nothing else in the package imports it."""
