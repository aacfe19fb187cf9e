"""The registry of bundles on MLflow, and the gates that a new bundle must pass."""
