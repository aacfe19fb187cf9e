"""Policies of what is shown, impressions and outcomes, and the join that makes training rows of them."""
