"""The console: pages over a running server for its operators. `app.py` has the routes."""
