"""Experiments: assignment, impressions and outcomes, statistics, guardrails, the judge."""
