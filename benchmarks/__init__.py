"""Training of the micro models, and the measurements that every quoted figure comes from."""
