"""Parts of a fit by pairs: its options, its head, and the rows that it learns from and is judged by."""
