"""Comparison of finished runs: reading their files, tables, figures and the HTML page."""
