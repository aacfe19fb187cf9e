"""Training in several processes: the table's rows divided among them, the network a copy in each."""
