"""Scripts that run a benchmark's peers, each in a virtual environment of the peers' own."""
