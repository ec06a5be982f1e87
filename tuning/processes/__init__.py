"""A run over several devices: processes that accelerate starts, which share every step's examples.
The run's own process stays what the portal knows of it: lease, heartbeat, requests to stop.
"""
