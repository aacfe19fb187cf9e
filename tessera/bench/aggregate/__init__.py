"""Parts of `bench aggregates`: the law, the rates of frame and step, and what the ranker gains."""
