"""A stream that follows the releases of a model: it trains every bundle that an alias or an experiment names."""
