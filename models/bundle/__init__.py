"""The bundle: a released model in one directory, its entities in memory, its changes and its scores."""
