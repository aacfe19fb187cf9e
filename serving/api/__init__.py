"""The HTTP API: routes, bodies, errors, keys, limits."""
