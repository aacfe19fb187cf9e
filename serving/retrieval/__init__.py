"""Retrieval: filters, the inverted file with its planner, candidates by content."""
