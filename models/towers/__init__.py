"""Two towers for retrieval: a vector for each user and each item, whose inner product orders the catalogue."""
