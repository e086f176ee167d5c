"""Header digests to IPFIX flow records."""
