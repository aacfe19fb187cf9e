"""Networks over what the unified table returns, each a kind of ranker."""
