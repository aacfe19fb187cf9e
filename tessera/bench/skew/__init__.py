"""Measurements of the alarms of drift."""
