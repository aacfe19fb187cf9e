"""Several trainers on one stream: the partitions of the inputs and the row ranges of the table, dealt to processes."""
