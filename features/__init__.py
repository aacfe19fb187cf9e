"""Turns a catalogue and its events into a training frame: describe, check, encode, assign, join."""
