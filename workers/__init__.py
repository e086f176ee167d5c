"""The appliance's processes: one module per process, wired from the parts in `appliance`."""
