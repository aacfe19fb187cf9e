"""Benchmarks with their peers side by side: one module each, one shape of JSON for all."""
