"""The ranker: network, training, checkpoints, evaluation, and changes of its table."""
