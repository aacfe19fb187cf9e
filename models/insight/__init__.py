"""Reports on a trained table: collisions, angles between the features that read a row, hot and dead rows."""
