"""Comparisons with other libraries; each prints a ratio measured in one run."""
