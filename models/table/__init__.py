"""One table for every categorical feature, and its readable twin."""
