"""Exports: features, vectors and Semantic IDs as partitioned parquet with a schema file, and as a Feast repository."""
