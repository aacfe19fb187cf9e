"""Files and folders on disk or at an object store, by one set of functions."""
