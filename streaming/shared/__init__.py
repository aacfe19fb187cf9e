"""Several trainers of one process: one read of their inputs, and a ledger of what they train."""
