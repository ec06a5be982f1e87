"""A week of a large team on many devices, simulated with the portal's own scheduling."""
