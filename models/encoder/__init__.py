"""Fits of encoders: heads and views from the shop's pairs, maps between spaces, smaller vectors, and their measures."""
