"""The event log and the step that turns its messages into deltas."""
