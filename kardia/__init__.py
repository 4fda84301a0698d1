"""Hold what kardia_lite.py calls: each folder imports only from itself and from the folders before it."""
