"""Methods that compute rows from hashes of a value."""
