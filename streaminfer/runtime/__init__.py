"""DURING: the life of a record at a worker; `worker.py` is the loop, `steps.py` its one shape."""
