"""A user's package of broken mechanisms: plugins=[faulty_plugin], found because its folder is on PYTHONPATH."""
