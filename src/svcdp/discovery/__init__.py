"""Services by name: the cluster's DNS."""
