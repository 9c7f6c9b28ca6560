"""Proxy modes: each is given the same services, as changes, and makes them true in its way."""
