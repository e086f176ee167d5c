"""A multi-process packet-capture appliance; README.md tells a packet's journey."""
