"""What planning for small accelerators takes: a device, a cost model, a format for spreadsheets."""
