"""The console: pages over a running server, for those who operate it. Read with the eyes; `app.py` has the routes."""
