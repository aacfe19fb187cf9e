"""Training frame of any size: jobs that read slices of files and write blocks of examples."""
