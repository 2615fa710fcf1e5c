"""Measured tables: their rows, their runs, and the page that shows them."""
