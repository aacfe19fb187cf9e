"""Formats of messages: JSON, Avro and Protobuf with a schema registry, Arrow batches."""
