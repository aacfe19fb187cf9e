"""The online store, retrieval, ranking and the HTTP interface."""
