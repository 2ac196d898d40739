"""What `meristem serve` costs: tokens/s, waits, memory and the disk, measured over HTTP from another process."""
