"""Policies: the rules that decide which ranked items a user is shown, and where."""
