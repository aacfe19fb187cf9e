"""From a catalogue and its events to a training frame: describe, check, encode, assign, join."""
