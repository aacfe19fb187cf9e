"""Names in a vector: concepts, their erasure, aspects, and corrections by near items."""
