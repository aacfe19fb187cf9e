"""Files that come with the package and are read by name."""
