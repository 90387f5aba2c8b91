"""Several runs on one backbone in one bundle."""
