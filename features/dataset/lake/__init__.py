"""Tables of Delta Lake, Iceberg and databases, copied once as they were at one moment."""
