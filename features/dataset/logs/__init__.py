"""Tables that are made of exported logs."""
