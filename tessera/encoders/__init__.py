"""Work of the commands `tessera encoder` on the directory of a run."""
