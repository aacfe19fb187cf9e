"""Pages: everything that makes HTML."""
