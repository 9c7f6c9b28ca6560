"""Addresses of load balancers, made known to the local network and to routers."""
