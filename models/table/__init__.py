"""The unified table: on TorchRec, in plain torch, and the other ways to keep embeddings in a budget."""
