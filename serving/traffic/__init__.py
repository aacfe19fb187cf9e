"""Traffic: the bundle that answers a request, challengers and shadows, recorded impressions."""
