"""Methods that store an id for each value and compress its row."""
