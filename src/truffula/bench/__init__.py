"""What ``truffula bench`` measures with: the load, its client and the figures; one step without a server."""
