"""The event log: protocol, topics, SQLite and Kafka."""
