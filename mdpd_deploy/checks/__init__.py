"""Whether a bundle is what it claims: gates, tolerances, and verification without the run."""
