"""Profile of training: distributions with which served features and scores are compared."""
