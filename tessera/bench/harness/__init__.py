"""The frame of every benchmark: results, datasets, peers, servers and load."""
