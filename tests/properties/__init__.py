"""A grammar of random valid models, for tests that hold for every graph."""
