"""Scoring answers: judges, metrics, likelihood, tables, charts."""
