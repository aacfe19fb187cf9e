"""Examples that lie on a device: blocks in files, rows by the hash contract, and batches that are gathered there."""
