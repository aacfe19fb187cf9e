"""The registry of bundles on MLflow, and the gates in front of it."""
