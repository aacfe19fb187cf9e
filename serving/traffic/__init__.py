"""Traffic: assignment of requests to bundles, challengers and shadows, and recorded impressions."""
