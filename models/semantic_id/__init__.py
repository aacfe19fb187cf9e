"""Vectors to Semantic IDs: quantizers, tokens for the unified table, health of a codebook."""
