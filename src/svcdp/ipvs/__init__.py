"""What IPVS and its tools speak: the sync protocol, ipvsadm's words, connections in a file."""
