"""The offline job, stage by stage: encode, assign, frame, train, evaluate, publish."""
