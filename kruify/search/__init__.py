"""Searches over conversions: candidates, compress, the sweep of budgets, and the state of such a long job on disk."""
