"""One value, one text: the canonical form, attributes, columns of mixed values and lists written as text."""
